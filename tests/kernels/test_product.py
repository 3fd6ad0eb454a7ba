"""The fused product: against float64, for every action, any shape, several linears at once, poisoned outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.random_weights import layout_of, random_order, random_tensors
from windquant.kernels.launches import Launch, units
from windquant.packed import Format, Layout, dequantize
from windquant.quantizers import actions

NAMES = list(actions())
RELATIVE = 1e-2  # of a product, to that in float64


def form(chunk: int, protected: float, dtype: torch.dtype = torch.float16) -> Format:
    return Format(chunk, protected, 8, dtype)


def made(
    layouts: list[Layout], generator: torch.Generator, device: torch.device
) -> tuple[list[dict[str, Tensor]], Tensor]:
    order = random_order(layouts[0], generator)
    tensors = [random_tensors(layout, order, generator) for layout in layouts]
    return [{key: tensor.to(device) for key, tensor in each.items()} for each in tensors], order.to(device)


def check(
    layouts: list[Layout], batch: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device,
    bias: bool = False,
) -> None:  # fmt: skip
    tensors, order = made(layouts, generator, device)
    biases = [
        torch.randn(each.linear.rows, generator=generator).to(device, dtype) if bias else None for each in layouts
    ]
    x = torch.randn(batch, layouts[0].linear.columns, generator=generator).to(device, dtype)
    found = Launch(layouts, tensors, order, biases)(x)
    for layout, each, added, y in zip(layouts, tensors, biases, found, strict=True):
        expected = x.double() @ dequantize(layout, each, order).double().T
        expected += 0 if added is None else added.double()
        assert y.dtype == dtype
        assert y.shape == expected.shape
        assert y.isfinite().all()
        assert (y.double() - expected).norm() < RELATIVE * expected.norm()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated without a value holds NaN: a place that no kernel writes is seen."""
    empty = torch.empty

    def poison(*arguments: Any, **options: Any) -> Tensor:
        result: Tensor = empty(*arguments, **options)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_action(name: str, batch: int, generator: torch.Generator, device: torch.device) -> None:
    check([layout_of(48, 40, form(16, 0.0), [name])], batch, torch.bfloat16, generator, device)


@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (16, torch.float16)])
@pytest.mark.parametrize(("rows", "columns", "chunk"), [(33, 41, 7), (64, 97, 32), (1, 5, 3)])
def test_any_shape(
    rows: int,
    columns: int,
    chunk: int,
    dtype: torch.dtype,
    batch: int,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    check([layout_of(rows, columns, form(chunk, 0.1), NAMES)], batch, dtype, generator, device, bias=True)


@pytest.mark.parametrize("rows", [1030, 1056])  # three streams of a trellis, two tiles of the product
def test_tall(rows: int, generator: torch.Generator, device: torch.device) -> None:
    names = ["trellis-1.5", "trellis-2.5", "trellis-3", "trellis-3.5", "scalar-1.5"]
    check([layout_of(rows, 40, form(8, 0.0), names)], 1, torch.float16, generator, device)


@pytest.mark.parametrize("batch", [1, 4])
def test_linears_of_one_input_in_one_launch(batch: int, generator: torch.Generator, device: torch.device) -> None:
    names = [["trellis-2", "scalar-4"], ["trellis-3.5"], ["scalar-2", "skip", "trellis-1"]]
    layouts = [
        layout_of(rows, 50, form(16, 0.1, torch.bfloat16), chosen, name, "q")
        for rows, chosen, name in zip((80, 16, 16), names, "qkv", strict=True)
    ]
    check(layouts, batch, torch.bfloat16, generator, device, bias=True)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_bits_twice_and_nan_passes_on(batch: int, generator: torch.Generator, device: torch.device) -> None:
    layout = layout_of(48, 64, form(16, 0.05), ["trellis-2", "scalar-2"])
    tensors, order = made([layout], generator, device)
    launch = Launch([layout], tensors, order, [None])
    x = torch.randn(batch, 64, generator=generator).to(device, torch.bfloat16)
    first, second = launch(x)[0], launch(x)[0]
    assert torch.equal(first, second)
    for column in (0, 63):
        broken = x.clone()
        broken[0, column] = torch.nan
        found = launch(broken)[0]
        assert found[0].isnan().all()
        assert torch.equal(found[1:], first[1:])


@pytest.mark.parametrize("most", [16, 5])
def test_units_cover_the_columns(most: int) -> None:
    layout = layout_of(100, 333, form(16, 0.1), NAMES)
    found = units(layout, most)
    assert [unit.action for unit in found] == sorted(unit.action for unit in found)
    columns = sorted(place for unit in found for place in range(unit.column, unit.column + unit.width))
    assert columns == list(range(333))
