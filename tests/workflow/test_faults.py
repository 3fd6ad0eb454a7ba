"""Killed at random moments, two at once, a full disk, damaged artifacts: the workflow ends with the undisturbed bytes.

WINDQUANT_KILLS=50 asks for more kills than CI's minutes allow.
"""

import base64
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.workflow.conftest import BITS, GREEDY, MODEL, RESULT, Snakemake
from windquant import atomic, manifest

T = TypeVar("T")
KILLS = int(os.environ.get("WINDQUANT_KILLS", "3"))
#: What differs between two runs of the same thing, in the result and nowhere else.
MEASURED = ("seconds", "peak_memory_bytes", "mlflow_run_id")
ARTIFACTS = [
    f"resources/models/{MODEL}",
    f"data/calibration/{MODEL}",
    f"data/statistics/{MODEL}.safetensors",
    f"data/bank/{MODEL}.safetensors",
    f"data/search/{MODEL}_ppo.safetensors",
    f"data/plans/{MODEL}_{BITS}bits.ppo.json",
    f"data/checkpoints/{MODEL}_{BITS}bits.ppo/before_recovery",
    f"data/checkpoints/{MODEL}_{BITS}bits.ppo/quantized",
    f"data/evaluation/{MODEL}.original.perplexity.json",
    f"data/evaluation/{MODEL}.original.zero_shot.cloze.json",
    f"data/evaluation/{MODEL}_{BITS}bits.ppo.before_recovery.perplexity.json",
    f"data/evaluation/{MODEL}_{BITS}bits.ppo.quantized.perplexity.json",
    f"data/evaluation/{MODEL}_{BITS}bits.ppo.quantized.zero_shot.cloze.json",
]
SEARCH, CHECKPOINT = 4, 6  # where in ARTIFACTS these are


def content(folder: Path) -> dict[str, Any]:
    """Digests of all artifacts as they are, and the result without what is measured anew each time."""
    result = json.loads((folder / RESULT).read_text())
    digests = {name: manifest.sha256(folder / name) for name in ARTIFACTS}
    return {**digests, RESULT: {key: value for key, value in result.items() if key not in MEASURED}}


