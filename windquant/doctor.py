"""What this machine can do: device, memory, disk, Hub, versions, and which ready models fit.

    python -m windquant doctor

Looks only, in a few seconds; the Hub is asked once and not waited for. The exit code is 1 where something that every
job needs is missing.
"""

import argparse
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from windquant import configuration, dependencies
from windquant.errors import WindquantError
from windquant.manifest import INSTRUCTIONS

ROOT = dependencies.ROOT.parent
HUB_SECONDS = 4.0
NEEDED_GB = 5  # of memory and disk, for the default model
GOOD, WARNING, BAD = "ok", "note", "missing"
#: Parameters of the ready models in billions, for those that are not on this machine.
PARAMETERS = {
    "smollm2-135m": 0.135,
    "gemma3-270m": 0.268,
    "qwen3-0.6b": 0.596,
    "llama3.2-1b": 1.24,
    "llama3.2-3b": 3.21,
    "llama2-7b": 6.74,
    "mistral-7b": 7.25,
    "llama3-8b": 8.03,
}


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    status: str  # GOOD, WARNING or BAD
    what: str
    said: str


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m windquant doctor", description="What this machine can do.")
    parser.add_argument("--offline", action="store_true", help="do not ask the Hub")
    given = parser.parse_args(arguments)
    findings = []
    for finding in examine(Path(), given.offline):
        findings.append(finding)
        print(f"{finding.status:8}{finding.what:14}{finding.said}", flush=True)
    if any(finding.status == BAD for finding in findings):
        sys.exit(1)


def examine(folder: Path, offline: bool = False) -> Iterator[Finding]:
    """Everything, the quick parts first."""
    yield python()
    installed = list(packages(ROOT / "requirements.lock"))
    yield from installed
    yield processor()
    if any(finding.status == BAD for finding in installed):
        return  # the rest asks these packages
    memory, disk = free_memory(), shutil.disk_usage(folder).free
    for what, free in (("memory", memory), ("disk", disk)):
        enough = free >= NEEDED_GB * 1e9
        said = f"{free / 1e9:.1f} GB free, the default model needs {NEEDED_GB}"
        yield Finding(GOOD if enough else WARNING, what, said)
    gpu, said = device()
    yield Finding(GOOD, "device", said)
    reachable = False
    if offline:
        yield Finding(WARNING, "Hub", "not asked")
    else:
        finding = hub()
        reachable = finding.status == GOOD
        yield finding
    yield from fitting(gpu or memory, disk, reachable, slow=not gpu)


def python() -> Finding:
    version = platform.python_version()
    right = sys.version_info[:2] == (3, 11)
    return Finding(GOOD if right else BAD, "python", version if right else f"{version}; 3.11 is needed: `make env`")


def packages(lock: Path) -> Iterator[Finding]:
    """Installed packages against the lock file."""
    try:
        lines = lock.read_text().splitlines()
    except OSError:
        yield Finding(WARNING, "packages", f"no {lock.name} beside the package: versions are not compared")
        return
    wanted = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    absent, other = [], []
    for name, version in wanted.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if installed.partition("+")[0] != version:  # torch's builds bear one version
            other.append(f"{name} {installed} (lock: {version})")
    if absent:
        yield Finding(
            BAD, "packages", f"{', '.join(absent[:4])}{', ...' * (len(absent) > 4)} not installed: `make env`"
        )
    if other:
        shown = ", ".join(other[:4]) + ", ..." * (len(other) > 4)
        yield Finding(WARNING, "packages", f"{shown}; results may differ in the last bits: `make env`")
    if not absent and not other:
        yield Finding(GOOD, "packages", f"all {len(wanted)} as in {lock.name}")


def processor() -> Finding:
    """Cores, and the instructions that decide how fast and how rounded products are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().lower().splitlines():
            if line.startswith(("flags", "features")):
                flags.update(line.split())
    except OSError:
        pass
    found = [name for name in INSTRUCTIONS if name in flags]
    fast = bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)
    speed = "native BF16: statistics, search and recovery are fast" if fast else "no native BF16: all in FP32"
    return Finding(GOOD, "processor", f"{cores} cores, {' '.join(found) or platform.machine()}; {speed}")


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return free


def device() -> tuple[int, str]:
    """Free bytes of the GPU (0: none) and its name."""
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this torch is built for CPUs)"
        return 0, f"CPU{built}"
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return int(free), f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, compute capability {major}.{minor}"


def hub() -> Finding:
    """Whether the Hub answers within HUB_SECONDS, and whether there is a login for gated models."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding(WARNING, "Hub", "HF_HUB_OFFLINE is set: only models that are here already")
    login = "logged in" if get_token() else "no login: gated models ask for `hf auth login`"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Finding(
            WARNING, "Hub", f"{constants.ENDPOINT} does not answer ({reason}); local folders and the default model work"
        )
    return Finding(GOOD, "Hub", f"{constants.ENDPOINT} answers; {login}")


def fitting(room: float, disk: float, reachable: bool, slow: bool) -> Iterator[Finding]:
    """A line per ready model: whether it fits into `room` bytes of (GPU) memory and `disk` bytes."""
    entries = configuration.load(ROOT / "config" / "config.yaml")["models"]
    for name, entry in entries.items():
        here = Path("resources") / "models" / name
        billions = parameters(here) or PARAMETERS.get(name)
        if billions is None:
            yield Finding(WARNING, name, "its size is known once it is here")
            continue
        memory, space = needed_memory(billions), needed_disk(billions)
        lacking = [
            text
            for text, lacks in (
                (f"{memory:.0f} GB of memory", memory * 1e9 > room),
                (f"{space:.0f} GB of disk", space * 1e9 > disk),
                ("the Hub, or a local copy", entry["source"] == "hub" and not reachable and not here.exists()),
            )
            if lacks
        ]
        about = f"{billions:g} billion parameters, about {memory:.0f} GB of memory and {space:.0f} GB of disk"
        if lacking:
            yield Finding(WARNING, name, f"{about}; lacks {' and '.join(lacking)}")
        else:
            yield Finding(GOOD, name, f"fits: {about}{'; hours without a GPU' if slow and billions > 0.5 else ''}")


def needed_memory(billions: float) -> float:
    """GB: recovery holds the original in FP32, the decoded student and its activations; measured, 3.9 GB at 0.135."""
    return 3.0 + 6.7 * billions


def needed_disk(billions: float) -> float:
    """GB: the original, two checkpoints, statistics and caches."""
    return 1.0 + 5.0 * billions


def parameters(folder: Path) -> float | None:
    """Billions of parameters of a model that is on this machine, from the headers of its weights."""
    from safetensors import safe_open

    from windquant import models

    total = 0
    try:
        for file in models.weight_files(folder):
            with safe_open(file, framework="pt") as content:
                total += sum(math.prod(content.get_slice(name).get_shape()) for name in content.keys())  # noqa: SIM118
    except (OSError, WindquantError):
        return None
    return round(total / 1e9, 3)
