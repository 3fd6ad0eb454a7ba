"""Snakemake's records of what has made what, put right before it plans.

In two cases Snakemake 9.27 would end with success and an old result, or with none:

- **A step that failed.** It is recorded with the code, settings and inputs that it failed with, and its output removed.
  What is missing is made only if something else needs to run, and what was made from the last one looks current.
- **A job that was killed** between its output and Snakemake's record of it. It has a reason of its own to be made again
  (`rerun-incomplete`). Such a job hides all that follow it, and those that take its output as `ancient`, as folders are
  taken, are not run if it is there.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from windquant import atomic, integrity
from windquant.reproduce import records


def mend(alone: bool) -> None:
    """`alone`: no other workflow works here, so that what a killed one was having made may be removed."""
    with contextlib.suppress(OSError):  # in a folder that cannot be written to, nothing is made either
        if alone:
            remove_unfinished()
        distrust_failed(dict(_known()))


def remove_unfinished() -> None:
    """Remove what a killed Snakemake was having made, as it would itself, and the marks."""
    for mark, name in records.named(records.INCOMPLETE):
        output = Path(name)
        if len(output.parts) > 1 and output.parts[0] in integrity.FOLDERS and ".." not in output.parts:
            atomic.remove(output)
            mark.unlink(missing_ok=True)


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


def _write(path: Path, record: records.Record) -> None:
    atomic.write_text(path, json.dumps(record))
