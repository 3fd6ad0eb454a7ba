"""What `benchmarks.budgets` has measured, side by side: a table, and a picture.

python -m benchmarks.budgets.table shared.json cold.json --picture docs/search.svg
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Entry = dict[str, Any]
LOSSES = ("predicted", "seen", "other")


def title(entry: Entry) -> str:
    return f"{entry['change'] or entry['kind']}, seed {entry['seed']}, {entry['measured']} measured"


def change(row: dict[str, Any], loss: str) -> float:
    """Logarithm of a plan's loss over that of the Lagrangian plan of the same budget."""
    return math.log(row["plan"][loss] / row["lagrangian"][loss])


def mean(entry: Entry, loss: str) -> float:
    """Over the budgets, as a ratio less one."""
    return math.expm1(sum(change(row, loss) for row in entry["rows"]) / len(entry["rows"]))


def table(entries: Sequence[Entry]) -> str:
    """Markdown: a column per entry, a row per budget."""
    lines = [f"| target | {' | '.join(map(title, entries))} |", "|---" * (len(entries) + 1) + "|"]
    rows = [{row["target"]: row for row in entry["rows"]} for entry in entries]
    for target in sorted({target for some in rows for target in some}):
        cells = []
        for some in rows:
            if (row := some.get(target)) is None:
                cells.append("")
                continue
            changes = ", ".join(f"{math.expm1(change(row, loss)):+.1%}" for loss in LOSSES)
            cells.append(f"{row['plan']['seen']:.4f} ({changes})")
        lines.append(f"| {target:g} | {' | '.join(cells)} |")
    means = (", ".join(f"{mean(entry, loss):+.1%}" for loss in LOSSES) for entry in entries)
    lines.append(f"| mean | {' | '.join(means)} |")
    return "\n".join([*lines, "", "In brackets, against the Lagrangian plan: predicted, measured, other noise."])


def figure(entries: Sequence[Entry]) -> "Figure":
    """Plans against the Lagrangian ones under noise that no search saw: dots for the budgets, a bar for their mean."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    made = Figure(figsize=(8, 1.2 + 0.35 * len(entries)))
    made.set_layout_engine("constrained")
    axis = made.subplots()
    targets = sorted({row["target"] for entry in entries for row in entry["rows"]})
    for index, target in enumerate(targets):
        found = {
            place: 100 * math.expm1(change(row, "other"))
            for place, entry in enumerate(entries)
            for row in entry["rows"]
            if row["target"] == target
        }
        color = colormaps["viridis"](index / max(1, len(targets) - 1))
        axis.scatter(list(found.values()), list(found), color=color, s=28, label=f"{target:g} bits", zorder=2)
    for place, entry in enumerate(entries):
        axis.plot([100 * mean(entry, "other")] * 2, [place - 0.35, place + 0.35], color="black", linewidth=2)
    axis.axvline(0, color="grey", linestyle="--", linewidth=1)
    axis.set_xscale("symlog", linthresh=5)  # most are within a few percent, some far beyond
    ticks = [-20, -10, -5, -2, 0, 2, 5, 10, 20, 50, 100]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(entries)), [title(entry) for entry in entries])
    axis.invert_yaxis()
    axis.set_xlabel("loss against the Lagrangian plan's, percent (stand-in, unseen noise)")
    axis.grid(axis="x", alpha=0.3)
    made.legend(fontsize=8, frameon=False, loc="outside right upper")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--picture", type=Path, metavar="SVG")
    options = parser.parse_args()
    entries = [json.loads(path.read_text()) for path in options.measured]
    print(table(entries))
    if options.picture:
        figure(entries).savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
