"""The plan as a picture: a row per layer, a block per kind of linear, a cell per chunk, its colour the width.

    python -m windquant.report.plan_picture --plan PLAN.json --bank BANK.safetensors --output PLAN.svg

Beside it, if the bank is there, the same cells with the energy of their channels: what the widths follow.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from windquant.plan import Plan
from windquant.report.svg import element, picture, shown, standalone, text, title

if TYPE_CHECKING:
    from windquant.bank import Bank
    from windquant.step import Task

SKIPPED = 16.0  # bits of an action that keeps the original precision
#: From dark to light as viridis, so that they also work in grey; what keeps its precision stands out.
WIDTHS = {
    1.0: "#440154",
    1.5: "#3b528b",
    2.0: "#21918c",
    2.5: "#28ae80",
    3.0: "#5ec962",
    3.5: "#86d549",
    4.0: "#addc30",
    8.0: "#fde725",
    16.0: "#d55e00",
}
#: Low to high energy, a part of inferno.
ENERGIES = (
    "#1b0c41", "#390963", "#57106e", "#741a6e", "#932667", "#b1325a", "#cb4149", "#e15635", "#f1711f", "#f98e09",
    "#fbb014", "#f7d13d", "#fcffa4",
)  # fmt: skip
PAPER, LEFT, BETWEEN, TOP, GAP = 980.0, 36.0, 34.0, 44.0, 6.0  # units of the picture's width, and its parts
TALLEST = 760.0  # of the cells together

Cell = tuple[int, str]  # layer, kind of linear
Rows = dict[Cell, list[list[float]]]  # several rows where a layer has several linears of a kind (experts)


@dataclass(frozen=True)
class Settings:
    pass


def run(task: "Task", settings: Settings) -> None:
    from windquant.bank import Bank

    bank = Bank.load(task.inputs["bank"]) if "bank" in task.inputs else None
    plan = Plan.load(task.inputs["plan"])
    drawn = draw(plan, energies(bank) if bank else None)
    task.output.write_text(standalone(drawn, PAPER), encoding="utf-8")


def energies(bank: "Bank") -> dict[str, list[float]]:
    """E[x_j²] of every chunk's channels, by linear, in column order."""
    found: dict[str, list[float]] = {linear.name: [] for linear in bank.linears}
    for linear, energy in zip(bank.linear, bank.energy, strict=True):
        found[bank.linears[linear].name].append(float(energy))
    return found


def draw(plan: Plan, energy: Mapping[str, Sequence[float]] | None = None) -> str:
    """The picture; `energy` by linear name, a value per chunk."""
    widths = cells({name: [bits(action) for action in row] for name, row in plan.actions.items()})
    grid = Grid(widths, panels=2 if energy else 1)
    order = "the most salient on the left" if plan.units.order == "saliency" else "in natural order"
    parts = [
        grid.labels(),
        text(grid.start(0), 14, f"Width of every column chunk, {order}", "strong"),
        grid.cells(0, widths, width_colour),
    ]
    strengths: Rows = {}
    if energy:
        strengths = cells({name: energy[name] for name in plan.actions})
        levels = sorted(math.log10(value) for rows in strengths.values() for row in rows for value in row if value > 0)
        levels = levels[len(levels) // 100 : len(levels) - len(levels) // 100] or [
            0.0
        ]  # a few extremes would hide the rest
        low, high = levels[0], levels[-1]

        def colour(value: float) -> str:
            share = (math.log10(value) - low) / ((high - low) or 1.0) if value > 0 else 0.0
            return ENERGIES[min(max(int(share * len(ENERGIES)), 0), len(ENERGIES) - 1)]

        parts += [
            text(grid.start(1), 14, "Energy of its channels, E[x²]", "strong"),
            grid.cells(1, strengths, colour),
            energy_legend(grid.start(1), grid.bottom, low, high),
        ]
    parts += [
        grid.hints(panel, values, describe_cell)
        for panel, values, describe_cell in ((0, widths, count_widths), (1, strengths, span))
    ][: grid.panels]
    used = Counter(value for rows in widths.values() for row in rows for value in row)
    parts.append(width_legend(grid.start(0), grid.bottom, used, PAPER if grid.panels == 1 else grid.start(1) - BETWEEN))
    share = f"{plan.effective_bits:.4f} of {plan.target_bits:g} bits per weight, by {plan.allocator}"
    return picture(
        PAPER, grid.bottom + 62, *parts, name=f"Plan of {plan.model}: {share}", description=describe(widths, used)
    )  # fmt: skip


