"""What one search for all budgets is worth: loss gaps of its plans, of searches for one budget each, and of baselines.

    python -m benchmarks.budgets --kind shared --output shared.json       # 4 minutes on two cores
    python -m benchmarks.budgets --kind alone --output alone.json         # a search per budget: 10 minutes
    python -m benchmarks.budgets --kind alone --budgets 2.0 --output alone2.json
    python -m benchmarks.budgets.table shared.json alone.json
    python -m benchmarks.budgets --kind transferred --model gemma3-270m --policy SEARCH.safetensors
    python -m benchmarks.budgets --change cold --output cold.json         # a search as an ablation of the configuration

Kinds: `shared` (one search), `alone`, `layer` (one search that decides layer by layer), `evolution` (per budget),
`transferred` (another model's policy as it is), `started` (one search that begins with another model's policy). The
plans are those of the allocators themselves, before any comparison with the Lagrangian plan, whose losses stand beside.
Losses are those of the stand-in (`windquant/measure.py`): under the noise that the search saw, and under another draw.
It reads what the workflow has left in data/ and resources/ of a model. Losses once measured are kept in `--known`, as
most of the time goes into them.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.budgets.table import table
from windquant import atomic, configuration, naming, validation
from windquant.allocation import evolution, lagrangian, layers, ppo
from windquant.allocation.budget import Choice
from windquant.allocation.learned import Learned
from windquant.allocation.settings import SearchSettings
from windquant.allocation.trials import Measure
from windquant.bank import Bank
from windquant.measure import LossMeter
from windquant.settings import from_mapping

BUDGETS = (1.75, 2.0, 2.25, 2.5, 3.0, 4.0)


class Meter:
    """Measured losses under one draw of noise; the model is read once a loss is asked for that is not known."""

    def __init__(self, options: argparse.Namespace, bank: Bank, seed: int, known: dict[str, float]) -> None:
        data, name = options.root / "data", options.model
        model, texts = options.root / "resources" / "models" / name, data / "calibration" / name
        self.inputs = model, texts, data / "statistics" / f"{name}.safetensors", bank
        self.bank, self.seed, self.known, self.path = bank, seed, known, options.known
        self.asked: set[str] = set()

    def __call__(self, choice: Choice) -> float:
        key = hashlib.sha256(f"{self.bank.sha256} {self.seed}".encode() + choice.tobytes()).hexdigest()
        self.asked.add(key)
        if key not in self.known:
            self.known[key] = self.losses.loss_gap(choice)
            if self.path:
                atomic.write_text(self.path, json.dumps(self.known))
        return self.known[key]

    @functools.cached_property
    def losses(self) -> LossMeter:
        return LossMeter(*self.inputs, seed=self.seed)


def configured(options: argparse.Namespace) -> SearchSettings:
    """The settings of the search that the workflow would make for this model."""
    schema = configuration.load(options.root / "workflow" / "schemas" / "config.schema.yaml")
    config = validation.validate(configuration.load(options.root / "config" / "config.yaml"), schema)
    resolved = configuration.resolve(config, schema, options.model)
    if options.change:
        known = configuration.changes(config, schema, options.model)
        resolved = configuration.changed(resolved, known[naming.variant(f"ppo-{options.change}", known).change])
    found = from_mapping(SearchSettings, configuration.step_settings(resolved, "search"), "search")
    if options.evaluations is not None:
        found = dataclasses.replace(found, evaluations=options.evaluations)
    return dataclasses.replace(found, per="layer" if options.kind == "layer" else "chunk")


def searched(bank: Bank, options: argparse.Namespace, settings: SearchSettings, measure: Measure) -> Learned:
    by_layer = settings.per == "layer"
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
    settings = configured(options)
    if options.kind == "evolution":
        return {
            bits: min(
                evolution.search(bank, bits, options.seed, settings, measure), key=lambda trial: trial.loss
            ).choice
            for bits in options.budgets
        }
    if options.kind == "alone":
        single = {bits: dataclasses.replace(settings, targets=(bits,)) for bits in options.budgets}
        return {bits: searched(bank, options, single[bits], measure).plan(bank, bits) for bits in options.budgets}
    if options.kind == "transferred":
        found = Learned.load(options.policy)
        found.check(bank, transfer=True)
    else:
        found = searched(bank, options, settings, measure)
    return {bits: found.plan(bank, bits) for bits in options.budgets}


def run(options: argparse.Namespace) -> dict[str, Any]:
    bank = Bank.load(options.root / "data" / "bank" / f"{options.model}.safetensors")
    known = json.loads(options.known.read_text()) if options.known and options.known.exists() else {}
    seen, other = (Meter(options, bank, seed, known) for seed in (0, options.seed + 1))
    torch.manual_seed(options.seed)
    start = time.monotonic()
    made = plans(bank, options, seen)
    seconds, count = time.monotonic() - start, len(seen.asked)
    rows = []
    for bits, choice in made.items():
        baseline = lagrangian.allocate(bank, bits)
        values = {
            kind: {"predicted": bank.predicted_loss(plan), "seen": seen(plan), "other": other(plan)}
            for kind, plan in (("plan", choice), ("lagrangian", baseline))
        }
        rows.append({"target": bits, "bits": bank.effective_bits(choice), **values})
    kept = ("kind", "change", "model", "seed")
    return {name: getattr(options, name) for name in kept} | {"seconds": seconds, "measured": count, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = ("shared", "alone", "layer", "evolution", "transferred", "started")
    parser.add_argument("--kind", choices=kinds, default="shared")
    parser.add_argument("--policy", type=Path, help="of another model; kinds transferred and started")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the project")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, metavar="BITS")
    parser.add_argument("--evaluations", type=int, help="instead of the configuration's")
    parser.add_argument("--change", default="", help="of the configuration's ablations; kind shared")
    parser.add_argument("--known", type=Path, help="JSON file of measured losses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if (options.kind in ("transferred", "started")) != (options.policy is not None):
        parser.error("--policy goes with --kind transferred or started")
    torch.set_num_threads(options.threads)
    found = run(options)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table([found]))


if __name__ == "__main__":
    main()
