"""The picture of a plan."""

from pathlib import Path

import numpy as np

from windquant import pictures
from windquant.plan import Plan


def plan(**actions: list[str]) -> Plan:
    names = {name.replace("__", "."): value for name, value in actions.items()}
    return Plan("m", "ppo", 2.0, 1.99, 100, 400, 0, names, 0.5)


def test_widths_by_layer_and_kind() -> None:
    some = plan(
        model__layers__0__attn__q=["trellis-1.5", "skip"],
        model__layers__11__attn__q=["trellis-1.5", "scalar-8"],
        model__layers__11__experts__0__up=["trellis-1"],
        model__layers__11__experts__1__up=["trellis-2"],
    )
    cells = pictures.widths(some)
    assert cells == {(0, "q"): [[1.5, 16.0]], (11, "q"): [[1.5, 8.0]], (11, "up"): [[1.0], [2.0]]}
    experts = pictures.block([cells.get((layer, "up"), []) for layer in (0, 11)])
    assert np.array_equal(experts, [[np.nan], [np.nan], [1.0], [2.0]], equal_nan=True)


def test_figure_shows_every_kind_and_width(tmp_path: Path) -> None:
    some = plan(
        model__layers__0__q=["trellis-1", "trellis-2"],
        model__layers__0__down=["trellis-4"] * 3,
        model__layers__1__q=["trellis-1", "trellis-1"],
        model__layers__1__down=["trellis-4"] * 2,
    )
    figure = pictures.plan_figure(some)
    assert [axis.get_title() for axis in figure.axes] == ["q", "down"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["1 bit (33.3% of the chunks)", "2 bits (11.1% of the chunks)", "4 bits (55.6% of the chunks)"]
    image = figure.axes[0].images[0].get_array()
    assert image is not None
    assert image.tolist() == [[0, 1], [0, 0]]
    pictures.save_plan(some, tmp_path / "a.png")
    pictures.save_plan(some, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert 2_000 < (tmp_path / "a.png").stat().st_size < 100_000
