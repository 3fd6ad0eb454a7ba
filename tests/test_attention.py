"""Attention of short windows in BF16 computes what torch's does, and leaves alone what it is not made for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.families import family, token_ids
from windquant import attention, compute


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the windows that went through ours; the processor counts as one with BF16 products."""
    seen: list[int] = []
    ours = attention.causal_attention

    def counted(query: Tensor, *others: Any) -> Tensor:
        seen.append(query.shape[2])
        return ours(query, *others)

    monkeypatch.setattr(attention, "causal_attention", counted)
    monkeypatch.setattr(compute, "native_bfloat16", lambda: True)
    return seen


def states(length: int, heads: int = 6, shared: int = 3, size: int = 16, batch: int = 2) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, count, length, size) for count in (heads, heads // shared, heads // shared)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("length", [2, 33, 512])
@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (6, 1), (6, 3), (4, 4)])
def test_it_is_softmax_attention_up_to_bfloat16(length: int, heads: int, shared: int) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in states(length, heads, shared))
    found = attention.causal_attention(query, key, value)
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.01 * exact.norm()
    towards = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    mine = torch.autograd.grad(found, (query, key, value), towards.bfloat16())
    for one, other in zip(mine, torch.autograd.grad(exact, (query, key, value), towards), strict=True):
        assert (one - other).norm() < 0.02 * other.norm() + 1e-3


def test_values_may_be_wider_than_keys_and_scores_scaled_otherwise() -> None:
    query, key, value = states(16)
    wide = torch.cat([value, -value], -1)
    found = attention.causal_attention(query, key, wide, 0.5)
    exact = F.scaled_dot_product_attention(query, key, wide, is_causal=True, enable_gqa=True, scale=0.5)
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_no_token_sees_a_later_one() -> None:
    query, key, value = states(64)
    before = attention.causal_attention(query, key, value)
    key[:, :, 40:] += 100
    value[:, :, 40:] -= 100
    assert torch.equal(attention.causal_attention(query, key, value)[:, :, :40], before[:, :, :40])


class Attention(nn.Module):
    num_key_value_groups = 3
    is_causal = True


def both(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **others: Any) -> tuple[Tensor, Tensor]:
    """What ours and transformers' own function return."""
    module = Attention()
    mine, theirs = (
        function(module, query, key, value, mask, **others)[0]
        for function in (attention.forward, sdpa_attention_forward)
    )
    assert mine.shape == theirs.shape
    return mine, theirs


def test_short_windows_under_autocast_are_ours(calls: list[int]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = both(*states(64), scaling=0.3)
    assert calls == [64]
    assert mine.dtype == theirs.dtype
    assert (mine - theirs).norm() < 0.01 * theirs.norm()


def test_everything_else_is_left_to_torch(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = states(64)
    cases: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = [
        (query, key, value, {"mask": torch.ones(64, 64).tril().bool()[None, None]}),
        (query, key, value, {"is_causal": False}),
        (query[:, :, :1], key, value, {}),  # one token after others
        (*states(513), {}),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        for *tensors, others in cases:
            assert torch.equal(*both(*tensors, **others))
    assert torch.equal(*both(query, key, value))  # FP32
    monkeypatch.setattr(compute, "native_bfloat16", lambda: False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*both(query, key, value))
    assert calls == []


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_models_use_it(name: str, calls: list[int]) -> None:
    model, ids = family(name), token_ids(2, 12)
    exact = model(input_ids=ids, use_cache=False).logits
    assert calls == []
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids=ids, use_cache=False).logits
    assert calls
    assert (found - exact).norm() < 0.05 * exact.norm()
