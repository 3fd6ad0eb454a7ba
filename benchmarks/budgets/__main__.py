"""What one search for all budgets is worth: loss gaps of its plans, of searches for one budget each, and of baselines.

    python -m benchmarks.budgets --kind shared --output shared.json       # 4 minutes on two cores
    python -m benchmarks.budgets --kind alone --output alone.json         # a search per budget: 10 minutes
    python -m benchmarks.budgets --kind alone --budgets 2.0 --output alone2.json
    python -m benchmarks.budgets --show shared.json alone.json            # the table
    python -m benchmarks.budgets --kind transferred --model gemma3-270m --policy SEARCH.safetensors

Kinds: `shared` (one search), `alone`, `layer` (one search that decides layer by layer), `evolution` (per budget),
`transferred` (another model's policy as it is), `started` (one search that begins with another model's policy). The
plans are those of the allocators themselves, before any comparison with the Lagrangian plan, whose losses stand beside.
Losses are those of the stand-in (`windquant/measure.py`): under the noise that the search saw, and under another draw.
It reads what the workflow has left in data/ and resources/ of a model.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from windquant.allocation import evolution, lagrangian, layers, ppo
from windquant.allocation.budget import Choice
from windquant.allocation.learned import Learned
from windquant.allocation.settings import MeasureSettings, SearchSettings
from windquant.allocation.trials import Measure
from windquant.bank import Bank
from windquant.measure import LossMeter

BUDGETS = (1.75, 2.0, 2.25, 2.5, 3.0, 4.0)
RANGE = (1.5, 4.0)


def searched(bank: Bank, options: argparse.Namespace, targets: tuple[float, ...], measure: Measure) -> Learned:
    by_layer = options.kind == "layer"
    settings = SearchSettings(
        targets=targets,
        evaluations=options.evaluations,
        episodes=options.episodes,
        per="layer" if by_layer else "chunk",
    )
    subject = layers.merged(bank) if by_layer else bank
    start = Learned.load(options.policy) if options.policy else None
    if start:
        start.check(bank, settings.per, transfer=True)

    def loss(choice: Choice) -> float:
        return measure(layers.spread(bank, choice) if by_layer else choice)

    found = ppo.search(subject, options.seed, settings, loss, start=start)
    return dataclasses.replace(found, bank=bank.sha256)


def plans(bank: Bank, options: argparse.Namespace, measure: Measure) -> dict[float, Choice]:
    """The plan of every budget."""
    if options.kind == "evolution":
        settings = MeasureSettings(evaluations=options.evaluations)
        return {
            bits: min(
                evolution.search(bank, bits, options.seed, settings, measure), key=lambda trial: trial.loss
            ).choice
            for bits in options.budgets
        }
    if options.kind == "alone":
        return {bits: searched(bank, options, (bits,), measure).plan(bank, bits) for bits in options.budgets}
    if options.kind == "transferred":
        found = Learned.load(options.policy)
        found.check(bank, transfer=True)
    else:
        found = searched(bank, options, RANGE, measure)
    return {bits: found.plan(bank, bits) for bits in options.budgets}


def run(options: argparse.Namespace) -> dict[str, Any]:
    data, name = options.root / "data", options.model
    bank = Bank.load(data / "bank" / f"{name}.safetensors")
    inputs = (
        options.root / "resources" / "models" / name,
        data / "calibration" / name,
        data / "statistics" / f"{name}.safetensors",
        bank,
    )
    seen, other = LossMeter(*inputs), LossMeter(*inputs, seed=options.seed + 1)
    known: dict[bytes, float] = {}  # several searches measure the same Lagrangian plans

    def measure(choice: Choice) -> float:
        if (key := choice.tobytes()) not in known:
            known[key] = seen.loss_gap(choice)
        return known[key]

    torch.manual_seed(options.seed)
    start = time.monotonic()
    made = plans(bank, options, measure)
    seconds, count = time.monotonic() - start, len(known)
    rows = []
    for bits, choice in made.items():
        baseline = lagrangian.allocate(bank, bits)
        values = {
            kind: {"predicted": bank.predicted_loss(plan), "seen": measure(plan), "other": other.loss_gap(plan)}
            for kind, plan in (("plan", choice), ("lagrangian", baseline))
        }
        rows.append({"target": bits, "bits": bank.effective_bits(choice), **values})
    kept = ("kind", "model", "seed", "evaluations", "episodes")
    return {name: getattr(options, name) for name in kept} | {"seconds": seconds, "measured": count, "rows": rows}


def table(found: list[dict[str, Any]]) -> str:
    """Losses relative to those of the Lagrangian plan of the same budget."""
    head = "| target | " + " | ".join(f"{e['kind']}, seed {e['seed']}, {e['measured']} measured" for e in found) + " |"
    lines = [head, "|---" * (len(found) + 1) + "|"]
    rows = [{row["target"]: row for row in entry["rows"]} for entry in found]
    for target in sorted({target for some in rows for target in some}):
        cells = []
        for some in rows:
            if (row := some.get(target)) is None:
                cells.append("")
                continue
            change = [f"{row['plan'][k] / row['lagrangian'][k] - 1:+.1%}" for k in ("predicted", "seen", "other")]
            cells.append(f"{row['plan']['seen']:.4f} ({', '.join(change)})")
        lines.append(f"| {target:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "In brackets, against the Lagrangian plan: predicted, measured, other noise."])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = ("shared", "alone", "layer", "evolution", "transferred", "started")
    parser.add_argument("--kind", choices=kinds, default="shared")
    parser.add_argument("--policy", type=Path, help="of another model; kinds transferred and started")
    parser.add_argument("--root", type=Path, default=Path(), help="folder with data/ and resources/")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, metavar="BITS")
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, nargs="+", metavar="JSON", help="a table of what was measured before")
    options = parser.parse_args()
    if options.show:
        print(table([json.loads(path.read_text()) for path in options.show]))
        return
    if (options.kind in ("transferred", "started")) != (options.policy is not None):
        parser.error("--policy goes with --kind transferred or started")
    torch.set_num_threads(options.threads)
    found = run(options)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table([found]))


if __name__ == "__main__":
    main()
