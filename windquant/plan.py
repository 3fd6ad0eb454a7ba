"""A plan: one action per unit, with the bytes it is predicted to take.

The file is JSON, so that a person can read it and two plans can be compared with `diff`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from windquant.errors import WindquantError
from windquant.packed import Format

FORMAT = 1


@dataclass(frozen=True)
class Units:
    """How the units were cut and what their actions mean; a plan is only good for these."""

    chunk: int = 64  # columns
    protected: float = 0.0  # fraction of columns in INT8
    window: int = 12  # of the trellis
    order: str = "saliency"  # of the columns, or "natural"
    dtype: str = "float16"  # original precision: of skipped units

    def format(self) -> Format:
        return Format(self.chunk, self.protected, self.window, getattr(torch, self.dtype))


@dataclass(frozen=True)
class Plan:
    """One action per unit of every linear, and how it came about."""

    model: str
    allocator: str
    target_bits: float
    effective_bits: float  # 8 * bytes / weights, predicted; equals the checkpoint's measured value
    bytes: int  # all stored tensors of the quantized linears
    weights: int  # number of weights of the quantized linears
    seed: int
    actions: dict[str, list[str]]  # linear name -> action name per chunk, in column order
    predicted_loss: float  # sum of the bank's predicted loss increases, nats per token
    fallback: bool = False  # the Lagrangian plan was taken because the learned one could not be used
    search: dict[str, Any] = field(default_factory=dict)  # what the search measured; empty for the baselines
    units: Units = field(default_factory=Units)

    def save(self, path: Path) -> None:
        document = {"format": FORMAT, **asdict(self)}
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        try:
            document = json.loads(path.read_text())
            found = document.pop("format", None)
            if found != FORMAT:
                raise WindquantError(
                    f"{path}: plan format {found}, this version reads {FORMAT}; delete it and run again"
                )
            return cls(**document | {"units": Units(**document["units"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WindquantError(f"{path}: not a readable plan ({error!r}); delete it and run again") from error
