"""Linears that share a launch: each thread of a server gets the products of its own input."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from windquant.checkpoint.fused import Fused

SECONDS = 1.0


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads take turns as often as Python allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Products(Fused):
    """With torch's products in place of the kernels', which need a GPU."""

    def _launch(self, numbers: tuple[int, ...]) -> Callable[[Tensor], list[Tensor]]:  # type: ignore[override]
        return lambda x: [nn.functional.linear(x, self.members[number].weight) for number in numbers]


@pytest.mark.usefixtures("impatient")
def test_threads_do_not_take_each_others_products() -> None:
    generator = torch.Generator().manual_seed(0)
    fused = Products([])
    for _ in range(3):
        member = nn.Linear(8, 4, bias=False)
        member.weight = nn.Parameter(torch.randn(4, 8, generator=generator), requires_grad=False)
        fused.add(member)  # type: ignore[arg-type]

    def wrong(seed: int) -> int:
        own, count = torch.Generator().manual_seed(seed), 0
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            x = torch.randn(1, 8, generator=own)
            for member in fused.members:
                count += not torch.allclose(fused(member, x), x @ member.weight.T)
        return count

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(wrong, range(4))) == 0
