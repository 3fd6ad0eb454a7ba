"""SVG pictures: scales, ticks, and the picture of a plan."""

import math
import subprocess
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from windquant.plan import Plan
from windquant.report import figure, plan_picture, svg
from windquant.report.plan_picture import WIDTHS

SVG = "{http://www.w3.org/2000/svg}"


def plan(**actions: list[str]) -> Plan:
    names = {name.replace("__", "."): value for name, value in actions.items()}
    return Plan("m<1>", "ppo", 2.0, 1.99, 100, 400, 0, names, 0.5)


SOME = plan(
    model__layers__0__q_proj=["trellis-1", "trellis-1"],
    model__layers__0__down=["trellis-4"] * 3,
    model__layers__7__q_proj=["trellis-1", "trellis-2"],
    model__layers__7__down=["skip"] * 2,
)


def test_cells_by_layer_and_kind() -> None:
    values = {"model.layers.11.experts.0.up": [1.0], "model.layers.11.experts.1.up": [2.0], "lm_head": [3.0]}
    assert plan_picture.cells(values) == {(11, "up"): [[1.0], [2.0]], (0, "lm_head"): [[3.0]]}
    assert [plan_picture.bits(name) for name in ("trellis-1.5", "scalar-8", "skip")] == [1.5, 8.0, 16.0]


def test_a_plan_is_drawn_cell_by_cell() -> None:
    root = ElementTree.fromstring(plan_picture.draw(SOME))
    areas: dict[str, float] = {}
    for path in root.iter(f"{SVG}path"):
        if (colour := path.get("fill")) is not None:
            for rectangle in path.attrib["d"].split("M")[1:]:
                size = rectangle.partition("h")[2].split("v")
                breadth, height = float(size[0]), float(size[1].partition("h")[0])
                areas[colour] = areas.get(colour, 0.0) + breadth * height
    one = areas[WIDTHS[2.0]]
    cells = {width: areas[WIDTHS[width]] / one for width in (1.0, 2.0, 4.0, 16.0)}
    assert cells == pytest.approx({1.0: 3, 2.0: 1, 4.0: 3, 16.0: 2}, rel=0.01)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"1 bit · 33.3%", "2 bits · 11.1%", "4 bits · 33.3%", "original · 22.2%", "0", "7", "q", "down"} <= set(
        texts
    )


def test_energies_stand_beside_the_widths() -> None:
    energy = {name: [10.0**place for place in range(len(row))] for name, row in SOME.actions.items()}
    alone, both = (ElementTree.fromstring(plan_picture.draw(SOME, given)) for given in (None, energy))
    hints = [[title.text for title in root.iter(f"{SVG}title")][1:] for root in (alone, both)]
    assert hints[0][0] == "layer 0, q_proj: 2 × 1 bit"
    assert hints[1][4] == "layer 0, q_proj: energy 1 to 10"
    assert len(hints[1]) == 2 * len(hints[0]) == 8


def test_a_file_has_its_colours_and_the_same_bytes_again() -> None:
    files = [svg.standalone(plan_picture.draw(SOME), plan_picture.PAPER) for _ in range(2)]
    assert files[0] == files[1]
    root = ElementTree.fromstring(files[0].encode())
    style = next(root.iter(f"{SVG}style")).text or ""
    assert "prefers-color-scheme: dark" in style
    described = root.attrib["aria-labelledby"].split()
    found = {node.get("id"): node.text for node in root}
    assert found[described[0]] == "Plan of m<1>: 1.9900 of 2 bits per weight, by ppo"
    assert (found[described[1]] or "").startswith("Share of the 9 chunks: 1 bit 33.3%")


def luminance(colour: str) -> float:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_widths_and_energies_get_lighter_with_their_value() -> None:
    """So they can be told apart in grey, and by people who do not see colours."""
    for colours in ([WIDTHS[width] for width in sorted(WIDTHS) if width < 16], plan_picture.ENERGIES):
        lightness = [luminance(colour) for colour in colours]
        assert all(later > 1.1 * former for former, later in pairwise(lightness))


def test_ticks_are_round_and_inside() -> None:
    assert svg.nice_ticks(0.53, 0.88) == [0.6, 0.7, 0.8]
    assert svg.nice_ticks(-0.05, 0.01) == [-0.04, -0.02, 0.0]
    assert svg.nice_ticks(3, 3) == [3]
    assert svg.log_ticks(15, 60) == [15, 20, 30, 40, 50]
    for low, high in ((1.2, 1.3), (15.0, 60.0), (0.001, 900.0)):
        ticks = svg.log_ticks(low, high)
        assert len(ticks) >= 2
        assert all(low <= tick <= high * 1.001 for tick in ticks)


def test_scales_map_ends_to_ends() -> None:
    scale = svg.Scale(1, 100, 300, 0, log=True)
    assert [scale(1), scale(10), scale(100)] == pytest.approx([300, 150, 0])
    low, high = svg.extent([2.0], least=1.0)
    assert (low, high) == pytest.approx((1.5, 2.5))
    assert svg.extent([math.inf, 3.0, 4.0])[1] < 5


def test_commands_for_many_results_are_short_and_mean_the_same() -> None:
    names = [f"results/m_{bits}bits{baseline}.json" for bits in ("2.0", "2.5") for baseline in ("", ".greedy")]
    command = figure.make(*names)
    assert command == "snakemake --cores all results/m_{2.0bits,2.0bits.greedy,2.5bits,2.5bits.greedy}.json"
    expanded = subprocess.run(["bash", "-c", command.replace("snakemake", "echo")], capture_output=True, text=True)
    assert expanded.stdout.split()[2:] == names
    assert figure.make("a.json", "b.json", "a.json") == "snakemake --cores all a.json b.json"
