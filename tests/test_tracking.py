"""Tracking in a real MLflow store: parents, children, parallel writers, and everything that can go wrong."""

import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from windquant import step, tracking, tracking_store
from windquant.errors import WindquantError

PROJECT = Path(step.__file__).parents[1]


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1  # of something
    names: tuple[str, ...] = ("a", "b")  # of something


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables and nothing in them: making one takes a second."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking_store.connect(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return tmp_path


def experiment(name: str = "e.json", *argv: str) -> tracking_store.Experiment:
    argv = argv or ("--bits", "2.0", "--allocator", "ppo")
    step.main("experiment", tracking.run, tracking.Settings, argv=["--model", "m", "--output", name, *argv], light=True)
    return tracking_store.Experiment.load(Path(name))


def main(run: Callable[[step.Task, Settings], None], *argv: str) -> None:
    arguments = ["--output", "out", "--experiment", "e.json", *argv]
    step.main("demo", run, Settings, ("source?",), argv=arguments, light=True)


def client() -> MlflowClient:
    return MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def children(parent: str) -> list[Run]:
    found = client().get_experiment_by_name("windquant")
    assert found is not None
    return list(client().search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"))


def write(task: step.Task, settings: Settings) -> None:
    task.output.write_text("result")
    for index in range(3):
        task.metric("loss/a%", 1.0 / (index + 1), index)
    task.metrics({"x": 1, "bad": float("nan")})
    task.params({"found": 3, "long": "x" * 7000})
    task.artifact(task.output)
    Path("plots").mkdir(exist_ok=True)
    Path("plots/a.txt").write_text("a")
    task.artifact(Path("plots"))
    task.artifact(Path("plots/a.txt"), "texts")


def test_parent_and_child(capsys: pytest.CaptureFixture[str]) -> None:
    made = experiment()
    assert made.tracking_uri == "sqlite:///mlflow.db"  # no machine paths in data/
    assert made.run_id is not None
    parent = client().get_run(made.run_id)
    assert parent.info.run_name == "m 2.0bits ppo"
    assert parent.data.params == {"model": "m", "target_bits": "2.0", "allocator": "ppo"}
    assert parent.data.tags["mlflow.user"]

    Path("in.txt").write_text("abc")
    main(write, "--source", "in.txt", "--seed", "4")
    assert "warning" not in capsys.readouterr().err
    (run,) = children(made.run_id)
    assert json.loads(Path("out.manifest.json").read_text())["mlflow_run_id"] == run.info.run_id
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params | {"long": ""} == {
        **{"rate": "0.1", "names": "['a', 'b']", "seed": "4", "found": "3", "long": ""}
    }
    assert len(run.data.params["long"]) == 6000
    history = client().get_metric_history(run.info.run_id, "loss/a_")
    assert [(metric.step, metric.value) for metric in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert run.data.metrics["seconds"] > 0
    assert run.data.metrics["peak_memory_bytes.host"] > 10 << 20
    tags = run.data.tags
    assert {name: tags[name] for name in ("model", "target_bits", "allocator", "step", "seed")} == {
        **{"model": "m", "target_bits": "2.0", "allocator": "ppo", "step": "demo", "seed": "4"}
    }
    assert tags["mlflow.source.name"] == "demo"
    assert run.inputs is not None
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.tags[0].value) == ("source", "demo")
    assert data.dataset.digest == json.loads(Path("out.manifest.json").read_text())["inputs"]["source"]["sha256"][:36]
    root = Path("mlartifacts") / run.info.run_id / "artifacts"
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == {
        *("out", "plots/a.txt", "texts/a.txt")
    }
    assert (root / "out").read_text() == "result"


def test_git_commit_is_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windquant.manifest.git_state", lambda: ("c" * 40, True))
    tags = tracking_store.source_tags("x")
    assert (tags["mlflow.source.git.commit"], tags["git_dirty"]) == ("c" * 40, "true")


def test_closing_the_parent() -> None:
    made = experiment()

    def close(task: step.Task, settings: Settings) -> None:
        task.output.write_text("{}")
        task.tracker.close_parent({"perplexity.t": 50.0}, {"result.json": task.output}, {"chunk": 64})
        assert task.tracker.parent_id == made.run_id

    main(write)
    main(close)
    main(close, "--rate", "2")  # a second result of the same experiment
    assert made.run_id is not None
    parent = client().get_run(made.run_id)
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"perplexity.t": 50.0})
    assert (Path("mlartifacts") / made.run_id / "artifacts" / "result.json").read_text() == "{}"
    assert [run.data.tags["chunk"] for run in children(made.run_id)] == ["64"] * 3


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("bug"), "FAILED"), (WindquantError("input"), "FAILED"), (SystemExit(143), "KILLED")],
)
def test_a_failing_step(error: BaseException, status: str) -> None:
    made = experiment()

    def fail(task: step.Task, settings: Settings) -> None:
        task.metric("loss", 3.0)
        raise error

    with pytest.raises((RuntimeError, SystemExit)):
        main(fail)
    assert made.run_id is not None
    (run,) = children(made.run_id)
    assert (run.info.status, run.data.metrics["loss"]) == (status, 3.0)
    assert str(error) in run.data.tags["error"]
    assert client().get_run(made.run_id).info.status == "RUNNING"  # the experiment goes on


def test_without_an_experiment_nothing_is_tracked() -> None:
    step.main("demo", write, Settings, argv=["--output", "out"], light=True)
    assert json.loads(Path("out.manifest.json").read_text())["mlflow_run_id"] is None
    assert not Path("mlartifacts").exists()


