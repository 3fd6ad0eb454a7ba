"""A result as a short table, and how to look at it in MLflow.

python -m windquant.summary results/smollm2-135m_2.0bits.json
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from windquant import result_file, tracking_store
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.progress import duration

MEGABYTE = 1e6


def rows(entry: Mapping[str, Any], sizes: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """(what, original, quantized) of one result; `sizes` in bytes, from the notes of its manifest."""
    table = []
    for dataset, values in entry["perplexity"].items():
        table += [
            (f"perplexity, {dataset}", f"{values['original']:.2f}", f"{values['quantized']:.2f}"),
            ("  before recovery", "", f"{values['before_recovery']:.2f}"),
        ]
    for task, values in entry["zero_shot"].items():
        quantized = f"{values['quantized']:.1%} ± {values['stderr']:.1%}"
        table.append((f"accuracy, {task}", f"{values['original']:.1%}", quantized))
    average = entry["zero_shot_average"]
    if len(entry["zero_shot"]) > 1:
        table.append(("accuracy, average", f"{average['original']:.1%}", f"{average['quantized']:.1%}"))
    table += [
        ("effective bits per weight", "16", f"{entry['effective_bits']:.4f}"),
        ("checkpoint bits per parameter", "16", f"{entry['checkpoint_bits']:.4f}"),
    ]
    if sizes:
        original, quantized = (
            f"{sizes[key] / MEGABYTE:,.1f} MB" for key in ("original_fp16_bytes", "checkpoint_bytes")
        )
        table.append(("checkpoint size (original: FP16)", original, quantized))
    return table


def times(entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(step, minutes:seconds, peak memory) of every step and the sum."""
    memory = entry["peak_memory_bytes"]
    table = [
        (step, duration(seconds), f"{max(memory[step].values()) / 1e9:.1f} GB")
        for step, seconds in entry["seconds"].items()
    ]
    peak = max(max(values.values()) for values in memory.values())
    return [*table, ("sum", duration(sum(entry["seconds"].values())), f"{peak / 1e9:.1f} GB")]


def interface() -> str:
    """The command that opens the MLflow UI of the store in use; without a password, for logs keep it."""
    uri = os.environ.get(tracking_store.URI) or tracking_store.LOCAL
    public = tracking_store.without_password(uri)
    if uri.startswith("http"):
        return f"open {public} in a browser"
    command = Path(sys.prefix) / "bin" / "mlflow"
    shown = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else "mlflow"
    given = uri if uri == public else '"$MLFLOW_TRACKING_URI"'
    return f"{shown} ui --backend-store-uri {given}"


def show(path: Path) -> None:
    """Print one result; WindquantError if the file is none."""
    from rich.console import Console
    from rich.table import Table

    entry = result_file.load(path)
    notes = Manifest.load(path).notes if manifest_path(path).exists() else {}
    console = Console()
    by = entry["allocator"]
    if entry["fallback"] or notes.get("chosen") == "lagrangian":
        by += f" (the Lagrangian plan: {notes.get('reason', 'the learned one could not be used')})"
    quality = Table("", "original", "quantized", title=f"{entry['model']}, {entry['target_bits']} bits, {by}")
    cost = Table("step", "minutes", "peak memory")
    for table, lines in ((quality, rows(entry, notes)), (cost, times(entry))):
        for column in table.columns[1:]:
            column.justify = "right"
        for line in lines:
            table.add_row(*line)
        table.rows[-1].end_section = True
        console.print(table)
    console.print(f"{path} has it all. All runs: {interface()}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m windquant.summary", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="result JSON files")
    try:
        for path in parser.parse_args(argv).results:
            show(path)
    except WindquantError as error:
        print("error:", error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
