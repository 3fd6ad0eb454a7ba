"""Tracking in a real MLflow store: parents, children, and what becomes of them when something dies."""

import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tracking.experiments import children, client, eventually, parents
from windquant import delivery, journal, sender, step, tracking, tracking_store
from windquant.errors import WindquantError


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1  # of something
    names: tuple[str, ...] = ("a", "b")  # of something


@pytest.fixture(autouse=True)
def quick_sender(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The sender in a thread of this process, which has MLflow loaded already; some tests want the real one."""
    threads: list[threading.Thread] = []

    def start(folder: Path) -> bool:
        if not journal.has_sender(folder):
            threads.append(threading.Thread(target=sender.serve, args=(folder, 0.5)))
            threads[-1].start()
            time.sleep(0.05)
        return True

    monkeypatch.setattr(tracking, "start_sender", start)
    monkeypatch.setattr(delivery, "BATCH", 0.1)
    yield
    for thread in threads:
        thread.join()


def main(run: Callable[[step.Task, Settings], None], *argv: str) -> None:
    arguments = ["--output", "out", "--experiment", "m_2.0bits.ppo", *argv]
    step.main("demo", run, Settings, ("source?",), argv=arguments, light=True)


def manifest_run() -> str | None:
    found: str | None = json.loads(Path("out.manifest.json").read_text())["mlflow_run_id"]
    return found


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


def close(task: step.Task, settings: Settings) -> None:
    task.output.write_text("{}")
    task.tracker.dataset("texts", "data/texts", "0" * 64, "texts", parent=True)
    task.tracker.close_parent(
        {"perplexity.t": 50.0}, {"result.json": task.output}, {"chunk": 64}, {"bank.chunk": 64}, "| table |"
    )
    task.note("parent", task.tracker.parent_id)


def test_parent_and_child(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.txt").write_text("abc")
    Path("data.dvc").write_text("outs:\n- md5: 0123abcd.dir\n  path: data\n")
    main(write, "--source", "in.txt", "--seed", "4")
    assert "warning" not in capsys.readouterr().err
    (parent,) = parents()
    assert parent.info.run_name == "m 2.0bits ppo"
    assert parent.data.params == {"model": "m", "target_bits": "2.0", "allocator": "ppo"}
    assert parent.data.tags["mlflow.user"]

    (run,) = children(parent)
    assert manifest_run() == run.info.run_id
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params | {"long": ""} == {
        **{"rate": "0.1", "names": "['a', 'b']", "seed": "4", "found": "3", "long": ""}
    }
    assert len(run.data.params["long"]) == 6000
    history = client().get_metric_history(run.info.run_id, "loss/a_")
    assert [(metric.step, metric.value) for metric in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert run.data.metrics["seconds"] > 0
    assert run.data.metrics["peak_memory_bytes.host"] > 10 << 20
    assert 0 <= run.data.metrics["system/cpu_utilization_percentage"] <= 100
    tags = run.data.tags
    assert {name: tags[name] for name in ("model", "target_bits", "allocator", "step", "seed", "artifact")} == {
        **{"model": "m", "target_bits": "2.0", "allocator": "ppo", "step": "demo", "seed": "4", "artifact": "out"}
    }
    assert (tags["mlflow.source.name"], tags["dvc.data"]) == ("windquant.demo", "0123abcd")
    assert run.inputs is not None
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.tags[0].value) == ("source", "demo")
    assert data.dataset.digest == json.loads(Path("out.manifest.json").read_text())["inputs"]["source"]["sha256"][:36]
    root = Path("mlartifacts") / run.info.run_id / "artifacts"
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == {
        *("out", "plots/a.txt", "texts/a.txt")
    }
    assert (root / "out").read_text() == "result"
    assert {path.name for path in Path("logs/tracking").iterdir()} <= {"sender.lock", "sender.txt"}


def test_git_commit_is_a_tag() -> None:
    tags = tracking.source_tags("c" * 40, True)
    assert (tags["mlflow.source.git.commit"], tags["git_dirty"]) == ("c" * 40, "true")
    assert "git_dirty" not in tracking.source_tags(None, None)


def test_a_result_closes_the_parent_and_what_runs_later_opens_another() -> None:
    main(write)
    main(close)
    (first,) = parents()
    assert (first.info.status, first.data.metrics) == ("FINISHED", {"perplexity.t": 50.0})
    assert first.data.params["bank.chunk"] == "64"
    assert first.data.tags["mlflow.note.content"] == "| table |"
    assert first.inputs is not None
    assert [data.dataset.name for data in first.inputs.dataset_inputs] == ["texts"]
    assert not [run for run in children(first) if "mlflow.note.content" in run.data.tags]
    assert (Path("mlartifacts") / first.info.run_id / "artifacts" / "result.json").read_text() == "{}"
    assert [run.data.tags["chunk"] for run in children(first)] == ["64"] * 2
    assert json.loads(Path("out.manifest.json").read_text())["notes"]["parent"] == first.info.run_id
    main(close, "--rate", "2")
    second, first = parents()
    assert len(children(first)) == 2
    assert len(children(second)) == 1
    assert second.info.status == "FINISHED"


def test_between_the_steps_a_parent_does_not_run() -> None:
    main(write)
    main(write, "--experiment", "m")
    found = {run.info.run_name: run.info.run_id for run in parents()}
    assert set(found) == {"m 2.0bits ppo", "m shared steps"}
    statuses = {"m 2.0bits ppo": "SCHEDULED", "m shared steps": "FINISHED"}
    eventually(lambda: {name: client().get_run(run).info.status for name, run in found.items()} == statuses)
    main(write)
    assert client().get_run(found["m 2.0bits ppo"]).info.status == "RUNNING"


def test_a_parent_that_was_deleted_keeps_no_other_running() -> None:
    main(write, "--experiment", "m")
    main(write)
    to = delivery.Store(tracking_store.address())
    ids = [run.info.run_id for run in parents()]
    eventually(lambda: not journal.has_sender(Path("logs/tracking")))
    for first, other in (ids, ids[::-1]):
        client().update_run(other, status="RUNNING")
        client().delete_run(first)
        to.parents = {first: {}, other: {}}
        to.settle()
        assert client().get_run(other).info.status in ("SCHEDULED", "FINISHED")
        client().restore_run(first)


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("bug"), "FAILED"), (WindquantError("input"), "FAILED"), (SystemExit(143), "KILLED")],
)
def test_a_failing_step(error: BaseException, status: str) -> None:

    def fail(task: step.Task, settings: Settings) -> None:
        task.metric("loss", 3.0)
        raise error

    with pytest.raises((RuntimeError, SystemExit)):
        main(fail)
    run = eventually(lambda: [run for run in children() if run.info.status != "RUNNING"])[0]
    assert (run.info.status, run.data.metrics["loss"]) == (status, 3.0)
    assert str(error) in run.data.tags["error"]
    eventually(lambda: parents()[0].info.status == status)
    main(write)
    assert parents()[0].info.status == "RUNNING"  # the experiment goes on


def test_without_an_experiment_nothing_is_tracked() -> None:
    step.main("demo", write, Settings, argv=["--output", "out"], light=True)
    assert manifest_run() is None
    assert not Path("logs").exists()


def test_a_refused_value_does_not_stop_step_or_run(capsys: pytest.CaptureFixture[str]) -> None:

    def run(task: step.Task, settings: Settings) -> None:
        task.params({"rate": "another"})  # parameters cannot change
        task.output.write_text("x")

    main(run)
    assert Path("out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "refused a part of this run" in line
    assert children()[0].info.status == "FINISHED"


def test_random_numbers_are_those_of_an_untracked_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def run(task: step.Task, settings: Settings) -> None:
        drawn.append(random.random())
        task.metric("x", 1.0)
        task.artifact(Path("e.json"))
        drawn.append(random.random())
        task.output.touch()

    monkeypatch.setattr(tracking, "start_sender", lambda folder: False)  # a process of its own, but not in these tests
    monkeypatch.setattr(tracking, "PATIENCE", 0.0)
    main(run)
    step.main("demo", run, Settings, argv=["--output", "out"], light=True)
    assert drawn[:2] == drawn[2:]


def test_a_lost_parent_is_made_anew_once(capsys: pytest.CaptureFixture[str], empty_store: Path) -> None:
    main(write)
    (lost,) = parents()
    eventually(lambda: not journal.has_sender(Path("logs/tracking")))
    Path("mlflow.db").write_bytes(empty_store.read_bytes())
    main(write)
    main(write)
    (parent,) = parents()
    assert parent.info.run_id != lost.info.run_id
    assert parent.data.tags["model"] == "m"
    assert len(children(parent)) == 2
    assert "warning" not in capsys.readouterr().err


def test_the_environment_names_another_store(monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/other.db").write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere/other.db")
    main(write)
    with sqlite3.connect("elsewhere/other.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (2,)
    assert len(list(Path("elsewhere/mlartifacts").iterdir())) == 1


def test_a_password_is_written_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://user:secret@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    main(write)
    files = [path for path in Path().rglob("*") if path.is_file() and path.name != "mlflow.db"]
    assert len(files) > 5
    assert not [path for path in files if b"secret" in path.read_bytes()]
    assert delivery.resolve("http://127.0.0.1:9") == uri
    assert delivery.resolve("http://other:9") == "http://other:9"


def test_broken_database(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mlflow.db").write_text("no database " * 1000)
    main(write)
    assert Path("out").read_text() == "result"
    assert "warning: MLflow: sqlite:///" in capsys.readouterr().err
    assert len(journal.journals(Path("logs/tracking"))) == 1


def test_a_store_in_a_missing_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Path.cwd() / "nowhere"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{missing}/x.db")
    began = time.monotonic()
    main(write)
    assert time.monotonic() - began < tracking.PATIENCE / 2
    assert Path("out").read_text() == "result"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: MLflow: sqlite:///{missing}/x.db does not take this run")
    assert f"no such folder: {missing})" in line
    assert len(journal.journals(Path("logs/tracking"))) == 1


@pytest.mark.parametrize("living", [False, True])
def test_a_deleted_mlflow_experiment_is_restored(capsys: pytest.CaptureFixture[str], living: bool) -> None:
    """Also under a sender that knows it from before."""
    main(write)
    if not living:
        eventually(lambda: not journal.has_sender(Path("logs/tracking")))
    (first,) = parents()
    client().delete_experiment(first.info.experiment_id)
    main(write)
    (parent,) = parents()
    assert parent.info.run_id == first.info.run_id
    assert len(children(parent)) == 2
    assert "warning" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    eventually(lambda: not journal.has_sender(Path("logs/tracking")))
    Path("logs/tracking").rename("elsewhere")
    Path("logs/tracking").write_text("in the way")
    main(write)
    assert Path("out").read_text() == "result"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow: ")
    assert "logs/tracking: File exists" in line


def test_after_a_line_that_was_cut_off_the_next_one_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the disk is full for a moment."""
    writer = journal.Writer(Path("logs/tracking"))
    whole = os.write
    with monkeypatch.context() as full:
        full.setattr(journal.os, "write", lambda file, line: whole(file, line[:9]))
        with pytest.raises(OSError, match="No space left"):
            writer.write("metrics")
    writer.write("end")
    writer.close()
    assert [event["kind"] for event in journal.read(writer.path, 0)[0]] == ["start", "end"]


def test_metrics_are_sent_while_the_step_runs() -> None:
    seen: list[str] = []

    def run(task: step.Task, settings: Settings) -> None:
        for _ in task.progress(range(1)):
            task.metric("loss", 2.0)
        found = eventually(lambda: [run for run in children() if "loss" in run.data.metrics])[0]
        assert found.data.metrics["progress/demo"] == 100
        seen.append(found.info.status)
        task.output.touch()

    main(run)
    assert seen == ["RUNNING"]


def test_what_another_sender_has_begun_is_not_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that died after it made the run, and before it could write that down."""
    eventually(lambda: not journal.has_sender(Path("logs/tracking")))
    monkeypatch.setattr(tracking, "start_sender", lambda folder: False)
    monkeypatch.setattr(tracking, "PATIENCE", 0.0)
    main(write)
    (waiting,) = journal.journals(Path("logs/tracking"))
    first = sender.Sender(Path("logs/tracking").absolute())
    first.round()
    (run,) = children()
    assert not waiting.exists()
    main(write)
    (waiting,) = journal.journals(Path("logs/tracking"))
    begun = delivery.Delivery(waiting)
    begun._make_run(delivery.Store(begun.uri))
    journal.State().save(waiting)
    sender.main([])
    assert len(children()) == 2
    assert {run.info.status for run in children()} == {"FINISHED"}
    assert children()[0].info.run_id != run.info.run_id
    history = client().get_metric_history(children()[0].info.run_id, "loss/a_")
    assert len(history) == 3


def test_a_journal_of_another_version_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("logs/tracking")
    eventually(lambda: not journal.has_sender(folder))
    # The sender comes after the step here. As a thread it would write tracebacks while the step reads its own source,
    # and Python 3.11 parses both with one counter of depth: "AST constructor recursion depth mismatch".
    monkeypatch.setattr(tracking, "start_sender", lambda folder: False)
    monkeypatch.setattr(tracking, "PATIENCE", 0.0)
    (folder / "0-old.jsonl").write_text('{"kind": "start", "uri": "sqlite:///mlflow.db"}\n')
    (folder / "0-empty.jsonl").write_text("")
    monkeypatch.setenv(tracking_store.CLONE, "x")
    refused = tracking_store.Experiment(
        "m's_2.0bits.ppo.x", {"model": "m"}
    )  # an apostrophe: no filter of MLflow's takes it
    with monkeypatch.context() as patch:
        patch.setattr(tracking_store.Experiment, "named", lambda name: refused)
        main(write)
    main(write)
    capsys.readouterr()
    with pytest.raises(WindquantError, match=r"0-old\.unreadable.*: not readable, or refused by the store"):
        sender.main([])
    assert capsys.readouterr().out == "sent 1 runs\n"
    assert len(children()) == 1
    assert len(list(folder.glob("*.unreadable"))) == 3
    sender.main([])
    assert "everything has arrived" in capsys.readouterr().out


def test_clones_have_parents_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    main(write)
    monkeypatch.setenv(tracking_store.CLONE, "another")
    main(write)
    main(write)
    second, first = parents()
    assert (len(children(first)), len(children(second))) == (1, 2)
