"""Experiments in processes of their own, with the real sender: eight at once, killed, and without MLflow."""

import os
import signal
import time
from pathlib import Path

from tests.tracking.experiments import PROJECT, all_runs, children, client, complete, eventually, parents, worker
from windquant import journal


def test_eight_experiments_at_once_into_one_sqlite_store_that_is_not_there_yet(tmp_path: Path) -> None:
    Path("mlflow.db").unlink()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    names = [f"m{index}" for index in range(8)]
    processes = [worker(tmp_path / name, name, MLFLOW_TRACKING_URI=uri) for name in names]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert errors == [""] * 8
    complete(all_runs(), names)
    for run in all_runs():
        if "step" in run.data.tags:
            assert len(client().get_metric_history(run.info.run_id, "loss")) == 200


def test_a_killed_step_is_reported_and_the_next_one_goes_on(tmp_path: Path) -> None:
    killed = worker(tmp_path, "m", 60)
    eventually(lambda: Path("started").exists())
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    run = eventually(lambda: [run for run in children() if run.info.status != "RUNNING"])[0]
    assert run.info.status == "KILLED"
    assert "out of memory?" in run.data.tags["error"]
    assert run.data.metrics["loss"] == 199, "what it had told is not lost"
    assert worker(tmp_path, "m").communicate(timeout=60)[1] == ""
    (parent,) = parents()
    assert parent.info.status == "FINISHED"
    assert sorted(run.info.status for run in children(parent)) == ["FINISHED", "FINISHED", "KILLED"]


def test_an_mlflow_that_cannot_be_imported_costs_seconds(tmp_path: Path) -> None:
    (tmp_path / "broken" / "mlflow").mkdir(parents=True)
    (tmp_path / "broken" / "mlflow" / "__init__.py").write_text("raise ImportError('half an update')")
    begin = time.monotonic()
    process = worker(tmp_path, "m", PYTHONPATH=f"{PROJECT}{os.pathsep}{tmp_path / 'broken'}")
    errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 0
    assert time.monotonic() - begin < 30
    assert len(errors) == 2
    assert "no answer, see logs/tracking/sender.txt" in errors[0]
    assert "half an update" in Path("logs/tracking/sender.txt").read_text()
    assert len(journal.journals(Path("logs/tracking"))) == 2
