"""One workflow at a time in a project's folder, and none that a dead one blocks.

Snakemake's own lock outlives a killed Snakemake, and then refuses the next one until somebody says `--unlock`. Ours is
held by living processes only: the kernel frees it. Who gets it knows that Snakemake's left-over lock belongs to nobody.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from windquant.errors import WindquantError

LOCK = Path(".snakemake") / "windquant.lock"
SNAKEMAKE_LOCKS = Path(".snakemake") / "locks"
RUNNING = Path(".cache") / "running"  # a file for every step that runs, locked as long as it does
#: Options of Snakemake that make it look and change nothing, by their names in its own parser.
LOOKING = frozenset(
    "dryrun lint summary detailed_summary dag rulegraph filegraph d3dag report reporter unlock cleanup_metadata "
    "list_rules list_target_rules list_changes list_input_changes list_params_changes list_untracked list_conda_envs "
    "containerize generate_unit_tests print_compilation".split()
)
_held: list[IO[str]] = []  # open for the life of the process


def claim() -> bool:
    """Make this process the folder's only workflow.

    False where the file system has no locks: whether another workflow runs is then for Snakemake's own to tell. Raises
    WindquantError with the process that has it, a workflow or a step that outlived its own.
    """
    for folder in (".", ".snakemake", ".cache", "logs", "resources", "data", "results"):
        if Path(folder).exists() and not os.access(folder, os.W_OK):
            raise WindquantError(f"{folder}: cannot be written to (read-only?); make it writable and run again")
    LOCK.parent.mkdir(exist_ok=True)
    file = LOCK.open("a+")
    try:
        mine = _lock(file)
    except OSError:
        return False
    if not mine:
        raise WindquantError(f"another snakemake works in {Path.cwd()}: {_holder(file)}")
    for path in RUNNING.glob("*.json"):
        with contextlib.suppress(FileNotFoundError), path.open("r+") as step:
            if not _lock(step):
                raise WindquantError(f"a step still runs in {Path.cwd()}, left by a killed snakemake: {_holder(step)}")
            path.unlink()
    _write(file, "snakemake")
    _held.append(file)
    shutil.rmtree(SNAKEMAKE_LOCKS, ignore_errors=True)
    return True


@contextlib.contextmanager
def running(what: str) -> Iterator[None]:
    """This process works on `what`, for the next workflow to see; no less where that cannot be written down."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if LOCK.parent.is_dir():  # a step by hand, elsewhere, leaves nothing behind
                RUNNING.mkdir(parents=True, exist_ok=True)
                path = RUNNING.absolute() / f"{socket.gethostname()}-{os.getpid()}.json"
                file = stack.enter_context(path.open("w"))
                _lock(file)
                stack.callback(path.unlink, missing_ok=True)
                _write(file, what)
        yield


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """No other process does `what` in this folder meanwhile; WindquantError tells of the one that does."""
    path = Path(".cache") / f"{what}.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as file:
        mine = True
        with contextlib.suppress(OSError):  # a file system without locks
            mine = _lock(file)
        if not mine:
            raise WindquantError(f"another {what} works in {Path.cwd()}: {_holder(file)}")
        _write(file, what)
        yield


def looks(arguments: Sequence[str]) -> bool:
    """Whether a call of Snakemake only looks, and so needs no claim."""
    from snakemake.cli import get_argument_parser

    parser = get_argument_parser()
    given, _ = parser.parse_known_args(list(arguments))
    asked = {name for name in LOOKING if getattr(given, name) != parser.get_default(name)}
    if given.report_after_run:  # the report that is asked for comes after the work
        asked -= {"report", "reporter"}
    return bool(asked)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(file: IO[str], what: str) -> None:
    file.seek(0)
    file.truncate()
    json.dump([what, os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")], file)
    file.flush()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        what, process, host, since = json.load(file)
    except ValueError:  # it has just begun
        return "wait until it is done"
    there = "" if host == socket.gethostname() else f" on {host}"
    return f"{what}, process {process}{there}, since {since}; wait until it is done, or stop it with: kill {process}"
