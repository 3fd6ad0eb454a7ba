"""What this machine can do: device, memory, disk, Hub, versions, and which ready models fit.

    python -m windquant doctor

Looks only, in a few seconds; the Hub is asked once and not waited for. The exit code is 1 where something that every
job needs is missing.
"""

import argparse
import importlib.metadata
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from windquant import configuration, control_groups, cost, dependencies, memory, processor, validation
from windquant.shape import Shape, known

ROOT = dependencies.ROOT.parent
HUB_SECONDS = 4.0
BITS = 2.0
NEEDED_GB = 5  # of memory and disk, for the default model
GOOD, WARNING, BAD = "ok", "note", "missing"
#: The ready models of the Hub, as their config.json files describe them, for those that are not here yet.
SHAPES = {
    "llama2-7b": Shape(32, 4096, 11008, 4096, 4096, 32000, False),
    "llama3-8b": Shape(32, 4096, 14336, 4096, 1024, 128256, False),
    "llama3.2-1b": Shape(16, 2048, 8192, 2048, 512, 128256, True),
    "llama3.2-3b": Shape(28, 3072, 8192, 3072, 1024, 128256, True),
    "qwen3-0.6b": Shape(28, 1024, 3072, 2048, 1024, 151936, True),
    "mistral-7b": Shape(32, 4096, 14336, 4096, 1024, 32768, False),
    "gemma3-270m": Shape(18, 640, 2048, 1024, 256, 262144, True),
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
    yield of_processor()
    if any(finding.status == BAD for finding in installed):
        return  # the rest asks these packages
    room, disk = memory.free(), shutil.disk_usage(folder).free
    for what, free in (("memory", room), ("disk", disk)):
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
    yield from fitting(min(gpu, room) if gpu else room, disk, reachable, on_gpu=bool(gpu))


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


def of_processor() -> Finding:
    """Cores, and the instructions that decide how fast and how rounded products are."""
    found = processor.this()
    speed = "fast BF16: statistics, search and recovery use it" if found.fast_bfloat16 else "no fast BF16: all in FP32"
    instructions = " ".join(found.instructions) or platform.machine()
    return Finding(GOOD, "processor", f"{control_groups.cores()} cores, {instructions}; {speed}")


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


def fitting(room: float, disk: float, reachable: bool, on_gpu: bool) -> Iterator[Finding]:
    """A line per ready model: whether 2.0 bits of it fit into `room` bytes of (each) memory and `disk` bytes."""
    schema = configuration.load(ROOT / "workflow" / "schemas" / "config.schema.yaml")
    config = validation.validate(configuration.load(ROOT / "config" / "config.yaml"), schema)
    machine = (cost.gpu if on_gpu else cost.this)(control_groups.cores())
    for name in config["models"]:
        resolved = configuration.resolve(config, schema, name)
        here = known(resolved["model"])
        shape = here or SHAPES.get(name)
        if shape is None:
            yield Finding(WARNING, name, "its size is known once it is here")
            continue
        wanted = cost.needs(shape, resolved, BITS, machine, on_gpu)
        held, space = max(need.memory for need in wanted.values()), sum(need.disk for need in wanted.values())
        seconds = cost.seconds(wanted)
        lacking = [
            text
            for text, lacks in (
                ("memory", held > room),
                ("disk", space > disk),
                ("the Hub, or a local copy", resolved["model"]["source"] == "hub" and not reachable and not here),
            )
            if lacks
        ]
        about = (
            f"{shape.parameters / 1e9:.2f} billion parameters: about {held / 1e9:.1f} GB of memory, "
            f"{space / 1e9:.1f} GB of disk, {said_time(seconds)}"
        )
        yield Finding(
            WARNING if lacking else GOOD, name, about + (f"; lacks {' and '.join(lacking)}" if lacking else "")
        )


def said_time(seconds: float) -> str:
    """E.g. "12 minutes", "5.5 hours"."""
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
