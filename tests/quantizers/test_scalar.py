"""The scalar treatment: exact where it can be, least squares where it cannot."""

import pytest
import torch

from windquant.quantizers import actions
from windquant.quantizers.base import Fit
from windquant.quantizers.scalar import Scalar
from windquant.scales import decode_offset, encode_offset

SCALARS = [name for name in actions() if name.startswith("scalar")]


def entry(name: str) -> Scalar:
    found = actions()[name]
    assert isinstance(found, Scalar)
    return found


def quantize(found: Scalar, chunk: torch.Tensor, energy: torch.Tensor) -> tuple[Fit, torch.Tensor]:
    fit = found.fit(chunk, energy)
    coded = found.encode(chunk.T.clone(), fit, torch.ones(len(chunk)), torch.eye(chunk.shape[1]))
    return fit, coded.decoded.T


@pytest.mark.parametrize("name", SCALARS)
def test_a_row_that_lies_on_a_grid_is_exact(name: str) -> None:
    found = entry(name)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, found.levels, (6, 300), generator=generator)
    codes[:, 0], codes[:, 1] = 0, found.levels - 1
    offset = 0.3 if found.has_offset else 0.0
    chunk = (codes - found.middle + offset) * torch.linspace(0.01, 3, 6)[:, None]
    _, decoded = quantize(found, chunk, torch.ones(300))
    torch.testing.assert_close(decoded, chunk, rtol=1e-4, atol=1e-4)


def test_one_bit_is_the_mean_and_the_mean_distance() -> None:
    """BiLLM: w is about mean +- mean|w - mean|."""
    chunk = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) + 0.4
    fit, decoded = quantize(entry("scalar-1"), chunk, torch.ones(64))
    mean = chunk.mean(1, keepdim=True)
    distance = (chunk - mean).abs().mean(1)
    best = torch.where(chunk > mean, mean + distance[:, None], mean - distance[:, None])
    ours, theirs = ((chunk - result).square().mean(1) for result in (decoded, best))
    assert ours.mean() <= theirs.mean()
    torch.testing.assert_close(fit.scale.mean(), 2 * distance.mean(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("name", SCALARS)
def test_no_other_scale_or_offset_is_better_on_these_codes(name: str) -> None:
    found = entry(name)
    generator = torch.Generator().manual_seed(1)
    chunk = torch.randn(7, 64, generator=generator)
    energy = torch.rand(64, generator=generator) + 0.05
    fit, decoded = quantize(found, chunk, energy)
    error = ((chunk - decoded).square() * energy).sum(1)
    for factor in (0.9, 0.97, 1.03, 1.1):
        other = Fit(fit.scale * factor, fit.offset)
        codes = found.encode(chunk.T.clone(), other, torch.ones(7), torch.eye(64)).codes
        worse = ((chunk - found.decode(codes, other).T).square() * energy).sum(1)
        assert worse.sum() > 0.98 * error.sum(), factor
    if name != "scalar-8":  # its range is the row's, not fitted
        assert found.error(chunk, energy).sum() == pytest.approx(error.sum().item(), rel=1e-4)


def test_energy_decides_where_the_error_goes() -> None:
    chunk = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    energy = torch.cat([torch.full((8,), 100.0), torch.ones(56)])
    _, weighted = quantize(entry("scalar-2"), chunk, energy)
    _, plain = quantize(entry("scalar-2"), chunk, torch.ones(64))
    salient = slice(0, 8)
    assert (weighted - chunk)[:, salient].square().mean() < (plain - chunk)[:, salient].square().mean()


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_rows(name: str, value: float) -> None:
    found = entry(name)
    fit, decoded = quantize(found, torch.full((3, 16), value), torch.ones(16))
    assert fit.scale.isfinite().all()
    assert (fit.scale > 0).all()
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded, torch.full((3, 16), value), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", [name for name in SCALARS if entry(name).has_offset])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 64])
def test_offsets_are_such_as_can_be_stored(name: str, width: int) -> None:
    """Few columns, or rows of one sign, would take any offset; the bank and the checkpoint know the same ones."""
    found = entry(name)
    chunk = 0.1 * torch.randn(50, width, generator=torch.Generator().manual_seed(3)) + 0.3
    energy = torch.ones(width)
    fit = found.fit(chunk, energy)
    assert fit.offset is not None
    stored = Fit(fit.scale, decode_offset(encode_offset(fit.offset, found.levels), found.levels))
    coded = found.encode(chunk.T.clone(), stored, torch.ones(50), torch.eye(width))
    error = (chunk.T - coded.decoded).square().sum()
    expected, whole = found.error(chunk, energy).sum(), chunk.square().sum()
    assert error <= 1.1 * expected + 1e-3 * whole
    if width == 1:
        assert error < 1e-4 * whole
