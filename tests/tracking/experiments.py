"""What is in the MLflow store, and experiments in processes of their own."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from windquant import step

PROJECT = Path(step.__file__).parents[1]


def client() -> MlflowClient:
    return MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def all_runs(of: MlflowClient | None = None) -> list[Run]:
    """The newest first."""
    of = of or client()
    return list(of.search_runs([entry.experiment_id for entry in of.search_experiments()], max_results=5000))


def parents() -> list[Run]:
    return [run for run in all_runs() if "mlflow.parentRunId" not in run.data.tags]


def children(parent: Run | None = None) -> list[Run]:
    found = [run for run in all_runs() if "mlflow.parentRunId" in run.data.tags]
    return [run for run in found if parent is None or run.data.tags["mlflow.parentRunId"] == parent.info.run_id]


def eventually(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


WORKER = """
    import sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from windquant import step

    @dataclass(frozen=True)
    class Settings:
        seconds: float = 0.0  # to sleep

    def run(task, settings):
        for index in range(200):
            task.metric("loss", index, index)
        task.output.write_text("x")
        task.artifact(task.output)
        Path("started").touch()
        time.sleep(settings.seconds)

    def close(task, settings):
        run(task, settings)
        task.tracker.close_parent({"perplexity": 1.0}, {"result.json": task.output}, {"chunk": 64}, {"a": 1})

    if __name__ == "__main__":
        name, seconds = sys.argv[1:3]
        rest = ["--experiment", name + "_2.0bits.ppo", "--seconds", seconds]
        step.main("demo", run, Settings, argv=["--output", name, *rest], light=True)
        step.main("result", close, Settings, argv=["--output", name + "-result", *rest], light=True)
"""


def worker(folder: Path, name: str, seconds: float = 0, **environment: str) -> subprocess.Popen[str]:
    """An experiment of two steps in a process of its own, with a real sender."""
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(textwrap.dedent(WORKER))
    return subprocess.Popen(
        [sys.executable, "worker.py", name, str(seconds)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def complete(runs: list[Run], names: list[str]) -> None:
    """Every experiment has its parent and its two steps, all of them finished and with every number."""
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted((run.data.tags["model"], run.data.tags.get("step", "")) for run in runs) == sorted(
        (name, step) for name in names for step in ("", "demo", "result")
    )
    for run in runs:
        if run.data.tags.get("step"):
            assert run.data.metrics["loss"] == 199
        else:
            assert run.data.metrics == {"perplexity": 1.0}
