"""Artifacts that are no longer what their step has made: found, named and set aside, so that Snakemake makes them anew.

    python -m windquant check      compare every artifact with its digest

Every artifact has its digest in the manifest beside it. Reading all of them at every start would take minutes for a
large model, so what has been checked is remembered with sizes and times, and only what was touched since is read.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from windquant import atomic, exclusive, manifest
from windquant.errors import WindquantError
from windquant.manifest import Manifest

FOLDERS = ("resources", "data", "results")
MEMORY = Path(".cache") / "integrity"
ENDING = ".manifest.json"
DAMAGED = ".damaged"  # what a damaged artifact is called from then on


def check(set_aside: bool = True, everything: bool = False) -> list[Path]:
    """The damaged artifacts of the project, each with a line on stderr. `everything` trusts no memory.

    A model whose links lead to files that are not there now (a disk, a cache of the Hub) is named, and stays.
    """
    damaged = []
    for artifact in artifacts():
        lost = next((path for path in artifact.rglob("*") if path.is_symlink() and not path.exists()), None)
        if lost:
            print(f"warning: {lost}: leads to {lost.readlink()}, which is not there", file=sys.stderr, flush=True)
            continue
        problem = examine(artifact, everything)
        if problem:
            damaged.append(artifact)
            what = "the next run sets it aside"
            if set_aside:
                put_aside(artifact)
                what = f"set aside as {artifact.name}{DAMAGED}, and made anew where it is needed"
            print(f"warning: {artifact}: {problem}; {what}", file=sys.stderr, flush=True)
    return damaged


def main(arguments: list[str]) -> None:
    """Read everything, as the disk has it now. WindquantError if something is damaged."""
    parser = argparse.ArgumentParser(prog="python -m windquant check", description="Compare artifacts and digests.")
    parser.parse_args(arguments)
    damaged = check(set_aside=False, everything=True)
    for artifact in damaged:
        forget(artifact)
    if damaged:
        raise WindquantError(f"{len(damaged)} of {len(list(artifacts()))} artifacts are damaged; run snakemake again")
    print(f"all {len(list(artifacts()))} artifacts are what their steps have made")


def artifacts() -> Iterator[Path]:
    """Everything that has a manifest, in order; a folder of artifacts may be a link to another disk."""
    for top in FOLDERS:
        for folder, folders, names in os.walk(top, followlinks=True):
            folders.sort()
            yield from (Path(folder, name.removesuffix(ENDING)) for name in sorted(names) if name.endswith(ENDING))


def examine(artifact: Path, everything: bool = False) -> str | None:
    """What is wrong with an artifact and its manifest; None if nothing is, or if the artifact is missing."""
    if not artifact.exists():
        return None  # Snakemake sees that by itself
    stamp = fingerprint(artifact)
    known = _recall(artifact)
    if not everything and known and known["stamp"] == stamp:
        return None
    try:
        expected = Manifest.load(artifact).output["sha256"]
    except (WindquantError, LookupError, TypeError, AttributeError):
        return "its manifest is damaged"
    own = manifest.sha256(atomic.manifest_path(artifact))
    if known and known["manifest"] != own:
        return "its manifest was changed since it was made"
    digest = manifest.sha256(artifact)
    if digest != expected:
        return f"damaged, or changed since it was made (sha256 {digest[:12]}, not {expected[:12]})"
    _memorize(artifact, stamp, own)
    return None


def remember(artifact: Path) -> None:
    """Call it when an artifact of a workflow has just been made."""
    with contextlib.suppress(OSError):
        if exclusive.LOCK.parent.is_dir():
            own = manifest.sha256(atomic.manifest_path(artifact))
            _memorize(artifact, fingerprint(artifact), own)


def forget(artifact: Path) -> None:
    """Call it when an artifact turns out to be damaged: the next workflow reads it again, and sets it aside."""
    with contextlib.suppress(OSError):
        _memory(artifact).unlink(missing_ok=True)


def put_aside(artifact: Path) -> None:
    """The artifact gets the ending `.damaged`; its manifest goes."""
    aside = artifact.with_name(artifact.name + DAMAGED)
    atomic.remove(aside)
    artifact.rename(aside)
    atomic.manifest_path(artifact).unlink(missing_ok=True)
    forget(artifact)


def fingerprint(artifact: Path) -> str:
    """Changes when a file of the artifact, or its manifest, is written to: names, sizes and times."""
    paths = sorted(path for path in artifact.rglob("*") if path.is_file()) if artifact.is_dir() else [artifact]
    lines = []
    for path in (*paths, atomic.manifest_path(artifact)):
        if path.name != manifest.SNAKEMAKE_MARK:
            stat = path.stat()
            lines.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _memory(artifact: Path) -> Path:
    return MEMORY / f"{hashlib.sha256(str(artifact).encode()).hexdigest()[:16]}.json"


def _recall(artifact: Path) -> dict[str, str] | None:
    try:
        document = json.loads(_memory(artifact).read_text())
        return {"stamp": document["stamp"], "manifest": document["manifest"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _memorize(artifact: Path, stamp: str, own: str) -> None:
    with contextlib.suppress(OSError):  # what is not remembered is read again
        MEMORY.mkdir(parents=True, exist_ok=True)
        atomic.write_text(_memory(artifact), json.dumps({"artifact": str(artifact), "stamp": stamp, "manifest": own}))
