"""The user's own files, and their digests: a step runs again when their content is another, however old they are.

Snakemake compares the contents of inputs only where they are newer than what was made from them: a file that was moved,
copied with its time, or linked to another may be older. Digests are remembered by what the disk says of a file.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from windquant import atomic, manifest
from windquant.errors import WindquantError

LOCAL_SOURCES = ("folder", "file", "rows")  # those that are read from a path
#: What is read of a model's folder: weights, index, configuration, tokenizer and licence; no pickles, no code.
MODEL_FILES = (
    "*.safetensors", "*.json", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip

MEMORY = Path(".cache") / "local"


def of_entry(where: str, entry: Mapping[str, Any], keys: Mapping[str, str]) -> list[str]:
    """The local files that an entry of the configuration reads.

    keys: the key of each source, and that of its path. Of a folder these are the files in it that a model consists of.
    Raises WindquantError if there is nothing.
    """
    files: list[str] = []
    for source, key in keys.items():
        if entry[source] in LOCAL_SOURCES:
            if not entry.get(key):
                raise WindquantError(f"{where}.{key}: missing; {source}: {entry[source]} reads it")
            path = Path(str(entry[key])).expanduser()
            if path.is_dir() and entry[source] == "folder":
                files += sorted({str(file) for pattern in MODEL_FILES for file in path.glob(pattern)})
            elif path.is_file():
                files.append(str(path))
            else:
                wanted = "neither a file nor a folder" if entry[source] == "folder" else "no file"
                raise WindquantError(f"{where}.{key}: {str(path)!r} is {wanted}")
    return files


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
