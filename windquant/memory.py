"""How much memory there is, and whether a model has a place in it as a whole.

Steps that could hold a whole model (search, recovery, zero-shot tasks) do so where its weights and REST take at most
SHARE of the memory, and go decoder layer by decoder layer elsewhere (streaming.py). The rule asks how much the machine
has, not how much is free just now, so that a machine does the same every time, and the estimate can tell beforehand.
"""

import ctypes
import math
import os
import sys
from pathlib import Path

from windquant import control_groups
from windquant.errors import WindquantError

GIB = 2**30
LIMIT = "WINDQUANT_MEMORY"  # environment: GiB to count on where the machine has more
SHARE = 0.8  # of the memory
REST = 2 * GIB  # activations, logits, the process itself

# Bytes a parameter of what a step holds of a whole model.
SEARCH = 2  # times the computing type's: weights and noise
RECOVERY = 14  # the student decoded, in slots, and scaled, which its gradients need; those of a layer

#: Of mallopt (malloc.h): from how many bytes on a block is the system's own (M_MMAP_THRESHOLD), how many freed ones at
#: the heap's end go back (M_TRIM_THRESHOLD), how many it grows by (M_TOP_PAD), and that all threads share one heap
#: (M_ARENA_MAX): what one has freed serves the next. Older versions of glibc refuse more than 32 MiB for the first.
KEPT = {-3: 32 << 20, -1: 512 << 20, -2: 64 << 20, -8: 1}

#: Beside a control group's limit stands what is used of it.
USED = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}


def fits(size: float, room: float | None = None) -> bool:
    """Whether weights of `size` bytes have a place in `room` bytes of memory; None: where steps compute (`limit`)."""
    return size + REST <= SHARE * (limit() if room is None else room)


def limit() -> int:
    """Bytes that a step may count on: of this machine, and of its GPU where torch computes with one."""
    found = total()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        from windquant import compute

        # asking a GPU opens it: it has to be this process's own by then
        found = min(found, torch.cuda.get_device_properties(compute.device()).total_memory)
    return found


def total() -> int:
    """Bytes of the machine's memory, or of what its control groups or WINDQUANT_MEMORY allow."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _limits():
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            found = min(found, int(text))
    if text := os.environ.get(LIMIT, ""):
        try:
            asked = float(text)
        except ValueError:
            asked = math.nan
        if not asked > 0:
            raise WindquantError(f"{LIMIT}={text}: not a number of GiB, e.g. {LIMIT}=16")
        found = round(min(found, asked * GIB))
    return found


def free() -> int:
    """Bytes that this process may still take: of the machine's memory, and of what its control groups allow."""
    import psutil

    found = int(psutil.virtual_memory().available)
    for path in _limits():
        used = path.with_name(USED[path.name])
        try:
            found = min(found, int(path.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return found


def keep_freed() -> bool:
    """Have glibc keep freed blocks for the next ones; False where the C library is another one.

    By itself it hands tensors of more than a few MiB back to the system, which clears their pages when they are asked
    for again: a tenth of a pass over a model. Large blocks still come and go, so that they leave no holes.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    return tune is not None and all(tune(option, size) for option, size in KEPT.items())


def _limits() -> list[Path]:
    return control_groups.files("memory", "memory.limit_in_bytes", "memory.max")
