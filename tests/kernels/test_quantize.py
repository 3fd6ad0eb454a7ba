"""Fit, encode, search and pack: codes and bytes bit for bit those of the reference on the CPU."""

import pytest
import torch
from torch import Tensor

from windquant.kernels import chunks
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
def test_the_fit_is_that_of_the_reference(entry: Scalar, generator: torch.Generator, device: torch.device) -> None:
    columns, energy, _, _ = chunk(40, 13, generator)
    expected = entry.fit(columns.T, energy)
    found = chunks.fit(entry, columns.to(device), energy.to(device))
    # Two clips of one row may be equally good but for rounding: then the errors agree, though the scales do not.
    scale = (found.scale.cpu() - expected.scale).abs() <= 1e-4 * expected.scale
    assert scale.float().mean() > 0.9
    assert torch.allclose(loss(entry, columns, energy, found), loss(entry, columns, energy, expected), rtol=1e-4)
    assert (found.offset is None) == (expected.offset is None)


def loss(entry: Treatment, columns: Tensor, energy: Tensor, fit: object) -> Tensor:
    """Weighted error of every row, every column rounded on its own."""
    from windquant.quantizers import Fit

    assert isinstance(fit, Fit)
    moved = Fit(fit.scale.cpu(), None if fit.offset is None else fit.offset.cpu())
    none = torch.zeros(len(columns), len(columns)) + torch.eye(len(columns))
    coded = entry.encode(columns.clone(), moved, torch.ones(columns.shape[1]), none)
    return ((columns - coded.decoded).square() * energy[:, None]).sum(0)
