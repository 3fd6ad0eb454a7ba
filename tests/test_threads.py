"""How many threads a step takes."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from windquant import control_groups, step
from windquant.manifest import Manifest


@dataclass(frozen=True)
class Settings:
    pass


def write(task: step.Task, settings: Settings) -> None:
    task.output.touch()


@pytest.mark.parametrize(
    ("flags", "wanted", "threads"),
    [
        ((), None, "64"),
        ((), "3", "3"),
        ((), "3,1", "3"),
        ((), "128", "64"),
        ((), "many", "64"),
        ((), "0", "64"),
        (("--threads", "5"), "3", "5"),
        (("--threads", "128"), None, "64"),
    ],
)
def test_those_asked_for_then_those_of_openmp_then_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], wanted: str | None, threads: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(control_groups, "cores", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    step.main("demo", write, Settings, argv=["--output", "out", *flags], light=True)
    assert Manifest.load(Path("out")).machine["threads"] == threads
