"""Pictures for people. Colours differ in lightness too, so that they also work in grey and for the colour-blind."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from windquant.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKIPPED = 16.0  # bits of an action that keeps the original precision
Cell = tuple[int, str]  # layer, kind of linear


def save_plan(plan: Plan, path: Path) -> None:
    """The plan as a PNG: a row per layer, a block per kind of linear, a cell per chunk, its colour the width."""
    plan_figure(plan).savefig(path, dpi=110)


def plan_figure(plan: Plan) -> "Figure":
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells = widths(plan)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    layers = sorted({layer for layer, _ in cells})
    levels = sorted({value for rows in cells.values() for row in rows for value in row})
    colours = [colormaps["viridis"](index / max(len(levels) - 1, 1)) for index in range(len(levels))]
    norm = BoundaryNorm(np.arange(len(levels) + 1) - 0.5, len(levels))

    blocks = {kind: block([cells.get((layer, kind), []) for layer in layers]) for kind in kinds}
    columns = [blocks[kind].shape[1] for kind in kinds]
    figure = Figure(figsize=(max(6.0, min(16.0, 1.5 + sum(columns) / 7)), max(2.6, min(10.0, 1.8 + 0.2 * len(layers)))))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False, width_ratios=columns)[0]
    for kind, axis in zip(kinds, axes, strict=True):
        index = np.searchsorted(levels, blocks[kind]).astype(float)
        index[np.isnan(blocks[kind])] = np.nan
        height = len(layers)
        axis.imshow(
            index,
            cmap=ListedColormap(colours),
            norm=norm,
            aspect="auto",
            interpolation="nearest",
            extent=(0, index.shape[1], height - 0.5, -0.5),
        )
        axis.set_title(kind, fontsize=9)
        axis.set_xticks([0, index.shape[1]])
        axis.tick_params(labelsize=7, labelleft=axis is axes[0], left=axis is axes[0])
        places = range(0, height, max(1, height // 10))
        axis.set_yticks(list(places), [str(layers[place]) for place in places])
    axes[0].set_ylabel("layer")
    order = "the most salient on the left" if plan.units.order == "saliency" else "in natural order"
    share = f"{plan.effective_bits:.4f} of {plan.target_bits:g} bits per weight ({plan.allocator})"
    figure.suptitle(f"{plan.model}: {share}\na cell per column chunk, {order}", fontsize=10)
    every = [value for rows in cells.values() for row in rows for value in row]
    patches = [
        Patch(color=colour, label=f"{label(level)} ({every.count(level) / len(every):.1%} of the chunks)")
        for level, colour in zip(levels, colours, strict=True)
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(len(patches), int(figure.get_figwidth() / 2.2)),
        fontsize=8,
        frameon=False,
    )
    return figure


def widths(plan: Plan) -> dict[Cell, list[list[float]]]:
    """Bits per chunk of every linear, by layer and kind; several rows where a layer has several of a kind (experts)."""
    cells: dict[Cell, list[list[float]]] = {}
    for name, actions in plan.actions.items():
        layer = re.search(r"\.(\d+)\.", name)
        cell = int(layer[1]) if layer else 0, name.rpartition(".")[2]
        cells.setdefault(cell, []).append([bits(action) for action in actions])
    return cells


def block(rows: list[list[list[float]]]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """float64 [layers * rows per layer, chunks], NaN where a layer has no such linear or chunk."""
    count = max(map(len, rows))
    width = max(len(row) for layer in rows for row in layer)
    result = np.full((len(rows) * count, width), np.nan)
    for place, layer in enumerate(rows):
        for index, row in enumerate(layer):
            result[place * count + index, : len(row)] = row
    return result


def bits(action: str) -> float:
    """1.5 of "trellis-1.5"; 16 of "skip"."""
    _, found, number = action.rpartition("-")
    return float(number) if found else SKIPPED


def label(level: float) -> str:
    return "original" if level == SKIPPED else f"{level:g} bit" + ("s" if level > 1 else "")
