"""The loss of recovery: the divergence from the original, and its gradient."""

import pytest
import torch
from torch import Tensor

from windquant.divergence import kl_divergence


def test_kl_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 11, generator=generator) for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert kl_divergence(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(teacher, teacher + 3).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kl_divergence_has_the_gradient_of_autograd(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 11, generator=generator).to(dtype) for _ in range(2))
    gradients = []
    for divergence_of in (kl_divergence, by_autograd):
        given = student.clone().requires_grad_(True)
        (3 * divergence_of(given, teacher)).backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def by_autograd(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (logits.float().flatten(0, -2).log_softmax(-1) for logits in (student, teacher))
    return (p.exp() * (p - q)).sum(-1).mean()
