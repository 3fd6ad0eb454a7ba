"""What the control groups around this process, of versions 1 and 2, allow it: containers set limits there.

A container's processors are a quota of time: it still sees all of the machine's, and as many threads as that only wait
for each other.
"""

import math
import os
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def files(controller: str, version1: str, version2: str) -> list[Path]:
    """The files of a limit, of this process's control groups and of those around them; some may not exist."""
    found: list[Path] = []
    for line in OWN.read_text().splitlines() if OWN.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, name = MOUNT, version2
        elif controller in controllers.split(","):
            root, name = MOUNT / controller, version1
        else:
            continue
        place = root / group.lstrip("/")
        found += [folder / name for folder in (place, *place.parents) if folder.is_relative_to(root)]
    return found


def cores() -> int:
    """Processors that this process may compute with: those it may run on, or its share of time where that is less."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for path in files("cpu", "cpu.cfs_quota_us", "cpu.max"):
        share = _share(path)
        if share is not None:
            found = min(found, max(1, math.ceil(share)))
    return found


def _share(path: Path) -> float | None:
    """Processors that a quota comes to: time in a period over its length; None where there is no limit."""
    try:
        quota, *period = path.read_text().split()
        length = period[0] if period else path.with_name("cpu.cfs_period_us").read_text()
        share = int(quota) / int(length)
    except (OSError, ValueError, ZeroDivisionError):  # no such limit, or "max"
        return None
    return share if share > 0 else None  # version 1 says -1
