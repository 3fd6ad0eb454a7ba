"""Whether two versions of an artifact are the same: byte for byte, or as numbers within the tolerance of their kind.

Tolerances hold between kinds of machines. On one kind of machine everything is expected to be identical, except what a
result says about its own making.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windquant import manifest
from windquant.errors import WindquantError


@dataclass(frozen=True)
class Tolerance:
    """What two numbers may differ by: the larger of both."""

    relative: float = 0.0  # of a tensor: relative to its largest magnitude
    absolute: float = 0.0
    accuracy: float = 0.0  # absolute, of a number of zero-shot tasks

    @property
    def text(self) -> str:
        numbers = ("relative", self.relative), ("absolute", self.absolute), ("absolute of accuracies", self.accuracy)
        return " or ".join(f"{value:g} {name}" for name, value in numbers if value) or "none"

    def close(self, where: str, first: float, second: float) -> bool:
        """Whether two numbers of a document are the same. where: the keys that lead to them."""
        accuracy = any(word in where for word in ("zero_shot", "accuracy", "stderr"))
        allowed = self.accuracy if accuracy else self.absolute
        return math.isclose(first, second, rel_tol=self.relative, abs_tol=allowed)


EXACT = Tolerance()
#: Kind of artifact, by the folder that it is in.
TOLERANCES = {
    "resources/models": EXACT,
    "data/calibration": EXACT,
    "data/statistics": Tolerance(relative=1e-4),  # sums in another order
    "data/bank": Tolerance(relative=1e-4),
    "data/search": EXACT,  # one other measurement is another policy
    "data/plans": EXACT,  # one other action is another plan
    "data/checkpoints": EXACT,
    # Perplexities; losses in nats, and differences of two of them; accuracies by one of 75 records
    "data/evaluation": Tolerance(relative=1e-3, absolute=2e-3, accuracy=0.014),
    "results": Tolerance(relative=1e-3, absolute=2e-3, accuracy=0.014),
}
#: What a result says about its own making. The digests in `data` are those of artifacts that are compared themselves.
MAKING = ("seconds", "peak_memory_bytes", "versions", "git_commit", "mlflow_run_id", "data")

IDENTICAL, EQUAL, DIFFERENT, MISSING = "identical", "equal", "different", "missing"


@dataclass(frozen=True)
class Verdict:
    status: str  # IDENTICAL, EQUAL, DIFFERENT or MISSING
    detail: str = ""


def tolerance(artifact: str) -> Tolerance | None:
    """The tolerance of an artifact's kind; None for what is not compared (MLflow's parent runs, the report)."""
    if Path(artifact).suffix in (".html", ".svg"):  # only show what is compared itself
        return None
    return next((value for folder, value in TOLERANCES.items() if artifact.startswith(f"{folder}/")), None)


def compare(old: Path, new: Path, allowed: Tolerance) -> Verdict:
    """Two versions of one file or folder."""
    if not old.exists():
        return Verdict(MISSING)
    if manifest.sha256(old) == manifest.sha256(new):
        return Verdict(IDENTICAL)
    worst = 0.0
    try:
        for where, difference in _differences(old, new, allowed):
            if difference is None:
                return Verdict(DIFFERENT, where)
            worst = max(worst, difference)
    except (ValueError, OSError, WindquantError) as error:
        return Verdict(DIFFERENT, " ".join(str(error).split()))
    if allowed == EXACT:
        return Verdict(DIFFERENT, "other bytes, same content")
    if not worst:
        return Verdict(EQUAL, "only what it says about its own making differs")
    return Verdict(EQUAL, f"at most {worst:.1e} apart, relatively (allowed: {allowed.text})")


def _differences(old: Path, new: Path, allowed: Tolerance) -> Iterator[tuple[str, float | None]]:
    """(where, by how much) of all that differs; None where it is not a number or by more than is allowed."""
    if old.is_dir() and new.is_dir():
        names = {path.relative_to(folder) for folder in (old, new) for path in folder.rglob("*") if path.is_file()}
        for name in sorted(name for name in names if name.name != manifest.SNAKEMAKE_MARK):
            if not (old / name).is_file() or not (new / name).is_file():
                yield f"{name}: only in {'the new' if (new / name).is_file() else 'the old'} one", None
            elif manifest.sha256(old / name) != manifest.sha256(new / name):
                for where, difference in _differences(old / name, new / name, allowed):
                    yield f"{name}: {where}", difference
        return
    match new.suffix:
        case ".safetensors":
            yield from _tensors(old, new, allowed)
        case ".json" | ".csv":
            yield from _values(_document(old), _document(new), allowed)
        case _:
            yield "other bytes", None


def _document(path: Path) -> Any:
    """The content of a JSON or CSV file; of a result or a comparison of results, without what is about its making."""
    with path.open(newline="") as file:
        document = json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))
    if path.parent.name != "results":
        return document
    entries = document if isinstance(document, list) else [document]
    return [{key: value for key, value in entry.items() if key not in MAKING} for entry in entries]


def _values(old: Any, new: Any, allowed: Tolerance, where: str = "") -> Iterator[tuple[str, float | None]]:
    """Compare JSON values, numbers within the tolerance."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            name = f"{where}.{key}" if where else str(key)
            if key in old and key in new:
                yield from _values(old[key], new[key], allowed, name)
            else:
                yield f"{name}: only in the {'old' if key in old else 'new'} one", None
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _values(*pair, allowed, f"{where}[{index}]")
    elif old != new:
        try:
            first, second = float(old), float(new)
        except (TypeError, ValueError):
            first = second = math.nan
        distance = abs(first - second) / max(abs(first), abs(second), 1e-300)
        yield f"{where}: {_short(old)} and {_short(new)}", distance if allowed.close(where, first, second) else None


def _tensors(old: Path, new: Path, allowed: Tolerance) -> Iterator[tuple[str, float | None]]:
    """Compare safetensors files, one tensor at a time."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(old, framework="pt") as first, safe_open(new, framework="pt") as second:
            ours, theirs = set(first.keys()), set(second.keys())
            for name in sorted(ours ^ theirs):
                yield f"{name}: only in one of them", None
            for name in sorted(ours & theirs):
                a, b = first.get_tensor(name), second.get_tensor(name)
                if a.shape != b.shape or a.dtype != b.dtype:
                    yield f"{name}: {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}", None
                elif not torch.equal(a, b):
                    largest = max(a.double().abs().max().item(), 1e-300)
                    distance = (a.double() - b.double()).abs().max().item()
                    limit = max(allowed.relative * largest, allowed.absolute)
                    close = a.is_floating_point() and distance <= limit
                    apart = distance / largest
                    yield f"{name}: {apart:.1e} apart (allowed: {allowed.text})", apart if close else None
            yield from _values(_metadata(first.metadata()), _metadata(second.metadata()), allowed, "metadata")
    except SafetensorError as error:
        raise WindquantError(f"not a readable safetensors file ({error})") from error


def _metadata(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The header's texts, those that hold JSON parsed."""
    parsed: dict[str, Any] = {}
    for key, text in (metadata or {}).items():
        try:
            parsed[key] = json.loads(text)
        except ValueError:
            parsed[key] = text
    return parsed


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
