"""What is in a packed checkpoint, as tables.

python -m windquant inspect data/checkpoints/smollm2-135m_2.0bits.ppo/quantized
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from windquant.checkpoint.card import shares
from windquant.checkpoint.files import check_plan, measure, read_config
from windquant.header import weight_files
from windquant.packed import Layout
from windquant.plan import Plan


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m windquant inspect", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    print(report(parser.parse_args(arguments).checkpoint))


def report(folder: Path) -> str:
    """Size, effective bits, actions and the plan by layer and kind. Reads headers only; WindquantError as `read`."""
    measured = measure(folder)
    _, layouts = read_config(folder)
    size = sum(file.stat().st_size for file in weight_files(folder))
    form = next(iter(layouts.values())).format
    lines = [
        f"checkpoint      {folder}",
        f"size            {size:,} bytes, {measured.measured_bytes:,} of them for {len(layouts)} quantized linears",
        f"effective bits  {measured.effective_bits:.4f} over {measured.weights:,} weights",
        f"checkpoint bits {measured.checkpoint_bits:.4f} over all parameters",
        f"format          chunks of {form.chunk}, {form.protected:.1%} protected, trellis window {form.window}",
    ]
    path = folder / "plan.json"
    if path.is_file():  # save_pretrained leaves it out
        plan = Plan.load(path)
        check_plan(layouts, plan, path)
        layouts = {name: layouts[name] for name in plan.actions}  # in model order
        fallback = ", the fallback of a plan that could not be used" if plan.fallback else ""
        lines.append(
            f"plan            {plan.model} by {plan.allocator}, target {plan.target_bits:g} bits, "
            f"seed {plan.seed}{fallback}"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Effective bits by layer and kind",
            by_layer(layouts),
            "",
            "Share of the weights by kind and action",
            by_kind(layouts),
        ]
    )


def bits(layouts: Iterable[Layout]) -> str:
    """Effective bits of some linears together."""
    found = list(layouts)
    weights = sum(layout.linear.weights for layout in found)
    return f"{8 * sum(layout.bytes() for layout in found) / weights:.2f}" if found else ""


def by_layer(layouts: Mapping[str, Layout]) -> str:
    """A row per decoder layer, a column per kind of linear."""
    found = list(layouts.values())
    kinds = list(dict.fromkeys(layout.linear.kind for layout in found))
    rows = []
    for layer in sorted({layout.linear.layer for layout in found}):
        here = [layout for layout in found if layout.linear.layer == layer]
        cells = [bits(layout for layout in here if layout.linear.kind == kind) for kind in kinds]
        rows.append([str(layer), *cells, bits(here)])
    means = [bits(layout for layout in found if layout.linear.kind == kind) for kind in kinds]
    return table([["layer", *kinds, "all"], *rows, ["all", *means, bits(found)]])


def by_kind(layouts: Mapping[str, Layout]) -> str:
    """A row per kind of linear, a column per action."""
    names = list(shares(layouts))
    groups: dict[str, dict[str, Layout]] = {}
    for name, layout in layouts.items():
        groups.setdefault(layout.linear.kind, {})[name] = layout
    groups["all"] = dict(layouts)
    rows = []
    for kind, members in groups.items():
        found = shares(members)
        rows.append([kind, *(f"{found[name]:.1%}" if name in found else "" for name in names)])
    return table([["kind", *names], *rows])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
