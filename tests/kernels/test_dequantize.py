"""The dequantize kernel: the weight of the torch reference."""

import pytest
import torch

from benchmarks.kernels.random_weights import layout_of, random_order, random_tensors
from windquant.kernels import cpu
from windquant.kernels.launches import Launch
from windquant.packed import Format, dequantize
from windquant.quantizers import actions

NAMES = list(actions())
TRELLISES = [name for name in NAMES if name.startswith("trellis")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "chunk", "names"),
    [
        *((48, 20, 16, [name]) for name in NAMES),
        (37, 115, 7, NAMES),
        (8, 115, 7, NAMES),  # fewer rows than a group has
        (34, 460, 192, ["trellis-2", "trellis-1.5", "scalar-3"]),
        (1030, 40, 8, ["trellis-1.5", "trellis-2.5", "trellis-3.5", "scalar-1.5", "skip"]),
    ],
)
def test_the_weight_is_that_of_the_reference(
    rows: int, columns: int, chunk: int, names: list[str], dtype: torch.dtype, generator: torch.Generator,
    device: torch.device,
) -> None:  # fmt: skip
    layout = layout_of(rows, columns, Format(chunk, 0.1, 8, torch.bfloat16), names)
    order = random_order(layout, generator)
    tensors = {key: tensor.to(device) for key, tensor in random_tensors(layout, order, generator).items()}
    order = order.to(device)
    found = Launch([layout], [tensors], order, [None]).weight(0, dtype)
    expected = dequantize(layout, tensors, order)[:, order]
    close = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(found.float(), expected, rtol=close, atol=close * expected.abs().max().item())


@pytest.mark.parametrize(
    ("rows", "columns", "chunk", "window"),
    [(8, 20, 7, 12), (48, 5, 1, 12), (531, 5, 1, 12), (531, 5, 1, 14), (40, 460, 192, 12), (40, 20, 7, 12)],
)
@pytest.mark.parametrize("name", TRELLISES)
def test_every_reader_finds_the_same_bits(
    name: str, rows: int, columns: int, chunk: int, window: int, generator: torch.Generator, device: torch.device
) -> None:
    """Scales of one leave nothing to round before the rotation; that has one order of sums. 531 rows: two streams."""
    layout = layout_of(rows, columns, Format(chunk, 0.0, window, torch.float16), [name])
    order = random_order(layout, generator)
    tensors = random_tensors(layout, order, generator)
    for key in ("scale_grid", "row_scales", "chunk_scales"):
        tensors[key].zero_()
    expected = dequantize(layout, tensors, order)
    assert len(expected.unique()) > rows // 2
    assert torch.equal(cpu.decode(layout, tensors, order, torch.float32, 1), expected)
    moved = {key: tensor.to(device) for key, tensor in tensors.items()}
    found = Launch([layout], [moved], order.to(device), [None]).weight(0, torch.float32).cpu()
    assert torch.equal(found, expected[:, order])