class Grid:
    """Where the cells are."""

    def __init__(self, widths: Rows, panels: int) -> None:
        self.panels = panels
        self.kinds = list(dict.fromkeys(kind for _, kind in widths))
        self.layers = sorted({layer for layer, _ in widths})
        self.columns = {
            kind: max(len(r) for (_, k), rs in widths.items() if k == kind for r in rs) for kind in self.kinds
        }
        self.rows = {
            layer: max(len(rows) for (number, _), rows in widths.items() if number == layer) for layer in self.layers
        }
        self.breadth = (PAPER - LEFT - (panels - 1) * BETWEEN) / panels
        self.cell = (self.breadth - GAP * (len(self.kinds) - 1)) / sum(self.columns.values())
        count = sum(self.rows.values())
        self.height = min(11.0, TALLEST / count)
        self.bottom = TOP + count * self.height

    def start(self, panel: int) -> float:
        return LEFT + panel * (self.breadth + BETWEEN)

    def x(self, panel: int, kind: str) -> float:
        """Left edge of a kind's block."""
        before = self.kinds[: self.kinds.index(kind)]
        return self.start(panel) + sum(self.columns[name] * self.cell + GAP for name in before)

    def y(self, layer: int) -> float:
        """Upper edge of a layer's first row."""
        return TOP + self.height * sum(self.rows[number] for number in self.layers if number < layer)

    def labels(self) -> str:
        parts = [text(LEFT - 8, TOP - 8, "layer", "soft small", "end")]
        every = math.ceil(len(self.layers) * 14 / (self.bottom - TOP)) if len(self.layers) > 12 else 1
        for layer in self.layers[::every]:
            parts.append(text(LEFT - 8, self.y(layer) + min(self.height, 11) - 1.5, str(layer), "soft small", "end"))
        for panel in range(self.panels):
            for kind in self.kinds:
                name, room = kind.removesuffix("_proj"), self.columns[kind] * self.cell
                size = min(11.0, max(6.0, room / (0.6 * len(name))))
                style = f"font-size: {shown(size)}px"
                parts.append(text(self.x(panel, kind) + room / 2, TOP - 8, name, "soft", "middle", style=style))
        return "".join(parts)

    def cells(self, panel: int, values: Rows, colour: Callable[[float], str]) -> str:
        """All cells of one colour are one path, and neighbours of one colour one rectangle: pictures stay small."""
        paths: dict[str, list[str]] = {}
        for (layer, kind), rows in values.items():
            left, top = self.x(panel, kind), self.y(layer)
            for number, row in enumerate(rows):
                start = 0
                colours = [colour(value) for value in row]
                for end in range(1, len(row) + 1):
                    if end == len(row) or colours[end] != colours[start]:
                        place = f"M{shown(left + start * self.cell)} {shown(top + number * self.height)}"
                        breadth = shown((end - start) * self.cell)
                        paths.setdefault(colours[start], []).append(
                            f"{place}h{breadth}v{shown(self.height)}h-{breadth}z"
                        )
                        start = end
        shapes = [element("path", d="".join(path), fill=name) for name, path in sorted(paths.items())]
        frames = "".join(
            f"M{shown(self.x(panel, kind))} {shown(TOP)}h{shown(size)}V{shown(self.bottom)}h-{shown(size)}z"
            for kind, size in ((kind, count * self.cell) for kind, count in self.columns.items())
        )
        return element("g", *shapes, element("path", d=frames, class_="frame"), shape_rendering="crispEdges")

    def hints(self, panel: int, values: Rows, say: Callable[[list[float]], str]) -> str:
        """What a pointer over a linear shows."""
        shapes = []
        for (layer, kind), rows in values.items():
            hint = f"layer {layer}, {kind}: {say([value for row in rows for value in row])}"
            x, y = self.x(panel, kind), self.y(layer)
            size = {"width": self.columns[kind] * self.cell, "height": len(rows) * self.height}
            shapes.append(element("rect", title(hint), x=x, y=y, class_="ghost", **size))
        return "".join(shapes)