def test_a_refused_value_does_not_stop_step_or_run(capsys: pytest.CaptureFixture[str]) -> None:
    made = experiment()

    def run(task: step.Task, settings: Settings) -> None:
        task.tracker.flush()  # type: ignore[attr-defined]  # a ChildRun
        task.params({"rate": "another"})  # parameters cannot change
        task.output.write_text("x")

    main(run)
    assert Path("out").exists()
    assert capsys.readouterr().err.count("warning: MLflow: sending values failed") == 1
    assert made.run_id is not None
    assert children(made.run_id)[0].info.status == "FINISHED"


def test_random_numbers_are_those_of_an_untracked_step() -> None:
    drawn: list[float] = []

    def run(task: step.Task, settings: Settings) -> None:
        drawn.append(random.random())
        task.metric("x", 1.0)
        task.artifact(Path("e.json"))
        drawn.append(random.random())
        task.output.touch()

    experiment()
    main(run)
    step.main("demo", run, Settings, argv=["--output", "out"], light=True)
    assert drawn[:2] == drawn[2:]


def test_a_lost_parent_is_made_anew_once(capsys: pytest.CaptureFixture[str], empty_store: Path) -> None:
    made = experiment()
    Path("mlflow.db").write_bytes(empty_store.read_bytes())
    main(write)
    main(write)
    found = client().get_experiment_by_name("windquant")
    assert found is not None
    runs = client().search_runs([found.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 3
    assert len(parents) == 1
    assert parents[0].info.run_id != made.run_id
    assert parents[0].data.tags["model"] == "m"
    assert len(children(parents[0].info.run_id)) == 2
    assert "warning" not in capsys.readouterr().err


def test_the_environment_names_another_store(monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> None:
    experiment()
    Path("elsewhere").mkdir()
    Path("elsewhere/other.db").write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere/other.db")
    main(write)
    with sqlite3.connect("elsewhere/other.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (2,)
    assert len(list(Path("elsewhere/mlartifacts").iterdir())) == 1


@pytest.mark.parametrize("kind", ["refuses", "never answers"])
def test_a_dead_server_costs_seconds(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "never answers":
            server.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        begin = time.monotonic()
        assert experiment().run_id is None
        main(write)
    assert time.monotonic() - begin < 30
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("warning: MLflow: ") for line in lines)
    assert Path("out").read_text() == "result"
    assert json.loads(Path("out.manifest.json").read_text())["mlflow_run_id"] is None


def test_a_server_that_comes_back_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment()
    connect = tracking_store.connect
    calls: list[str] = []

    def once_dead(uri: str) -> Any:
        calls.append(uri)
        if len(calls) == 1:
            raise ConnectionError("refused")
        return connect(uri)

    monkeypatch.setattr(tracking_store, "connect", once_dead)
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.0)

    def run(task: step.Task, settings: Settings) -> None:
        for index in range(2500):
            task.metric("loss", 1.0, index)
        task.params({f"p{index}": index for index in range(150)})
        task.output.touch()

    main(run)
    assert len(calls) == 2
    assert made.run_id is not None
    (found,) = children(made.run_id)
    assert len(client().get_metric_history(found.info.run_id, "loss")) == 2500
    assert len(found.data.params) == 153


def test_broken_database(capsys: pytest.CaptureFixture[str]) -> None:
    experiment()
    Path("mlflow.db").write_text("no database " * 1000)
    main(write)
    assert Path("out").read_text() == "result"
    assert "warning: MLflow" in capsys.readouterr().err


def test_metrics_are_sent_while_the_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment()
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.0)
    seen: list[tuple[str, float]] = []

    def run(task: step.Task, settings: Settings) -> None:
        task.metric("loss", 2.0)
        assert made.run_id is not None
        (found,) = children(made.run_id)
        seen.append((found.info.status, found.data.metrics["loss"]))
        task.output.touch()

    main(run)
    assert seen == [("RUNNING", 2.0)]


WORKER = """
    import sys
    from dataclasses import dataclass
    from windquant import step, tracking

    @dataclass(frozen=True)
    class Settings:
        rate: float = 0.1  # of something

    def run(task, settings):
        for index in range(200):
            task.metric("loss", index, index)
            task.tracker.flush() if index % 20 == 0 else None
        task.output.write_text("x")
        task.artifact(task.output)

    name = sys.argv[1]
    argv = ["--model", name, "--output", name + ".json"]
    step.main("experiment", tracking.run, tracking.Settings, argv=argv, light=True)
    step.main("demo", run, Settings, argv=["--output", name, "--experiment", name + ".json"], light=True)
"""


def test_processes_at_once_on_a_store_that_is_not_there_yet() -> None:
    Path("mlflow.db").unlink()
    Path("worker.py").write_text(textwrap.dedent(WORKER))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    names = [f"m{index}" for index in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "worker.py", name], env=environment, stderr=subprocess.PIPE, text=True)
        for name in names
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert errors == [""] * 3
    assert [process.returncode for process in processes] == [0] * 3
    for name in names:
        parent = tracking_store.Experiment.load(Path(f"{name}.json")).run_id
        assert parent is not None
        (run,) = children(parent)
        assert (run.info.status, run.data.tags["model"]) == ("FINISHED", name)
        assert len(client().get_metric_history(run.info.run_id, "loss")) == 200