class Run:
    """`snakemake` in a process group of its own, output in `<folder>/run.log`."""

    def __init__(self, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MLFLOW"))}
        command = [str(Path(sys.executable).with_name("snakemake")), "--cores", "1", RESULT]
        with (folder / "run.log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by itself."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def runs(folder: Path) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([entry.experiment_id for entry in client.search_experiments()], max_results=5000)
    return [run for run in found if "step" in run.data.tags]


def test_killed_at_random_moments(
    tiny_clone: Callable[[], Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill -9 of the whole group, again and again, from the search until the workflow is through; then from nothing."""
    expected, chance = content(finished), random.Random(0)
    kills, rounds, folder = 0, 0, tmp_path / "clone"
    shutil.copytree(finished, folder, symlinks=True)
    for name in [*ARTIFACTS[SEARCH:], RESULT]:
        atomic.remove(folder / name)
        (folder / f"{name}.manifest.json").unlink()
    during: dict[str, int] = {}
    while kills < KILLS or rounds == 0:
        run = Run(folder)
        # Starting Snakemake and importing torch takes about five seconds; a moment after that is in a step's work.
        if not run.wait(chance.uniform(0.1, 12.0) if kills < KILLS else 600):
            run.kill()
            kills += 1
            jobs = [line for line in (folder / "run.log").read_text().splitlines() if line.startswith("Job ")]
            step = jobs[-1].partition(": ")[2].partition(":")[0] if jobs else "start"
            during[step] = during.get(step, 0) + 1
            continue
        assert run.process.returncode == 0, (folder / "run.log").read_text()[-5000:]
        assert content(folder) == expected
        assert not list(folder.rglob("*.partial-*"))
        rounds += 1
        if kills < KILLS:
            folder = tiny_clone()
    with capsys.disabled():
        print(f"\n{kills} kills in {rounds} rounds, during {during}")
    deadline = time.monotonic() + 30
    while any(run.info.status == "RUNNING" for run in runs(folder)):  # the sender reports the dead
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert {run.info.status for run in runs(folder)} <= {"FINISHED", "KILLED"}


def test_a_job_killed_before_its_record_hides_no_other_step(
    tiny_clone: Callable[[], Path], snakemake: Snakemake
) -> None:
    """Snakemake alone would make the model again, and nothing that takes its folder as `ancient`."""
    folder, model = tiny_clone(), ARTIFACTS[0]
    assert snakemake(folder, model).returncode == 0
    for name in (model, f"{model}.manifest.json"):
        identity = base64.urlsafe_b64encode(name.encode()).decode()
        (folder / ".snakemake/metadata" / identity).rename(folder / ".snakemake/incomplete" / identity)
    done = snakemake(folder, ARTIFACTS[1])
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / ARTIFACTS[1]).exists()
    assert not list((folder / ".snakemake/incomplete").iterdir())


def test_a_step_that_failed_is_made_again(tiny_clone: Callable[[], Path], snakemake: Snakemake) -> None:
    """Snakemake alone takes the attempt for a success: what was made from the last one would stay as it is."""
    folder = tiny_clone()
    assert snakemake(folder, ARTIFACTS[1]).returncode == 0
    before = (folder / f"{ARTIFACTS[1]}.manifest.json").read_text()
    module = folder / "windquant/models.py"  # a new version, which fails for a reason outside of it
    begin = "\nimport os\nif os.path.exists('full'):\n    raise SystemExit('the disk is full')\nimport "
    module.write_text(module.read_text().replace("\nimport ", begin, 1))
    (folder / "full").touch()
    assert snakemake(folder, ARTIFACTS[1]).returncode == 1
    assert not (folder / ARTIFACTS[0]).exists()
    (folder / "full").unlink()
    done = snakemake(folder, ARTIFACTS[1])
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / ARTIFACTS[0]).exists()
    assert (folder / f"{ARTIFACTS[1]}.manifest.json").read_text() != before


def test_two_at_once_and_a_step_that_outlives_its_workflow(
    tiny_clone: Callable[[], Path], snakemake: Snakemake
) -> None:
    folder = tiny_clone()
    first = Run(folder)
    try:
        wait_for(lambda: (folder / ".snakemake/locks").exists())
        step = wait_for(lambda: halted_step(folder))
        second = snakemake(folder, RESULT)
        assert second.returncode == 1
        (line,) = [line for line in second.stdout.splitlines() if line.startswith("error: ")]
        assert "another snakemake works in" in line
        assert f"kill {first.process.pid}" in line
        assert "Traceback" not in second.stdout
        assert snakemake(folder, "-n", RESULT).returncode == 0, "to look is no conflict"
        first.process.kill()  # Snakemake alone
        first.process.wait()
        third = snakemake(folder, RESULT)
        assert "a step still runs in" in third.stdout
        assert f"kill {step}" in third.stdout
        assert third.returncode == 1
    finally:
        os.killpg(first.process.pid, signal.SIGKILL)
    again = snakemake(folder, ARTIFACTS[0])  # goes on, without --unlock
    assert again.returncode == 0, again.stdout


def halted_step(folder: Path) -> int | None:
    """Process of a running step, which halts from now on; none if there is none, or it has just ended."""
    for path in (folder / ".cache/running").glob("*.json"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, json.JSONDecodeError):
            process = int(json.loads(path.read_text())[1])
            os.kill(process, signal.SIGSTOP)
            path.stat()
            return process
    return None


def wait_for(condition: Callable[[], T]) -> T:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def replace(path: Path, data: bytes) -> None:
    path.unlink()  # a local model's files are links to the user's own
    path.write_bytes(data)


def truncate(path: Path) -> None:
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    replace(path, bytes(data))


def empty(path: Path) -> None:
    replace(path, b"")


def delete(path: Path) -> None:
    path.unlink()


DAMAGES = (truncate, flip, empty, delete)


def a_file(artifact: Path) -> Path:
    """The artifact, or the largest file of its folder."""
    files = [path for path in artifact.rglob("*") if path.name != manifest.SNAKEMAKE_MARK]
    return max(files, key=lambda path: path.stat().st_size) if artifact.is_dir() else artifact


@pytest.fixture
def look(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """The artifacts that a look at the finished workflow finds damaged; every file is put back after the test."""
    from windquant import integrity

    monkeypatch.chdir(finished)
    kept = {path: (path.read_bytes(), path.stat()) for path in map(Path, ARTIFACTS) for path in [a_file(path)]}
    kept |= {path: (path.read_bytes(), path.stat()) for name in ARTIFACTS for path in [Path(f"{name}.manifest.json")]}
    yield lambda: [str(path) for path in integrity.check(set_aside=False)]
    for path, (data, stat) in kept.items():
        replace(path, data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("damage", DAMAGES[:3])
@pytest.mark.parametrize("name", ARTIFACTS)
def test_every_damage_is_found(name: str, damage: Callable[[Path], None], look: Callable[[], list[str]]) -> None:
    assert look() == []
    damage(a_file(Path(name)))
    assert look() == [name]


@pytest.mark.parametrize("damage", DAMAGES[:3])
def test_damaged_manifests_are_found(damage: Callable[[Path], None], look: Callable[[], list[str]]) -> None:
    for name in ARTIFACTS:
        damage(Path(f"{name}.manifest.json"))
    assert sorted(look()) == sorted(ARTIFACTS)


def test_damage_without_a_trace_is_found_by_who_reads_it(look: Callable[[], list[str]]) -> None:
    from windquant import integrity, step
    from windquant.errors import WindquantError

    name = ARTIFACTS[3]
    assert look() == []
    stat = Path(name).stat()
    flip(Path(name))
    os.utime(name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert look() == [], "that is what the disk says"
    with pytest.raises(WindquantError, match=f"{name}: damaged"):
        step._digest("bank", Path(name))
    assert look() == [name], "from then on the workflow knows"
    integrity.remember(Path(name))
    with pytest.raises(WindquantError, match=r"1 of \d+ artifacts are damaged"):
        integrity.main([])
    assert look() == [name]


def test_a_machine_without_room_has_nothing_to_do_for_a_result_that_is_there(
    finished: Path, snakemake: Snakemake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINDQUANT_MEMORY", "0.01")
    done = snakemake(finished, GREEDY)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Nothing to be done" in done.stdout
    (finished / GREEDY).unlink()
    done = snakemake(finished, GREEDY)
    assert "of memory, this machine has" in done.stdout


def test_damaged_artifacts_are_made_again(finished: Path, snakemake: Snakemake) -> None:
    """From the checkpoint on, each artifact in another way, half of the manifests too; one run mends all of it."""
    expected, damaged = content(finished), []
    for index, name in enumerate([*ARTIFACTS[CHECKPOINT:], RESULT]):
        damage = DAMAGES[index % len(DAMAGES)]
        damage(a_file(finished / name))
        noticed = damage is not delete or (finished / name).is_dir()
        if index % 2:
            damage = DAMAGES[index // 2 % len(DAMAGES)]
            damage(finished / f"{name}.manifest.json")
            noticed = noticed and damage is not delete  # without its manifest it is not made yet, to Snakemake too
        if noticed:
            damaged.append(name)
    done = snakemake(finished, RESULT)
    assert done.returncode == 0, done.stdout[-5000:]
    for name in damaged:
        assert f"warning: {name}: " in done.stdout
    assert content(finished) == expected
    assert "Nothing to be done" in snakemake(finished, RESULT).stdout
