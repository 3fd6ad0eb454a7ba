"""The ablation of scalar quantizers: its first row is windquant's own quantizer, and the others differ as they say."""

from dataclasses import replace

import pytest
import torch

from benchmarks.scalars import Subject, loss, quantized, recipes
from windquant.feedback import column_order, quantize_linear
from windquant.packed import Format, Layout
from windquant.units import Linear

ROWS, COLUMNS = 96, 128


@pytest.fixture(scope="module")
def subject() -> Subject:
    """Correlated inputs of different energies; the judge's text is another draw of them."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=draw) / 8 + torch.eye(COLUMNS)
    mix *= torch.logspace(1, -1, COLUMNS)

    def covariance() -> torch.Tensor:
        x = torch.randn(2048, COLUMNS, generator=draw) @ mix
        return x.T @ x / len(x)

    linear = Linear("layers.0.v_proj", "v_proj", 0, "layers.0.q_proj", ROWS, COLUMNS)
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    return Subject(linear, weight, covariance(), covariance(), torch.rand(ROWS, generator=draw))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_first_row_is_what_windquant_does(subject: Subject, bits: int) -> None:
    layout = Layout(subject.linear, (f"scalar-{bits}",) * 2, Format(64, 0.0, 12, torch.float16))
    order = column_order(subject.seen.diagonal(), "saliency", 64, 0)
    _, expected = quantize_linear(subject.weight, order, subject.seen, layout, subject.fisher)
    decoded, size = quantized(subject, replace(recipes(bits)[0], chunk=64))
    assert torch.isclose(decoded, expected, atol=1e-5).float().mean() > 0.99  # a tie may fall to either side
    tables = 4 + 2  # the grid of the scales, an action per chunk
    assert size * ROWS * COLUMNS / 8 == layout.bytes() - tables


def test_every_part_pays_where_it_should(subject: Subject) -> None:
    found = {recipe.name: loss(subject, quantized(subject, replace(recipe, chunk=64))[0]) for recipe in recipes(2)}
    first = next(iter(found.values()))
    assert found["no error feedback"] > 1.5 * first
    assert found["smallest and largest weight"] > 1.2 * first
    assert found["scales and offsets in FP16"] == pytest.approx(first, rel=0.15)
    assert found["the 64 most salient columns in 8 bits"] < 0.9 * first


def test_a_second_bit_for_salient_columns_lowers_the_error(subject: Subject) -> None:
    without, with_it = (quantized(subject, recipe) for recipe in (recipes(1)[0], recipes(1)[-1]))
    assert loss(subject, with_it[0]) < loss(subject, without[0])
    assert with_it[1] > without[1] + 0.05
