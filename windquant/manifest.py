"""The manifest beside every artifact: how it came about and what it must contain.

`<artifact>.manifest.json` is written last, so an artifact without one is unfinished, and one whose content differs
from its manifest is damaged.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from windquant import atomic, processor
from windquant.atomic import manifest_path
from windquant.errors import WindquantError

#: Distributions whose versions decide what a step computes.
DISTRIBUTIONS = (
    "windquant",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "numba",
    "stable-baselines3",
    "sb3-contrib",
    "gymnasium",
    "datasets",
    "lm-eval",
    "gguf",
    "mwparserfromhell",
    "mlflow",
    "snakemake",
)


@dataclass(frozen=True)
class Manifest:
    step: str
    settings: dict[str, Any]
    seed: int
    inputs: dict[str, dict[str, str]]  # name -> {"path", "sha256"}
    output: dict[str, str]  # {"path", "sha256"}
    seconds: float  # wall time, from the start of the process
    peak_memory_bytes: dict[str, int]  # {"host", "gpu"}
    versions: dict[str, str]
    git_commit: str | None  # None outside a git work tree
    git_dirty: bool | None
    mlflow_run_id: str | None
    notes: dict[str, Any] = field(default_factory=dict)  # what the step wants its successors to know
    # Manifests of earlier versions lack these.
    config_sha256: str = ""  # of step, settings and seed
    code: str = ""  # digest of the step's code, comments and docstrings aside
    lock: str = ""  # digest of the locked packages; empty for a step that was called by hand
    command: str = ""  # that made it
    started: str = ""  # UTC
    machine: dict[str, str] = field(default_factory=dict)  # what decides whether another one gets the same bytes

    def save(self, artifact: Path) -> None:
        atomic.write_text(manifest_path(artifact), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, artifact: Path) -> "Manifest":
        path = manifest_path(artifact)
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise WindquantError(
                f"{path}: not a readable manifest ({error}); delete {artifact} and run again"
            ) from error


def config_sha256(step: str, settings: Mapping[str, Any], seed: int) -> str:
    """Digest of what a step was told to do."""
    return hashlib.sha256(json.dumps([step, settings, seed], sort_keys=True).encode()).hexdigest()


#: Snakemake leaves an empty file of this name in the folders that its rules make.
SNAKEMAKE_MARK = ".snakemake_timestamp"


def sha256(path: Path) -> str:
    """Digest of a file; of a folder, the digest of the sorted lines "<digest of file>  <relative path>"."""
    if path.is_dir():
        files = sorted(
            (file.relative_to(path).as_posix(), file)
            for file in path.rglob("*")
            if file.is_file() and file.name != SNAKEMAKE_MARK
        )
        listing = "".join(f"{sha256(file)}  {name}\n" for name, file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_sha256(path: Path) -> str:
    """Digest of an input, checked against its manifest where it has one; WindquantError if it is damaged."""
    digest = sha256(path)
    if manifest_path(path).exists():
        expected = Manifest.load(path).output["sha256"]
        if digest != expected:
            raise WindquantError(
                f"{path}: damaged, or changed since it was made (sha256 {digest[:12]}, not {expected[:12]}); "
                f"delete it and run again, or delete {manifest_path(path)} if you changed it on purpose"
            )
    return digest


def versions() -> dict[str, str]:
    """Python and the installed distributions of DISTRIBUTIONS, by metadata only (nothing is imported)."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine(threads: int) -> dict[str, str]:
    """What rounding depends on: the processor, its instructions, threads, GPU (only looked for if torch is loaded)."""
    found = processor.this()
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else ""
    return {
        "processor": f"{platform.machine()} {found.maker}".strip(),
        "instructions": " ".join(found.instructions),
        "threads": str(threads),
        "gpu": gpu,
    }


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the work tree in the current folder, and whether tracked files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
