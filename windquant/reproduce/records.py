"""Snakemake's records of what made each artifact, in one file that travels with the data.

Without them a clone would make everything again: Snakemake takes an artifact for current if the settings, code and
inputs that it wrote down when it made it are still those of the workflow. It keeps one JSON file per artifact in
.snakemake/metadata, under the name of the artifact in base 64.
"""

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from windquant import atomic
from windquant.errors import WindquantError

Record = dict[str, Any]
STATE = Path(".snakemake")
METADATA, INCOMPLETE = STATE / "metadata", STATE / "incomplete"
NAME_LENGTH = 255  # Snakemake cuts longer names into folders


def record_path(artifact: str) -> Path:
    """The record of an artifact, relative to a folder of Snakemake's, as Snakemake names it."""
    text = base64.urlsafe_b64encode(artifact.encode()).decode()
    parts = [text[start : start + NAME_LENGTH - 1] for start in range(0, len(text), NAME_LENGTH - 1)]
    return Path(*("@" + part for part in parts[:-1]), parts[-1])


def read(root: Path) -> dict[str, Record]:
    """Artifact -> record, of all finished artifacts that exist in the project; sorted."""
    return {artifact: record for artifact, record in sorted(_all(root)) if (root / artifact).exists()}


def _all(root: Path) -> Iterator[tuple[str, Record]]:
    for path, artifact in named(root / METADATA):
        if not (root / INCOMPLETE / path.relative_to(root / METADATA)).exists():
            with contextlib.suppress(ValueError):  # half a record of a killed process: Snakemake ignores it too
                yield artifact, json.loads(path.read_text())


def named(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of one of Snakemake's folders, and the artifact that each is about."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        text = "".join(part.removeprefix("@") for part in path.relative_to(folder).parts)
        with contextlib.suppress(ValueError):  # not Snakemake's
            yield path, base64.urlsafe_b64decode(text).decode()


def write(root: Path, records: dict[str, Record]) -> None:
    """Make Snakemake take the artifacts for what the records say, and for as old as they were where they were made.

    The times keep Snakemake from comparing contents: an artifact is never younger than what was made from it.
    """
    for folder in (METADATA, INCOMPLETE):  # with one and not the other Snakemake believes in an old version of itself
        (root / folder).mkdir(parents=True, exist_ok=True)
    for artifact, record in records.items():
        path = root / METADATA / record_path(artifact)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(record))
        (root / INCOMPLETE / record_path(artifact)).unlink(missing_ok=True)
        if (root / artifact).is_file() and (time := record.get("endtime")):
            os.utime(root / artifact, (time, time))


def save(path: Path, records: dict[str, Record]) -> None:
    """Write records to the file that travels."""
    atomic.write_text(path, json.dumps(records, indent=1, sort_keys=True) + "\n")


def load(path: Path) -> dict[str, Record]:
    """The records of the file that travels; WindquantError if it is missing or damaged."""
    try:
        records: dict[str, Record] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WindquantError(
            f"{path}: no readable records of Snakemake ({error}); the author sends them with `make push`"
        ) from error
    return records
