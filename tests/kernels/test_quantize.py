"""Fit, encode, search and pack: codes and bytes bit for bit those of the reference on the CPU."""

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.random_weights import layout_of
from windquant import kernels
from windquant.feedback import column_order, quantize_linear
from windquant.kernels import chunks
from windquant.packed import Format, dequantize
from windquant.quantizers import Treatment, actions
from windquant.quantizers.scalar import Scalar
from windquant.quantizers.trellis import Trellis
from windquant.storage import pack

ENTRIES = [entry for entry in actions(8).values() if isinstance(entry, Scalar | Trellis)]


def chunk(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns [width, rows], their energy, the rows' importance, and the upper triangle of the feedback."""
    columns = torch.randn(width, rows, generator=generator) * torch.rand(rows, generator=generator)
    energy = torch.rand(width, generator=generator) + 0.1
    feedback = torch.eye(width) + torch.triu(0.2 * torch.randn(width, width, generator=generator), 1)
    return columns, energy, torch.rand(rows, generator=generator) + 0.1, feedback


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.parametrize(("rows", "width"), [(37, 5)])
def test_codes_are_those_of_the_reference(
    entry: Scalar | Trellis, rows: int, width: int, generator: torch.Generator, device: torch.device
) -> None:
    columns, energy, importance, feedback = chunk(rows, width, generator)
    fit = entry.fit(columns.T, energy)
    expected = entry.encode(columns.clone(), fit, importance, feedback)
    moved = type(fit)(fit.scale.to(device), None if fit.offset is None else fit.offset.to(device))
    found = chunks.encode(entry, columns.to(device), moved, importance.to(device), feedback.to(device))
    assert torch.equal(found.codes.cpu(), expected.codes)
    assert torch.equal(found.decoded.cpu(), expected.decoded)
    assert torch.equal(found.errors.cpu(), expected.errors)
    assert torch.equal(chunks.pack(found.codes, entry.pattern).cpu(), pack(expected.codes, entry.pattern))


def test_streams_begin_anew(generator: torch.Generator, device: torch.device) -> None:
    entry = Trellis("trellis-2", 2, (2, 2), window=8, tile=16)
    columns, energy, importance, feedback = chunk(50, 2, generator)
    fit = entry.fit(columns.T, energy)
    expected = entry.encode(columns.clone(), fit, importance, feedback)
    found = chunks.encode(
        entry, columns.to(device), type(fit)(fit.scale.to(device)), importance.to(device), feedback.to(device)
    )
    assert torch.equal(found.codes.cpu(), expected.codes)


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if isinstance(entry, Scalar)], ids=lambda entry: entry.name
)
@pytest.mark.parametrize(("width", "mean"), [(13, 0.0), (13, 3.0), (1, 0.0)])
def test_the_fit_is_that_of_the_reference(
    entry: Scalar, width: int, mean: float, generator: torch.Generator, device: torch.device
) -> None:
    columns, energy, _, _ = chunk(40, width, generator)
    columns += mean
    expected = entry.fit(columns.T, energy)
    found = chunks.fit(entry, columns.to(device), energy.to(device))
    # Two clips of one row may be equally good but for rounding: then the errors agree, though the scales do not.
    ours, theirs = (loss(entry, columns, energy, fit) for fit in (found, expected))
    if mean:  # at the largest offset rounding decides what the last refit sees
        assert ours.sum().item() == pytest.approx(theirs.sum().item(), rel=0.1)
    else:
        scale = (found.scale.cpu() - expected.scale).abs() <= 1e-4 * expected.scale
        assert scale.float().mean() > 0.9
        assert torch.allclose(ours, theirs, rtol=1e-4)
    assert (found.offset is None) == (expected.offset is None)


def loss(entry: Treatment, columns: Tensor, energy: Tensor, fit: object) -> Tensor:
    """Weighted error of every row, every column rounded on its own."""
    from windquant.quantizers import Fit

    assert isinstance(fit, Fit)
    moved = Fit(fit.scale.cpu(), None if fit.offset is None else fit.offset.cpu())
    none = torch.zeros(len(columns), len(columns)) + torch.eye(len(columns))
    coded = entry.encode(columns.clone(), moved, torch.ones(columns.shape[1]), none)
    return ((columns - coded.decoded).square() * energy[:, None]).sum(0)


@pytest.mark.parametrize(
    ("rows", "columns", "chunk", "protected"),
    [(37, 15 * 5 + 3, 5, 0.1), (16, 15, 1, 0.0), (1, 90, 6, 0.03)],
    ids=["odd", "columns of one", "one row"],
)
def test_a_linear_is_stored_as_the_reference_stores_it(
    rows: int, columns: int, chunk: int, protected: float, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The quantize step's own function, with every action, dead inputs and a dead row, by kernels and without."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(3 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs[:, ::7] = 0
    weight[: rows // 9] = 0
    covariance = inputs.T @ inputs / len(inputs)
    layout = layout_of(rows, columns, Format(chunk, protected, 8, torch.float16), list(actions()))
    order = column_order(covariance.diagonal(), "saliency", chunk, layout.protected)
    importance = torch.rand(rows, generator=generator) + 0.1
    expected, decoded = quantize_linear(weight, order, covariance, layout, importance)
    monkeypatch.setattr(kernels, "quantize_on", lambda device: True)
    found, weights = quantize_linear(weight.to(device), order, covariance, layout, importance)
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in found.items()} == layout.shapes
    assert torch.allclose(dequantize(layout, found, order), weights.cpu(), rtol=1e-4, atol=1e-5)
    if device.type == "cpu":  # a GPU factors the covariance in another order of sums, and rounds otherwise
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
        assert torch.equal(weights, decoded)
    else:
        assert (weights.cpu() - weight).norm() < 1.05 * (decoded - weight).norm()
