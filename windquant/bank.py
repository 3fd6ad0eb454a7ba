"""Bank: for every unit and action the predicted loss increase and the exact storage cost.

    python -m windquant.bank --model DIR --statistics FILE --output FILE.safetensors
    python -m windquant.bank ... --jobs 4 --part 1     # the first quarter of the linears, in a job of its own
    python -m windquant.bank ... --jobs 4 --parts FILE FILE FILE FILE

    loss increase of a unit = 1/2 sum_r fisher_r error_r

with error_r the expected squared error of row r, weighted by the channels' energy as far as error feedback cannot make
up for it (see statistics.py). Units are independent of each other.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from windquant import models, step, streaming, tensor_file
from windquant.errors import WindquantError
from windquant.feedback import column_order
from windquant.packed import fixed_bytes, unit_bytes
from windquant.plan import Plan, Units
from windquant.quantizers import Treatment, action, menu
from windquant.quantizers.rotation import rotation
from windquant.settings import Count, Limit, Natural
from windquant.statistics import Statistics
from windquant.units import Linear, chunk_widths, protected_count

FORMAT = 2
ARRAYS = ("linear", "position", "width", "energy", "errors", "bytes")  # of a bank, as they are stored
Width = Annotated[int, Limit("minimum", 1), Limit("maximum", 1024)]  # no kernel holds more in its registers
Share = Annotated[float, Limit("minimum", 0), Limit("exclusiveMaximum", 1)]


@dataclass(frozen=True)
class Settings:
    chunk: Width = 64  # columns of a unit
    protected: Share = 0.0  # fraction of columns, the most salient ones, that stay in INT8
    treatment: Literal["scalar", "trellis", "mixed"] = "trellis"  # how widths are reached
    order: Literal["saliency", "natural"] = "saliency"  # of the columns
    window: Literal[8, 10, 12, 14] = 12  # bits of the trellis state; the search keeps 2^window states (8, 10, 12 or 14)
    jobs: Count = 1  # how many jobs make the bank together, for clusters; the result is the same
    part: Natural = 0  # of the jobs, the one whose part is made, from 1 (0 = all)


@dataclass(frozen=True)
class Bank:
    """Units in model order (layer, linear, position); A actions from the cheapest to the dearest."""

    model: str
    actions: list[str]
    linears: list[Linear]
    linear: NDArray[np.int32]  # [U] index into `linears`
    position: NDArray[np.int32]  # [U] chunk index in column order, 0 = most salient
    width: NDArray[np.int32]  # [U] columns of the chunk
    energy: NDArray[np.float64]  # [U] mean channel energy E[x_j^2] of the chunk's columns
    errors: NDArray[np.float64]  # [U, A] predicted loss increase, nats per token
    bytes: NDArray[np.int64]  # [U, A] exact storage of the unit under the action
    fixed_bytes: int  # orders, action tables, protected columns: what no plan can change
    units: Units = field(default_factory=Units)  # how the units were cut and what the actions mean

    @property
    def weights(self) -> int:
        """Number of weights of all quantized linears, protected columns included."""
        return sum(linear.weights for linear in self.linears)

    @property
    def unit_weights(self) -> NDArray[np.int64]:
        """[U] number of weights of each unit."""
        rows = np.array([linear.rows for linear in self.linears], dtype=np.int64)
        return rows[self.linear] * self.width

    def budget(self, target_bits: float) -> int:
        """Bytes that the units' actions may take so that effective bits never exceed the target."""
        return int(np.floor(target_bits * self.weights / 8)) - self.fixed_bytes

    def total_bytes(self, choice: NDArray[np.int64]) -> int:
        """Bytes of all stored tensors under `choice` [U] (action indices)."""
        return int(self.bytes[np.arange(len(choice)), choice].sum()) + self.fixed_bytes

    def effective_bits(self, choice: NDArray[np.int64]) -> float:
        return 8 * self.total_bytes(choice) / self.weights

    def predicted_loss(self, choice: NDArray[np.int64]) -> float:
        """Sum of the predicted loss increases, nats per token (the additive model)."""
        return float(self.errors[np.arange(len(choice)), choice].sum())

    def lowest_bits(self) -> float:
        """The smallest target that a plan of available actions can meet, rounded up so that it works as it is shown."""
        size = np.where(np.isfinite(self.errors), self.bytes, np.iinfo(np.int64).max).min(axis=1)
        return float(np.ceil(8e4 * (int(size.sum()) + self.fixed_bytes) / self.weights) / 1e4)

    def plan(
        self,
        choice: NDArray[np.int64],
        *,
        allocator: str,
        target_bits: float,
        seed: int,
        fallback: bool = False,
        search: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan of `choice` [U]; raises ValueError if it exceeds the target (an allocator's bug)."""
        bits = self.effective_bits(choice)
        if bits > target_bits:
            raise ValueError(f"{allocator}: plan has {bits:.5f} effective bits, above its target {target_bits}")
        actions: dict[str, list[str]] = {linear.name: [] for linear in self.linears}
        for unit, chosen in enumerate(choice):
            actions[self.linears[self.linear[unit]].name].append(self.actions[chosen])
        return Plan(
            model=self.model,
            allocator=allocator,
            target_bits=target_bits,
            effective_bits=bits,
            bytes=self.total_bytes(choice),
            weights=self.weights,
            seed=seed,
            actions=actions,
            predicted_loss=self.predicted_loss(choice),
            fallback=fallback,
            units=self.units,
            search=dict(search or {}),
        )

    def shares(self, choice: NDArray[np.int64]) -> dict[str, float]:
        """Share of the units' weights per action name."""
        weights = self.unit_weights
        return {
            name: float(weights[choice == index].sum() / weights.sum())
            for index, name in enumerate(self.actions)
            if (choice == index).any()
        }

    @property
    def sha256(self) -> str:
        """Digest of everything that a plan depends on: of two banks with the same one, a plan means the same."""
        linears = [asdict(linear) for linear in self.linears]
        document = [self.model, self.actions, linears, self.fixed_bytes, asdict(self.units)]
        digest = hashlib.sha256(json.dumps(document).encode())
        for name in ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        arrays = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in ARRAYS}
        document = {
            "format": FORMAT,
            "model": self.model,
            "actions": self.actions,
            "linears": [asdict(linear) for linear in self.linears],
            "fixed_bytes": self.fixed_bytes,
            "units": asdict(self.units),
        }
        tensor_file.save(path, arrays, "bank", document)

    @classmethod
    def load(cls, path: Path) -> "Bank":
        try:
            tensors, document = tensor_file.load(path, "bank")
            if document.pop("format") != FORMAT:
                raise WindquantError(f"{path}: bank of another version; delete it and run again")
            linears = [Linear(**linear) for linear in document.pop("linears")]
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            return cls(**document | {"linears": linears, "units": Units(**document["units"])}, **arrays)
        except tensor_file.UNREADABLE as error:
            raise WindquantError(f"{path}: not a readable bank ({error}); delete it and run again") from error


def run(task: step.Task, settings: Settings) -> None:
    statistics = Statistics.load(task.inputs["statistics"])
    source = streaming.open_source(task.inputs["model"])
    statistics.check(source)
    original = "float16" if models.stored_dtype(task.inputs["model"]) == torch.float16 else "bfloat16"
    units = Units(settings.chunk, settings.protected, settings.window, settings.order, original)
    linears = share(statistics.linears, settings.part, settings.jobs) if settings.part else statistics.linears
    if parts := task.files.get("parts"):
        bank = join([Bank.load(path) for path in parts], linears)
    else:
        progress = task.progress(linears, label="bank")
        weights = ((linear, source.parameter(f"{linear.name}.weight")) for linear in progress)
        bank = make(task.inputs["model"].name, weights, statistics, units, menu(settings.treatment))
    bank.save(task.output)
    task.note("units", len(bank.linear))
    if bank.linears:  # of more jobs than there are linears, some have none
        task.note("lowest_bits", bank.lowest_bits())


def share(linears: Sequence[Linear], part: int, jobs: int) -> list[Linear]:
    """The linears of the `part`-th of so many jobs, from 1: consecutive ones, of about equal weight together."""
    if not 1 <= part <= jobs:
        raise WindquantError(f"--part {part}: give 1 to --jobs, {jobs}")
    ends = np.cumsum([linear.weights for linear in linears])
    middles = ends - np.array([linear.weights for linear in linears]) / 2
    return [linear for linear, at in zip(linears, middles, strict=True) if int(jobs * at / ends[-1]) == part - 1]


def join(parts: Sequence[Bank], linears: Sequence[Linear]) -> Bank:
    """The bank of consecutive parts, which must be those of `linears`."""
    first = parts[0]
    alike = all((part.model, part.actions, part.units) == (first.model, first.actions, first.units) for part in parts)
    if not alike or [linear for part in parts for linear in part.linears] != list(linears):
        raise WindquantError("--parts: not all parts of one bank, in their order; delete them and run again")
    starts = np.cumsum([0, *(len(part.linears) for part in parts[:-1])])
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    offsets = np.repeat(starts, [len(part.linear) for part in parts])
    arrays["linear"] = (arrays["linear"] + offsets).astype(np.int32)
    return replace(first, linears=list(linears), fixed_bytes=sum(part.fixed_bytes for part in parts), **arrays)


def make(
    model: str, weights: Iterable[tuple[Linear, Tensor]], statistics: Statistics, units: Units, names: list[str]
) -> Bank:
    """The bank of the linears and weights [rows, columns] that come, one at a time, for the actions `names`."""
    form = units.format()
    entries = [action(name, form.window, form.dtype) for name in names]
    linears: list[Linear] = []
    columns: dict[str, list[Any]] = {name: [] for name in ARRAYS}
    for linear, weight in weights:
        protected = protected_count(linear.columns, form.protected)
        energy = statistics.energy[linear.group]
        order = column_order(energy, units.order, form.chunk, protected)
        start = protected
        for position, width in enumerate(chunk_widths(linear.columns, protected, form.chunk)):
            chosen = order[start : start + width]
            errors = unit_errors(
                weight[:, chosen].float(),
                statistics.conditional[linear.group][chosen],
                statistics.fisher[linear.name],
                entries,
            )
            columns["linear"].append(len(linears))
            columns["position"].append(position)
            columns["width"].append(width)
            columns["energy"].append(energy[chosen].mean().item())
            columns["errors"].append(errors)
            columns["bytes"].append([unit_bytes(entry, linear.rows, width) for entry in entries])
            start += width
        linears.append(linear)
    return Bank(
        model=model,
        actions=names,
        linears=linears,
        linear=np.array(columns["linear"], np.int32),
        position=np.array(columns["position"], np.int32),
        width=np.array(columns["width"], np.int32),
        energy=np.array(columns["energy"], np.float64),
        errors=np.array(columns["errors"], np.float64).reshape(-1, len(names)),
        bytes=np.array(columns["bytes"], np.int64).reshape(-1, len(names)),
        fixed_bytes=sum(fixed_bytes(linear, form) for linear in linears),
        units=units,
    )


def lowest_bits(linears: Sequence[Linear], units: Units, names: list[str]) -> float:
    """The lowest target that these linears allow, as `Bank.lowest_bits` but without a bank."""
    form = units.format()
    entries = [action(name, form.window, form.dtype) for name in names]
    size = 0
    for linear in linears:
        widths = chunk_widths(linear.columns, protected_count(linear.columns, form.protected), form.chunk)
        size += sum(min(unit_bytes(entry, linear.rows, width) for entry in entries) for width in widths)
        size += fixed_bytes(linear, form)
    return 8 * size / sum(linear.weights for linear in linears)


def unit_errors(chunk: Tensor, conditional: Tensor, fisher: Tensor, entries: list[Treatment]) -> list[float]:
    """Predicted loss increase of every action of one unit, nats per token.

    chunk: [rows, width] as it is in the model; conditional: [width], the channels' conditional energies; fisher:
    [rows].
    A rotation mixes the channels of a chunk; their conditional energies then all become the geometric mean, because the
    product of the conditional energies (a determinant) is all that a rotation inside the chunk leaves alone.
    """
    rotated = chunk @ rotation(chunk.shape[1])
    alike = conditional.clamp_min(torch.finfo(torch.float32).tiny).log().mean().exp().expand_as(conditional)
    return [
        0.5 * float((fisher * entry.error(*((rotated, alike) if entry.rotated else (chunk, conditional)))).sum())
        for entry in entries
    ]


if __name__ == "__main__":
    step.main("bank", run, Settings, inputs=("model", "statistics", "parts*"))
