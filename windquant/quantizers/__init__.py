"""Treatments, one file each, and the registry of the actions that they serve.

A new treatment is a class with the methods of `base.Treatment` and a line in `actions` for each of its widths.
"""

from functools import lru_cache
from typing import Literal

import torch

from windquant.errors import WindquantError
from windquant.quantizers.base import Coded, Fit, Treatment
from windquant.quantizers.scalar import Scalar
from windquant.quantizers.skip import Skip
from windquant.quantizers.trellis import Trellis
from windquant.storage import TERNARY

__all__ = ["TREATMENTS", "Coded", "Fit", "Treatment", "action", "actions", "menu"]

TREATMENTS = Literal["scalar", "trellis", "mixed"]


@lru_cache(maxsize=8)
def actions(window: int = 12, dtype: torch.dtype = torch.float16) -> dict[str, Treatment]:
    """Every action by name, from the cheapest width to the dearest; the order is that of the action tables on disk.

    window: the trellis keeps 2^window states; dtype: original precision, of skipped units.
    """
    entries: list[Treatment] = [
        Scalar("scalar-1", 1, (1, 1), 2, has_offset=True),
        Trellis("trellis-1", 1, (1, 1), window),
        Scalar("scalar-1.5", 1.5, TERNARY, 3, has_offset=False),
        Trellis("trellis-1.5", 1.5, (1, 2), window),
        Scalar("scalar-2", 2, (2, 2), 4, has_offset=True),
        Trellis("trellis-2", 2, (2, 2), window),
        Trellis("trellis-2.5", 2.5, (2, 3), window),
        Scalar("scalar-3", 3, (3, 3), 8, has_offset=True),
        Trellis("trellis-3", 3, (3, 3), window),
        Trellis("trellis-3.5", 3.5, (3, 4), window),
        Scalar("scalar-4", 4, (4, 4), 16, has_offset=True),
        Trellis("trellis-4", 4, (4, 4), window),
        Scalar("scalar-8", 8, (8, 8), 256, has_offset=False),
        Skip(dtype),
    ]
    return {entry.name: entry for entry in entries}


def action(name: str, window: int, dtype: torch.dtype) -> Treatment:
    """The action of that name; WindquantError if this version has none."""
    found = actions(window, dtype).get(name)
    if found is None:
        raise WindquantError(f"action {name!r}: unknown; this version has {', '.join(actions())}")
    return found


def menu(treatment: str) -> list[str]:
    """The actions that a `treatment` setting offers to the allocator: its own and what keeps more; `mixed` is all."""
    names = list(actions())
    if treatment == "mixed":
        return names
    if treatment not in ("scalar", "trellis"):
        raise WindquantError(f"units.treatment: {treatment!r} is none of scalar, trellis, mixed")
    other = "trellis" if treatment == "scalar" else "scalar"
    return [name for name in names if not name.startswith(other) or name == "scalar-8"]
