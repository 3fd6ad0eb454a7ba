"""Progress: lines in a log, a bar on a terminal."""

import io
import itertools
import os
import pty
import sys
import termios
from pathlib import Path

import pytest

from windquant.progress import Progress, duration, line

ROOT = Path(__file__).resolve().parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is 10 seconds later."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr("windquant.progress.time.monotonic", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
def test_a_log_gets_a_line_a_minute_and_a_last_one() -> None:
    stream = io.StringIO()
    assert list(Progress(range(20), label="recovery", stream=stream)) == list(range(20))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "recovery: 6/20 (30 %), 1:10 elapsed, 2:43 left"
    assert lines[-1].startswith("recovery: 20/20 (100 %)")
    assert len(lines) == 4


def test_a_quick_loop_writes_one_line() -> None:
    stream = io.StringIO()
    list(Progress(iter("abc"), label="x", stream=stream))
    assert stream.getvalue() == "x: 3, 0:00 elapsed\n"


def test_by_hand() -> None:
    stream = io.StringIO()
    with Progress[None](total=10, label="x", stream=stream) as progress:
        progress.update(4)
        progress.update()
    progress.close()
    assert stream.getvalue() == "x: 5/10 (50 %), 0:00 elapsed, 0:00 left\n"
    with pytest.raises(TypeError, match="call update"):
        next(iter(progress))


def test_an_exception_passes_and_the_line_says_how_far_it_came() -> None:
    stream = io.StringIO()

    def broken() -> None:
        for item in Progress(range(5), label="x", stream=stream):
            if item == 2:
                raise KeyError(item)

    with pytest.raises(KeyError):
        broken()
    assert stream.getvalue().startswith("x: 2/5 (40 %)")


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    list(Progress(range(3), label="bank", stream=stream))
    assert "bank: 100%" in stream.getvalue()
    assert "3/3" in stream.getvalue()


def test_text() -> None:
    assert line("", 0, 10, 0.0) == "progress: 0/10 (0 %), 0:00 elapsed"
    assert line("a", 1, 4, 30.0) == "a: 1/4 (25 %), 0:30 elapsed, 1:30 left"
    assert [duration(s) for s in (0.4, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]


def test_reports_are_rare_and_end_with_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("windquant.progress.time.monotonic", lambda: float(next(ticks)))
    seen: list[tuple[int, int | None]] = []
    list(Progress(range(20), stream=io.StringIO(), report=lambda done, total: seen.append((done, total))))
    assert seen[0] == (1, 20)
    assert seen[-1] == (20, 20)
    assert 3 <= len(seen) <= 10


def on_a_terminal(folder: Path, code: str) -> bytes:
    """What a step shows on Snakemake's terminal; its own output goes into the file `log` of the folder."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT), 2)
        environment = {**os.environ, "WINDQUANT_TERMINAL": "yes", "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    termios.tcsetwinsize(terminal, (24, 100))
    shown = b""
    while part := read(terminal):
        shown += part
    assert os.waitpid(process, 0)[1] == 0
    return shown


def test_a_step_behind_a_pipe_shows_its_bar_on_snakemakes_terminal(tmp_path: Path) -> None:
    code = "from windquant.progress import Progress\nimport time\n"
    code += "for _ in Progress(range(4), label='bank', interval=0.1): time.sleep(0.3)"
    shown = on_a_terminal(tmp_path, code)
    assert b"bank:" in shown
    assert b"| 3/4 [" in shown
    # more lines would come through the pipe, into the middle of the bar
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("bank: 4/4 (100 %), 0:0")


ROWS = """
from windquant.progress import Progress
import subprocess, sys
if len(sys.argv) > 1:
    with Progress(total=4, label=sys.argv[1]) as bar: bar.update(4)
else:
    with Progress(total=4, label="above") as bar:
        subprocess.run([sys.executable, "-c", open("rows.py").read(), "below"], check=True)
    subprocess.run([sys.executable, "-c", open("rows.py").read(), "later"], check=True)
"""


def test_steps_side_by_side_have_a_row_each(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(ROWS)
    shown = on_a_terminal(tmp_path, ROWS)
    assert b"\n\rbelow: " in shown.replace(b"\r\n", b"\n"), "below the first one's row"
    assert b"\nabove: " not in shown.replace(b"\r", b"")
    assert b"\nlater: " not in shown.replace(b"\r", b""), "the first row is free again"


def read(terminal: int) -> bytes:
    """What is on a terminal; nothing once its process has ended."""
    try:
        return os.read(terminal, 1000)
    except OSError:
        return b""
