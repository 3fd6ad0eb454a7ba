"""What a report shows, read from results, from the manifests of what they were made from, and from the plans."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from windquant import naming, result_file
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.plan import Plan
from windquant.report import plan_picture


@dataclass(frozen=True)
class Experiment:
    """One result and what is left here of its making: a result that was pulled or copied alone has less to show."""

    path: Path
    result: dict[str, Any]
    inputs: dict[str, Path]  # name -> artifact, as in the result's manifest; empty where that is not here

    @property
    def title(self) -> str:
        """E.g. "smollm2-135m at 2 bits, ppo-chunk64-1"."""
        return f"{self.result['model']} at {self.result['target_bits']:g} bits, {self.variant}"

    @property
    def variant(self) -> str:
        """Allocator, change and seed, as the file is called; of a file with a name of its own the allocator alone."""
        allocator = str(self.result["allocator"])
        named = naming.variant_of(self.path)
        return named.name if named and named.allocator == allocator else allocator

    @property
    def tasks(self) -> tuple[str, ...]:
        """The zero-shot tasks that its mean accuracy is of."""
        return tuple(sorted(self.result["zero_shot"]))

    @property
    def slug(self) -> str:
        """Its name in links."""
        return self.path.stem.replace(".", "-")

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of what the result was made from, None where it is not here."""
        path = self.inputs.get(name)
        return Manifest.load(path) if path and manifest_path(path).is_file() else None

    def note(self, name: str, key: str) -> Any:
        manifest = self.manifest(name)
        return manifest.notes.get(key) if manifest else None

    @cached_property
    def plan(self) -> Plan | None:
        path = self.inputs.get("plan")
        return Plan.load(path) if path and path.is_file() else None

    @cached_property
    def energies(self) -> dict[str, list[float]] | None:
        """Of every chunk's channels, by linear."""
        from windquant.bank import Bank

        path = self.inputs.get("bank")
        return plan_picture.energies(Bank.load(path)) if path and path.is_file() else None

    @property
    def pairs(self) -> list["Pair"]:
        """The plans that the search has measured."""
        rows = self.plan.search.get("pairs", []) if self.plan else []
        return [Pair(source, *map(float, values)) for source, *values in rows if all(map(math.isfinite, values))]

    @property
    def curve(self) -> list[dict[str, float]]:
        """The policy's learning curve, a point per update."""
        return self.plan.search.get("curve", []) if self.plan else []


@dataclass(frozen=True)
class Pair:
    """A plan that the search has measured; losses in nats per token."""

    source: str  # lagrangian, sampled, deterministic or evolution
    predicted: float  # by the bank
    corrected: float  # by the loss model as it was before the measurement
    measured: float
    target: float | None = None  # bits; plans of older searches do not say


@dataclass(frozen=True)
class Peer:
    """Another tool's model on the same text, from benchmarks/peers."""

    peer: str
    recipe: str
    bits: float | None
    perplexity: float | None
    seconds: float | None
    peak_memory_bytes: float | None
    reason: str  # why there is no number
    model: str


def experiments(paths: Sequence[Path]) -> list[Experiment]:
    """The results, each once, by model, budget and perplexity. WindquantError for a file that is no result."""
    found = [experiment(path) for path in dict.fromkeys(paths)]
    return sorted(found, key=lambda e: (e.result["model"], e.result["target_bits"], quality(e.result)))


def experiment(path: Path) -> Experiment:
    entry = result_file.load(path)
    manifest = Manifest.load(path) if manifest_path(path).is_file() else None
    inputs = {name: Path(value["path"]) for name, value in manifest.inputs.items() if _same(value)} if manifest else {}
    return Experiment(path, entry, inputs)


def _same(value: Mapping[str, str]) -> bool:
    """Whether the artifact is here still, and not one that was made since."""
    path = Path(value["path"])
    return manifest_path(path).is_file() and Manifest.load(path).output["sha256"] == value["sha256"]


def quality(entry: Mapping[str, Any]) -> float:
    """Perplexity of the quantized model on the first text."""
    return float(next(iter(entry["perplexity"].values()))["quantized"])


def datasets(found: Sequence[Experiment]) -> list[str]:
    """All texts that perplexities are measured on: results of one model may have different ones."""
    return list(dict.fromkeys(name for e in found for name in e.result["perplexity"]))


def by_tasks(found: Sequence[Experiment]) -> dict[tuple[str, ...], list[Experiment]]:
    """Those with zero-shot tasks, together where the tasks are the same: means of other ones are no comparison."""
    grouped: dict[tuple[str, ...], list[Experiment]] = {}
    for entry in found:
        if entry.tasks:
            grouped.setdefault(entry.tasks, []).append(entry)
    return grouped


def by_model(found: Sequence[Experiment]) -> dict[str, list[Experiment]]:
    grouped: dict[str, list[Experiment]] = {}
    for entry in found:
        grouped.setdefault(entry.result["model"], []).append(entry)
    return grouped


def peers(path: Path | None) -> list[Peer]:
    """The table of the peers; WindquantError if it is none."""
    if path is None:
        return []
    try:
        rows = json.loads(path.read_text())
        return [
            Peer(
                peer=str(row["peer"]),
                recipe=str(row.get("recipe") or ""),
                **{key: _number(row.get(key)) for key in ("bits", "perplexity", "seconds", "peak_memory_bytes")},
                reason=str(row.get("reason") or ""),
                model=str(row.get("model") or "smollm2-135m"),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WindquantError(f"{path}: no table of peers ({error!r}); its own command makes it again") from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's r; None for fewer than three pairs, or where one side does not vary."""
    count = len(pairs)
    if count < 3:
        return None
    mean_x, mean_y = (sum(values) / count for values in zip(*pairs, strict=True))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    spread = math.sqrt(sum((x - mean_x) ** 2 for x, _ in pairs) * sum((y - mean_y) ** 2 for _, y in pairs))
    return covariance / spread if spread else None
