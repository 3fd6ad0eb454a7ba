"""What a step tells about itself, on disk first: one file of JSON lines per run in `logs/tracking/`.

The step appends and never waits for MLflow. The sender (`sender.py`) reads, passes on, and removes what has arrived. So
a store that is down, slow or gone costs a step nothing, and a killed step loses nothing that it has told.

    <run>.jsonl        the events, each with its `kind` and `time` (ms since 1970); the first one is `start`
    <run>/             copies of the artifacts
    <run>.state.json   how far the sender is, and the run's ids in the store

The writer holds a lock on its file for as long as it lives: the kernel frees it, whatever ends the writer.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from windquant import atomic

FOLDER = Path("logs") / "tracking"
SUFFIX = ".jsonl"
SENDER_LOCK = "sender.lock"
Event = dict[str, Any]


@dataclass
class State:
    """What the sender has done with a journal."""

    offset: int = 0  # bytes of the journal that have arrived
    run_id: str | None = None
    parent_id: str | None = None
    problem: str | None = None  # why nothing more has arrived
    refused: str | None = None  # the last thing that the store did not want

    @classmethod
    def load(cls, journal: Path) -> "State | None":
        try:
            return cls(**json.loads(state_path(journal).read_text()))
        except (OSError, ValueError, TypeError):  # none yet, or of another version: what has arrived is sent again
            return None

    def save(self, journal: Path) -> None:
        atomic.write_text(state_path(journal), json.dumps(asdict(self)))


class Writer:
    """The journal of one run. Raises OSError where the folder cannot be written to."""

    def __init__(self, folder: Path, **start: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder.absolute() / f"{now()}-{uuid.uuid4().hex[:12]}{SUFFIX}"  # sorts by start
        self._artifacts = 0
        self._torn = False  # whether the last line is not whole
        self._mutex = threading.Lock()
        beside = self.path.with_suffix(".new")  # a sender must never see it without its lock
        self._file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.write("start", **start)
        beside.rename(self.path)

    def write(self, kind: str, **content: Any) -> None:
        line = (json.dumps({"kind": kind, "time": now(), **content}) + "\n").encode()
        with self._mutex:
            line = b"\n" * self._torn + line  # what comes after a line that was cut off is one of its own
            self._torn = os.write(self._file, line) < len(line)
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def artifact(self, path: Path, folder: str | None, name: str, parent: bool = False) -> None:
        """Copy a file or a folder and tell about it; `parent` is whether it belongs to the experiment's run."""
        copy = artifacts(self.path) / str(self._artifacts) / name
        self._artifacts += 1
        copy.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copyfile(path, copy)
        self.write("artifact", path=str(copy.relative_to(self.path.parent)), folder=folder, parent=parent)

    def close(self) -> None:
        os.close(self._file)


def journals(folder: Path) -> list[Path]:
    """The runs that have not arrived yet, the oldest first."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
    except FileNotFoundError:
        return []


def read(journal: Path, offset: int) -> tuple[list[Event], int]:
    """The whole lines from `offset` on, and the offset behind them. A line that was cut off by a kill is not one."""
    with journal.open("rb") as file:
        file.seek(offset)
        content = file.read()
    content = content[: content.rfind(b"\n") + 1]
    events = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):  # a disk that was full in the middle of a line
            events.append(json.loads(line))
    return events, offset + len(content)


def alive(journal: Path) -> bool:
    """Whether the writer still lives."""
    with journal.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def remove(journal: Path) -> None:
    """What has arrived goes; the state stays for the writer, who waits for the journal to vanish."""
    atomic.remove(artifacts(journal))
    journal.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """States that nobody waits for, and journals that never got their name."""
    for path in folder.glob("*"):
        journal = path.with_name(path.name.partition(".")[0] + SUFFIX)
        orphan = path.name.endswith(".state.json") and not journal.exists()
        if (orphan or path.suffix == ".new") and time.time() - path.stat().st_mtime > 60:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def sending(folder: Path) -> Iterator[bool]:
    """Whether this process is now the only sender of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SENDER_LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def has_sender(folder: Path) -> bool:
    with sending(folder) as mine:
        return not mine


def artifacts(journal: Path) -> Path:
    return journal.with_suffix("")


def state_path(journal: Path) -> Path:
    return journal.with_suffix(".state.json")


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
