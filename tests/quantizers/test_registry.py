"""The registry of actions, and what every treatment promises."""

import pytest
import torch

from windquant.errors import WindquantError
from windquant.quantizers import action, actions, menu
from windquant.quantizers.rotation import blocks, rotation
from windquant.quantizers.trellis import table
from windquant.storage import TERNARY, pack

WINDOW = 8


def test_actions_are_ordered_by_width() -> None:
    entries = list(actions().values())
    assert [entry.bits for entry in entries] == sorted(entry.bits for entry in entries)
    assert [entry.name for entry in entries] == list(actions())
    for entry in entries:
        nominal = 1.5 if entry.pattern == TERNARY else sum(entry.pattern) / 2
        assert entry.bits == (16 if entry.name == "skip" else nominal)


def test_menus() -> None:
    assert menu("mixed") == list(actions())
    assert [actions()[name].bits for name in menu("scalar")] == [1, 1.5, 2, 3, 4, 8, 16]
    assert [actions()[name].bits for name in menu("trellis")] == [1, 1.5, 2, 2.5, 3, 3.5, 4, 8, 16]
    with pytest.raises(WindquantError, match=r"units\.treatment"):
        menu("vector")


def test_an_unknown_action_is_named() -> None:
    with pytest.raises(WindquantError, match="'scalar-5': unknown"):
        action("scalar-5", WINDOW, torch.float16)


@pytest.mark.parametrize("name", actions())
@pytest.mark.parametrize("rows", [1, 8, 75])
def test_quantizing_keeps_its_promises(name: str, rows: int) -> None:
    entry = actions(WINDOW)[name]
    generator = torch.Generator().manual_seed(rows)
    chunk = torch.randn(rows, 12, generator=generator) * 0.1
    energy = torch.rand(12, generator=generator) + 0.1
    fit = entry.fit(chunk, energy)
    assert fit.scale.shape == (rows,)
    assert (fit.scale > 0).all()
    assert (fit.offset is not None) == entry.has_offset
    coded = entry.encode(chunk.T.clone().contiguous(), fit, torch.ones(rows), torch.eye(12))
    assert coded.codes.dtype == torch.uint8
    assert coded.codes.shape == (12, rows * 2 if name == "skip" else rows)
    decoded = entry.decode(coded.codes, fit)
    torch.testing.assert_close(decoded, coded.decoded, rtol=0, atol=0)
    torch.testing.assert_close(coded.errors, chunk.T - decoded if name != "skip" else torch.zeros(12, rows))
    levels = entry.unscaled(pack(coded.codes, entry.pattern), rows)
    scaled = levels if fit.offset is None else levels + fit.offset[:, None]
    assert torch.equal(scaled * fit.scale[:, None] if entry.has_scale else scaled, decoded.T)
    expected = entry.error(chunk, energy)
    assert expected.shape == (rows,)
    assert (expected >= 0).all()


def test_more_bits_mean_less_error() -> None:
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn(64, 16, generator=generator)
    energy = torch.ones(16)
    for treatment in ("scalar", "trellis"):
        errors = []
        for name in menu(treatment):
            entry = actions(WINDOW)[name]
            coded = entry.encode(chunk.T.clone().contiguous(), entry.fit(chunk, energy), torch.ones(64), torch.eye(16))
            errors.append(float((coded.decoded - chunk.T).square().mean()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-6


@pytest.mark.parametrize("name", ["scalar-2", "trellis-2"])
def test_errors_are_fed_back(name: str) -> None:
    """With correlated inputs the output error is smaller than that of rounding alone, and `errors` explain the rest."""
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn(64, 16, generator=generator)
    inputs = torch.randn(200, 16, generator=generator) + 2 * torch.randn(200, 1, generator=generator)
    covariance = inputs.T @ inputs / 200
    feedback = torch.linalg.cholesky(torch.linalg.inv(covariance + 0.01 * torch.eye(16)), upper=True)
    entry = actions(WINDOW)[name]
    fit = entry.fit(chunk, covariance.diagonal())
    results = []
    for factor in (feedback, torch.eye(16)):
        work = chunk.T.clone().contiguous()
        coded = entry.encode(work, fit, torch.ones(64), factor)
        error = (coded.decoded.T - chunk) @ covariance @ (coded.decoded.T - chunk).T
        results.append(float(error.trace()))
        # w - q of the original weights is U^T e: every column took what the columns before it left over
        torch.testing.assert_close(chunk.T - coded.decoded, factor.T @ coded.errors, rtol=1e-3, atol=1e-4)
    assert results[0] < 0.7 * results[1]


@pytest.mark.parametrize("width", [1, 2, 3, 47, 64, 100])
def test_rotations_are_orthogonal(width: int) -> None:
    assert sum(blocks(width)) == width
    matrix = rotation(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), rtol=0, atol=1e-5)
    assert torch.equal(matrix, rotation(width))


def test_signs_and_table_are_part_of_the_format() -> None:
    """Every reader draws the same ones, whatever the global seed is."""
    torch.manual_seed(5)
    rotation.cache_clear()
    table.cache_clear()
    assert (rotation(8)[:, 0] * 8**0.5).round().int().tolist() == [1, -1, 1, -1, -1, -1, -1, 1]
    expected = [-1.3714, -0.8079, -0.4185, -1.0509, -0.6026, 0.0816, -0.2468, 0.2468]
    assert table(4)[:8].tolist() == pytest.approx(expected, abs=1e-4)
