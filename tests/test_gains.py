"""Gains of rows: what is stored is what was trained, and gradients are those of the formula."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.checkpoint.making import Made, make
from windquant import models
from windquant.checkpoint.linear import PackedLinear
from windquant.gains import GainLinear, regain, stored_gain
from windquant.packed import dequantize


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Qwen2 (biases) with protected columns, skipped chunks and narrow last ones."""
    folder = tmp_path_factory.mktemp("biased")
    return make(folder / "packed", folder / "original", "qwen2", 0.05, ["scalar-2", "skip", "scalar-1.5"])


def linears(made: Made) -> dict[str, tuple[PackedLinear, GainLinear]]:
    model = models.load(made.folder)
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return {name: (module, GainLinear.of(module, torch.float32)) for name, module in found.items()}


def some_gain(made: Made, name: str) -> Tensor:
    """Log-gains that can be stored: whole steps that leave no code's range; zero for chunks without scales."""
    layout, tensors = made.layouts[name], made.tensors[name]
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-20, 21, (layout.linear.rows, len(layout.widths)), generator=generator)
    wanted = steps * tensors["scale_grid"][1].float() * torch.log(torch.tensor(2.0))
    return stored_gain(layout, tensors, regain(layout, tensors, wanted))


def test_gains_are_stored_in_the_scales(biased: Made) -> None:
    skipped = 0
    for name, layout in biased.layouts.items():
        tensors, gain = biased.tensors[name], some_gain(biased, name)
        after = regain(layout, tensors, gain)
        assert {key for key in after if not torch.equal(after[key], tensors[key])} == {"scales"}
        torch.testing.assert_close(stored_gain(layout, tensors, after), gain)
        assert gain.abs().max() > 0.1
        for chunk, action in enumerate(layout.names):
            if action == "skip":
                skipped += 1
                assert (gain[:, chunk] == 0).all()
        again = regain(layout, after, torch.zeros_like(gain))
        assert torch.equal(again["scales"], after["scales"])
    assert skipped > 0


def test_stored_gains_are_the_nearest_ones(biased: Made) -> None:
    name = next(iter(biased.layouts))
    layout, tensors = biased.layouts[name], biased.tensors[name]
    grid = tensors["scale_grid"][1].float() * torch.log(torch.tensor(2.0))
    chunk = layout.names.index("scalar-2")
    wanted = torch.zeros(layout.linear.rows, len(layout.widths))
    wanted[:, chunk] = (torch.rand(layout.linear.rows, generator=torch.Generator().manual_seed(0)) - 0.5) * 4 * grid
    stored = stored_gain(layout, tensors, regain(layout, tensors, wanted))
    off = (stored - wanted).abs()[:, chunk]
    assert (off <= 0.501 * grid).float().mean() > 0.8, "all but those at the ends of the codes' range"
    assert ((stored[:, chunk] / grid).round() * grid - stored[:, chunk]).abs().max() < 1e-5


def test_a_gain_linear_is_the_packed_one(biased: Made) -> None:
    """With gains of zero and, with gains that can be stored, as it will be stored; biases included."""
    for name, (packed, tuned) in linears(biased).items():
        layout = biased.layouts[name]
        x = torch.randn(2, 5, layout.linear.columns, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(tuned(x), packed(x), rtol=1e-4, atol=1e-4)
        gain = some_gain(biased, name)
        tuned.gain.data.copy_(gain)
        order = packed.get_buffer("column_order")
        stored = dequantize(layout, regain(layout, biased.tensors[name], gain), order)
        torch.testing.assert_close(tuned(x), F.linear(x, stored, packed.bias), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tuned(x), packed(x), rtol=1e-2, atol=1e-2)


def test_rounding_computes_with_what_will_be_stored(biased: Made) -> None:
    """And its gradients are those at the stored gains: they pass straight through."""
    for name, (packed, tuned) in linears(biased).items():
        layout, tensors = biased.layouts[name], biased.tensors[name]
        x = torch.randn(2, 5, layout.linear.columns, generator=torch.Generator().manual_seed(0))
        wanted = torch.randn(layout.linear.rows, len(layout.widths), generator=torch.Generator().manual_seed(1))
        gradients = []
        for gain, rounding in ((wanted, True), (stored_gain(layout, tensors, regain(layout, tensors, wanted)), False)):
            tuned.gain.data.copy_(gain)
            tuned.rounding = rounding
            tuned.gain.grad = None
            tuned(x).square().sum().backward()
            gradients.append(tuned.gain.grad)
            stored = dequantize(layout, regain(layout, tensors, wanted), packed.get_buffer("column_order"))
            torch.testing.assert_close(tuned(x), F.linear(x, stored, packed.bias), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_the_formula(biased: Made) -> None:
    for name, (packed, tuned) in linears(biased).items():
        layout, order = biased.layouts[name], packed.get_buffer("column_order")
        x = torch.randn(7, layout.linear.columns, generator=torch.Generator().manual_seed(0), requires_grad=True)
        target = torch.randn(7, layout.linear.rows, generator=torch.Generator().manual_seed(1))
        tuned.gain.data.copy_(0.1 * torch.randn(tuned.gain.shape, generator=torch.Generator().manual_seed(2)))
        found = torch.autograd.grad((tuned(x) * target).sum(), [tuned.gain, x])

        gain = tuned.gain.detach().clone().requires_grad_(True)
        has_scale = torch.tensor([entry.has_scale for entry in layout.actions])
        by_column = (gain * has_scale).repeat_interleave(torch.tensor(layout.widths), 1)
        by_column = F.pad(by_column, (layout.protected, 0))[:, order.argsort()]
        expected = torch.autograd.grad(
            (F.linear(x, packed.weight * by_column.exp(), packed.bias) * target).sum(), [gain, x]
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert (found[0][:, ~has_scale] == 0).all()
