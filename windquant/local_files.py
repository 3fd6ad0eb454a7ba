"""Digests of the user's own files, so that a step runs again when their content is another, however old they are.

Snakemake compares the contents of inputs only where they are newer than what was made from them: a file that was moved,
copied with its time, or linked to another may be older. Digests are remembered by what the disk says of a file.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from windquant import atomic, manifest

MEMORY = Path(".cache") / "local"


def digest(files: Iterable[str]) -> str:
    """Of their contents and names; empty where there are none."""
    lines = [f"{_digest(Path(file))}  {Path(file).name}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else ""


def _digest(file: Path) -> str:
    stat = file.stat()
    stamp = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    memory = MEMORY / f"{hashlib.sha256(str(file).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        known = json.loads(memory.read_text())
        if known["stamp"] == stamp:
            return str(known["sha256"])
    found = manifest.sha256(file)
    with contextlib.suppress(OSError):  # what is not remembered is read again
        memory.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(memory, json.dumps({"stamp": stamp, "sha256": found}))
    return found
