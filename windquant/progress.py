"""Progress with the remaining time: a bar on a terminal, one line a minute elsewhere (a Snakemake log).

The output of Snakemake's steps goes through a pipe into their logs. Where Snakemake itself runs on a terminal it says
so in TERMINAL: then the bar goes there past the pipe, and only its last state is a line in the log. Steps that run side
by side have a row each.
"""

import contextlib
import fcntl
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TextIO, TypeVar

T = TypeVar("T")
REPORT_SECONDS = 5.0
TERMINAL = "WINDQUANT_TERMINAL"  # environment: set where the steps' Snakemake runs on a terminal
ROWS = Path(".cache") / "rows"  # a file for every row of that terminal, locked as long as a bar is there


class Progress(Generic[T]):
    """Iterate over it, or call `update(n)` and `close()` (or use it in `with`)."""

    def __init__(
        self,
        iterable: Iterable[T] | None = None,
        total: int | None = None,
        label: str = "",
        stream: TextIO | None = None,
        interval: float = 60.0,  # seconds between two lines where the stream is no terminal
        report: Callable[[int, int | None], None] | None = None,  # gets done and total, every REPORT_SECONDS at most
    ) -> None:
        self.iterable = iterable
        self.total = total if total is not None else _length(iterable)
        self.label = label
        self.stream = stream or sys.stderr
        self.interval = interval
        self.done = 0
        self._report = report
        self._reported = -1
        self._report_time = -math.inf
        self.start = self._last = time.monotonic()
        self._closed = False
        self._bar = None
        self._row = contextlib.ExitStack()
        self._lines = not self.stream.isatty()
        self._terminal = _terminal() if self._lines and stream is None else None
        screen = self._terminal if self._lines else self.stream
        if screen is not None:
            from tqdm import tqdm  # here: light steps show nothing and need not pay for it

            passing = self._terminal is not None  # the last line stays, the bar does not
            self._bar = tqdm(
                total=self.total,
                desc=label or None,
                file=screen,
                dynamic_ncols=True,
                leave=not passing,
                position=self._row.enter_context(_row()) if passing else None,
            )

    def __iter__(self) -> Iterator[T]:
        if self.iterable is None:
            raise TypeError("progress without an iterable: call update()")
        try:
            for item in self.iterable:
                yield item
                self.update(1)
        finally:
            self.close()

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        self.done += n
        if self._report is not None and time.monotonic() - self._report_time >= REPORT_SECONDS:
            self._tell()
        if self._bar is not None:
            self._bar.update(n)
        # Through the pipe a line would come to the terminal too, into the middle of the bar.
        if self._lines and self._terminal is None and time.monotonic() - self._last >= self.interval:
            self._print()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._tell()
        if self._bar is not None:
            self._bar.close()
        self._row.close()
        if self._terminal is not None:
            self._terminal.close()
        if self._lines:
            self._print()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self) -> None:
        if self._report is not None and self.done != self._reported:
            self._report_time, self._reported = time.monotonic(), self.done
            self._report(self.done, self.total)

    def _print(self) -> None:
        self._last = time.monotonic()
        print(line(self.label, self.done, self.total, self._last - self.start), file=self.stream, flush=True)


def line(label: str, done: int, total: int | None, elapsed: float) -> str:
    """E.g. "recovery: 12/30 (40 %), 1:10 elapsed, 1:45 left"."""
    text = f"{label or 'progress'}: {done}"
    if total:
        text += f"/{total} ({100 * done // total} %)"
    text += f", {duration(elapsed)} elapsed"
    if total and 0 < done < total:
        text += f", {duration(elapsed / done * (total - done))} left"
    return text


def duration(seconds: float) -> str:
    """E.g. "0:07", "12:30", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _terminal() -> TextIO | None:
    """The terminal that Snakemake runs on, if it said so and this process has one."""
    if os.environ.get(TERMINAL):
        with contextlib.suppress(OSError):
            return Path("/dev/tty").open("w")
    return None


@contextlib.contextmanager
def _row() -> Iterator[int]:
    """The first row below the output that no other step's bar has."""
    with contextlib.ExitStack() as stack:
        for row in itertools.count():
            try:
                ROWS.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((ROWS / str(row)).open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:  # no place for locks: bars may write over each other
                row = 0
            break
        yield row


def _length(iterable: object) -> int | None:
    try:
        return len(iterable)  # type: ignore[arg-type]  # asked for forgiveness: generators have none
    except TypeError:
        return None
