"""The dequantize kernel: the weight of the torch reference."""

import pytest
import torch

from benchmarks.kernels.random_weights import layout_of, random_order, random_tensors
from windquant.kernels.launches import Launch
from windquant.packed import Format, dequantize
from windquant.quantizers import actions

NAMES = list(actions())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "chunk", "names"),
    [
        *((48, 20, 16, [name]) for name in NAMES),
        (37, 99, 7, NAMES),
        (1030, 40, 8, ["trellis-1.5", "scalar-1.5", "skip"]),
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
