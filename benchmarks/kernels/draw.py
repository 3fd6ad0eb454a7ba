"""Draw the results of `python -m benchmarks.kernels`: speed over cuBLAS BF16, and share of the copy bandwidth.

python -m benchmarks.kernels.draw benchmarks/kernels/h200.json docs/kernels.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

BASELINE = "cuBLAS BF16"


def table(result: dict[str, Any], batch: int) -> dict[str, dict[str, dict[str, Any]]]:
    """The measured rows of one batch, by kernel and shape."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["products"]:
        if row.get("batch") == batch:
            found.setdefault(row["what"], {})[row["shape"]] = row
    return found


def draw(result: dict[str, Any], output: Path) -> None:
    batches = sorted({row["batch"] for row in result["products"] if "batch" in row})
    figure, axes = pyplot.subplots(len(batches) + 1, 1, figsize=(11, 3 * (len(batches) + 1)), layout="constrained")
    for axis, batch in zip(axes, batches, strict=False):
        found = table(result, batch)
        baseline = found.pop(BASELINE, {})
        for what, rows in found.items():
            shapes = [shape for shape in rows if shape in baseline]
            axis.plot(
                shapes, [baseline[shape]["seconds"] / rows[shape]["seconds"] for shape in shapes], "o-", label=what
            )
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set_ylabel(f"x {BASELINE}, batch {batch}")
        axis.tick_params(axis="x", rotation=15)
    for what, rows in table(result, batches[0]).items():
        if any("share_of_copy" in row for row in rows.values()):
            axes[-1].plot(list(rows), [100 * row["share_of_copy"] for row in rows.values()], "o-", label=what)
    axes[-1].set_ylabel(f"% of copy bandwidth, batch {batches[0]}")
    axes[-1].tick_params(axis="x", rotation=15)
    axes[0].legend(fontsize=7, ncols=3)
    figure.suptitle(f"{result['device']}, torch {result['torch']}, triton {result['triton']}", fontsize=9)
    figure.savefig(output)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
