"""Snakemake's records of what has made what, put right before it plans.

In three cases Snakemake 9.27 would end with success and an old result, or with none:

- **A step that failed.** It is recorded with the code, settings and inputs that it failed with, and its output removed.
  What is missing is made only if something else needs to run, and what was made from the last one looks current.
- **An experiment that has a reason to be made again**: a job with a reason of its own hides all that follow it, and
  those that take its output as `ancient` are not run if it is there. All of a plan's steps take its experiment so.
- **A job that was killed** between its output and Snakemake's record of it has such a reason, by `rerun-incomplete`.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from windquant import atomic, integrity
from windquant.reproduce import records

#: An experiment or its manifest, here or in a bucket.
EXPERIMENT = re.compile(r"(.*/)?data/experiments/[^/]+\.json")
#: What of a record makes Snakemake run a step again.
TRIGGERS = ("code", "params", "input", "software_stack_hash")


def mend(alone: bool) -> None:
    """`alone`: no other workflow works here, so that what a killed one was having made may be removed."""
    with contextlib.suppress(OSError):  # in a folder that cannot be written to, nothing is made either
        remove_unfinished(alone)
        known = dict(_known())
        free_experiments(known)
        distrust_failed(known)


def remove_unfinished(alone: bool) -> None:
    """Remove what a killed Snakemake was having made, as it would itself, and the marks; a whole experiment stays."""
    for mark, name in records.named(records.INCOMPLETE):
        output = Path(name)
        if EXPERIMENT.fullmatch(name) and ("://" in name or _whole(output)):
            mark.unlink(missing_ok=True)
        elif alone and len(output.parts) > 1 and output.parts[0] in integrity.FOLDERS and ".." not in output.parts:
            atomic.remove(output)
            mark.unlink(missing_ok=True)


def free_experiments(known: dict[str, tuple[Path, records.Record]]) -> None:
    """Experiments are made once, whatever happens to the text of their rule."""
    for name, (path, record) in known.items():
        if (free := freed(name, record)) != record:
            _write(path, free)


def freed(name: str, record: records.Record) -> records.Record:
    """The record of an artifact; of an experiment without a reason to make it again."""
    return record | dict.fromkeys(TRIGGERS) if EXPERIMENT.fullmatch(name) else record


def distrust_failed(known: dict[str, tuple[Path, records.Record]]) -> None:
    """Steps whose last attempt failed get a record that no rule agrees with.

    Their output is missing, and all that was made from it is older than the attempt. An output that somebody removed
    on purpose, after what was made from it, is not made again.
    """
    last: dict[str, float] = {}  # of what was made from an artifact
    for name, (_, record) in known.items():
        if Path(name).exists():
            for source in record.get("input") or ():
                last[source] = max(last.get(source, 0.0), record.get("endtime") or 0.0)
    for name, (path, record) in known.items():
        failed = name in last and last[name] < (record.get("starttime") or 0.0) and not Path(name).exists()
        if failed and record.get("code") != "":
            _write(path, record | {"code": ""})


def _known() -> Iterator[tuple[str, tuple[Path, records.Record]]]:
    for path, name in records.named(records.METADATA):
        with contextlib.suppress(ValueError):
            yield name, (path, json.loads(path.read_text()))


def _whole(output: Path) -> bool:
    artifact = output.with_name(output.name.removesuffix(integrity.ENDING))
    return artifact.exists() and integrity.examine(artifact) is None


def _write(path: Path, record: records.Record) -> None:
    atomic.write_text(path, json.dumps(record))
