"""One workflow at a time, and nothing that the dead hold. (tests/workflow/test_faults.py does it with Snakemake.)"""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from windquant import exclusive
from windquant.errors import WindquantError

CLAIM = """
import sys, time
from windquant import exclusive
if sys.argv[1] == "snakemake":
    exclusive.claim()
    print("ready", flush=True)
    time.sleep(60)
else:
    with exclusive.running("step demo, which makes out"):
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exclusive, "_held", [])


def start(what: str) -> subprocess.Popen[str]:
    path = str(Path(exclusive.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, what], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("what", ["snakemake", "step"])
def test_who_lives_is_named_and_who_is_dead_blocks_nobody(what: str) -> None:
    Path(".snakemake").mkdir()
    process = start(what)
    Path(".snakemake/locks").mkdir(parents=True)
    Path(".snakemake/locks/0.output.lock").write_text("left over")
    with pytest.raises(WindquantError, match=f"process {process.pid}, since .* stop it with: kill {process.pid}$"):
        exclusive.claim()
    assert Path(".snakemake/locks").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert exclusive.claim() is True
    assert not Path(".snakemake/locks").exists()
    assert not list(Path(".cache").rglob("*.json"))


def test_alone() -> None:
    with exclusive.alone("verify"):
        holder = rf"another verify works in .*: verify, process {os.getpid()}, since"
        with pytest.raises(WindquantError, match=holder), exclusive.alone("verify"):
            pass
        with exclusive.alone("another"):
            pass
    with exclusive.alone("verify"):
        pass


def test_a_step_by_hand_leaves_nothing() -> None:
    with exclusive.running("x"):
        assert not list(Path().iterdir())
    Path(".snakemake").mkdir()
    with exclusive.running("x"):
        (path,) = Path(".cache/running").iterdir()
        assert json.loads(path.read_text())[:2] == ["x", os.getpid()]
    assert not list(Path(".cache/running").iterdir())


@pytest.mark.parametrize(
    "call",
    [
        "-n x",
        "--dry-run",
        "--dryrun",
        "-np",
        "--lint",
        "--summary x",
        "--unlock",
        "-c1 -n",
        "--report",
        "--report x.html",
        "--report=x.html --cores 1",
        "-n --report --report-after-run",
        "-nc1 x",
        "-npj4 x",
        "--dag=mermaid-js x",
        "--rulegraph=dot x",
        "--list-changes code",
        "--cleanup-metadata x",
    ],
)
def test_calls_that_look(call: str) -> None:
    assert exclusive.looks(call.split())


@pytest.mark.parametrize(
    "call",
    [
        "--cores 1 x",
        "-c 1 -p x",
        "-j4",
        "results/-n-.json --cores all",
        "--until bank -c1",
        "-Rbank -c1 x",
        "-Uquantize -c1 x",
        "--report --report-after-run -c1",
        "--report-after-run --report=x.html -c1 x",
    ],
)
def test_calls_that_work(call: str) -> None:
    assert not exclusive.looks(call.split())


def test_without_locks_nobody_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(exclusive.fcntl, "flock", refuse)
    assert exclusive.claim() is False
