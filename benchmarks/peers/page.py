"""The table in docs/peers.md and the picture beside it.

python -m benchmarks.peers.page benchmarks/peers/results.json --ours benchmarks/peers/ours.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.row import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN = "<!-- The table is made by benchmarks/peers/page.py: do not edit it. -->"
END = "<!-- End of the table. -->"
WORST = 1000.0  # perplexity at which the picture ends


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="rows of the peers")
    parser.add_argument("--ours", type=Path, required=True, help="our rows")
    parser.add_argument("--page", type=Path, default=Path("docs/peers.md"), help="has the markers of the table")
    parser.add_argument("--picture", type=Path, default=Path("docs/peers.png"))
    given = parser.parse_args(arguments)
    peers, ours = json.loads(given.results.read_text()), json.loads(given.ours.read_text())
    before, begin, rest = given.page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: {given.page} lacks the line {END if begin else BEGIN}")
    given.page.write_text(f"{before}{BEGIN}\n\n{table([*ours, *peers])}\n\n{END}{after}", encoding="utf-8")
    figure(peers, ours).savefig(given.picture, dpi=110)


def table(rows: Sequence[Row]) -> str:
    """Markdown: the rows with figures by their bits, then those without and the reason."""
    measured = sorted((row for row in rows if row.get("perplexity")), key=lambda row: (row["bits"], row["perplexity"]))
    lines = [
        "| method | recipe | effective bits | articles | WikiText-2 | accuracy | seconds | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        name = f"**{row['peer']}**" if row["peer"] == "windquant" else row["peer"]
        recipe = ", ".join(filter(None, [row["recipe"], row.get("note")]))
        lines.append(
            f"| {name} | {recipe} | {row['bits']:.3f} | {perplexity(row['perplexity'])} "
            f"| {perplexity(row.get('wikitext2'))} | {accuracy(row)} | {seconds(row)} | {memory(row)} |"
        )
    for row in rows:
        if not row.get("perplexity"):
            recipe = ", ".join(filter(None, [row["recipe"], row.get("note")]))
            lines.append(f"| {row['peer']} | {recipe} | {row['reason']} | | | | | |")
    return "\n".join(lines)


def perplexity(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def accuracy(row: Row) -> str:
    return f"{row['accuracy']:.1%}" if row.get("accuracy") is not None else ""


def seconds(row: Row) -> str:
    return f"{row['seconds']:.0f}" if row.get("seconds") is not None else ""


def memory(row: Row) -> str:
    return f"{row['peak_memory_bytes'] / 1e9:.1f} GB" if row.get("peak_memory_bytes") else ""


def figure(peers: Sequence[Row], ours: Sequence[Row]) -> "Figure":
    """Perplexity against effective bits; what lies above `WORST` stands at the upper edge."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    made = Figure(figsize=(8.5, 5))
    made.set_layout_engine("constrained")
    axis = made.subplots()
    names = list(dict.fromkeys(row["peer"] for row in peers if row.get("perplexity")))
    for index, name in enumerate(names):
        rows = [row for row in peers if row["peer"] == name and row.get("perplexity")]
        axis.scatter(
            [row["bits"] for row in rows],
            [min(row["perplexity"], WORST) for row in rows],
            marker="os^Dvp<>hX"[index % 10],
            color=colormaps["viridis"](index / max(len(names) - 1, 1)),
            label=name,
        )
    for text, filled in (("before recovery", False), ("recovered", True)):
        rows = [row for row in ours if row["recipe"].endswith(text)]
        axis.plot(
            [row["bits"] for row in rows],
            [row["perplexity"] for row in rows],
            marker="*",
            markersize=15,
            color="black",
            markerfacecolor="black" if filled else "white",
            linestyle="-" if filled else ":",
            label=f"windquant, {text}",
        )
    original = next(row["perplexity"] for row in ours if row["peer"] == "original")
    axis.axhline(original, color="grey", linestyle="--", label=f"original, {original:.2f}")
    axis.set_yscale("log")
    ticks = [20, 30, 50, 100, 200, 500, WORST]
    axis.set_yticks(ticks, [*map(str, ticks[:-1]), f"{WORST:g} or more"], minor=False)
    axis.minorticks_off()
    axis.set_xlabel("effective bits per weight, all metadata included")
    axis.set_ylabel("perplexity, held-out articles")
    axis.grid(alpha=0.3)
    made.legend(fontsize=8, frameon=False, loc="outside right upper")
    return made


if __name__ == "__main__":
    main()