def count_widths(values: list[float]) -> str:
    """E.g. "8 × 1 bit, 1 × 2 bits"."""
    return ", ".join(f"{count} × {label(value)}" for value, count in sorted(Counter(values).items()))


def span(values: list[float]) -> str:
    return f"energy {min(values):.2g} to {max(values):.2g}"


def width_legend(left: float, top: float, used: Mapping[float, int], right: float) -> str:
    """A square, the width and its share of the chunks, for every width in use."""
    total, parts = sum(used.values()), []
    x, y = left, top + 18.0
    for value in sorted(used):
        content = f"{label(value)} · {used[value] / total:.1%}"
        room = 22 + 6.4 * len(content)
        if x > left and x + room > right:
            x, y = left, y + 18
        colour = width_colour(value)
        parts.append(
            element("rect", x=x, y=y, width=12, height=12, fill=colour) + text(x + 17, y + 10.5, content, "small")
        )
        x += room
    return "".join([*parts, text(x, y + 10.5, "of the chunks", "soft small")])


def energy_legend(left: float, top: float, low: float, high: float) -> str:
    size = 17.0
    parts = [
        element("rect", x=left + index * size, y=top + 18, width=size, height=12, fill=colour)
        for index, colour in enumerate(ENERGIES)
    ]
    right = left + len(ENERGIES) * size
    parts.append(text(left, top + 45, f"≤ {10**low:.2g}", "soft small"))
    parts.append(text(right, top + 45, f"≥ {10**high:.2g}", "soft small", "end"))
    parts.append(text((left + right) / 2, top + 45, "logarithmic", "soft small", "middle"))
    return "".join(parts)


def cells(values: Mapping[str, Sequence[float]]) -> Rows:
    """Values per chunk of every linear, by layer and kind."""
    found: Rows = {}
    for name, row in values.items():
        layer = re.search(r"\.(\d+)\.", name)
        found.setdefault((int(layer[1]) if layer else 0, name.rpartition(".")[2]), []).append(list(row))
    return found


def describe(widths: Rows, used: Mapping[float, int]) -> str:
    """The plan in a sentence, for people who do not see it: shares, and the mean width of every kind."""
    total = sum(used.values())
    shares = ", ".join(f"{label(value)} {used[value] / total:.1%}" for value in sorted(used))
    kinds: dict[str, list[float]] = {}
    for (_, kind), rows in widths.items():
        kinds.setdefault(kind, []).extend(value for row in rows for value in row)
    means = ", ".join(f"{kind} {sum(values) / len(values):.2f}" for kind, values in kinds.items())
    return f"Share of the {total} chunks: {shares}. Mean width in bits by kind of linear: {means}."


def bits(action: str) -> float:
    """1.5 of "trellis-1.5"; 16 of "skip"."""
    _, found, number = action.rpartition("-")
    return float(number) if found else SKIPPED


def width_colour(width: float) -> str:
    """The colour of a width, or of the nearest that has one."""
    return WIDTHS[min(WIDTHS, key=lambda known: abs(known - width))]


def label(level: float) -> str:
    return "original" if level == SKIPPED else f"{level:g} bit" + ("s" if level > 1 else "")


if __name__ == "__main__":
    from windquant import step

    step.main("plan_picture", run, Settings, inputs=("plan", "bank?"), light=True)
