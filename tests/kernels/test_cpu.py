"""The compiled decoder of a CPU: bit for bit the weight of the torch reference."""

import numpy as np
import pytest
import torch

from benchmarks.kernels.random_weights import layout_of, random_order, random_tensors
from windquant.kernels import compiled, cpu
from windquant.packed import Format, dequantize
from windquant.quantizers import actions

NAMES = list(actions())


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    kind = torch.int32 if expected.dtype == torch.float32 else torch.int16
    return found.dtype == expected.dtype and torch.equal(found.view(kind), expected.view(kind))


@pytest.mark.parametrize("dtype", cpu.KINDS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rows", "columns", "chunk", "protected", "window"),
    [
        (1, 5, 3, 0.0, 8),
        (37, 199, 7, 0.1, 8),
        (130, 15 * 16 + 9, 16, 0.0, 12),
        (576, 15 * 64 + 31, 64, 0.03, 12),
        (75, 15 * 16, 16, 0.0, 14),
        (1030, 15 * 8, 8, 0.0, 10),  # three streams
    ],
)
def test_the_weight_is_that_of_the_reference(
    rows: int, columns: int, chunk: int, protected: float, window: int, threads: int, dtype: torch.dtype,
    generator: torch.Generator,
) -> None:  # fmt: skip
    layout = layout_of(rows, columns, Format(chunk, protected, window, torch.bfloat16), NAMES)
    order = random_order(layout, generator)
    tensors = random_tensors(layout, order, generator)
    expected = dequantize(layout, tensors, order).to(dtype)
    assert expected.isfinite().all()
    assert same_bits(cpu.decode(layout, tensors, order, dtype, threads), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_action(name: str, generator: torch.Generator) -> None:
    layout = layout_of(75, 50, Format(16, 0.1, 12, torch.float16), [name])
    order = random_order(layout, generator)
    tensors = random_tensors(layout, order, generator)
    expected = dequantize(layout, tensors, order)
    assert same_bits(cpu.decode(layout, tensors, order, torch.float32, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    """Around every value of the narrow type: just below, at and above the middle between two; zero, tiny, huge, NaN."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32)
    half = 1 << 12 if dtype == torch.float16 else 1 << 15
    bits = torch.cat([every + shift for shift in (-half - 1, -half, -half + 1, -1, 0, 1, half - 1, half, half + 1)])
    bits = torch.cat([bits, torch.randint(-(1 << 31), 1 << 31, (100_000,), dtype=torch.int64).int()])
    convert = compiled.half if dtype == torch.float16 else compiled.brain
    expected = bits.view(torch.float32).to(dtype)
    found = torch.tensor([convert(number) for number in bits.numpy().view(np.float32)], dtype=torch.int32)
    found = found.to(torch.int16).view(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    keep = ~expected.isnan()
    assert torch.equal(found.view(torch.int16)[keep], expected.view(torch.int16)[keep])
