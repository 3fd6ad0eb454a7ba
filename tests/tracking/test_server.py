"""Tracking on a real `mlflow server` on loopback: eight at once, a server that is down, dies, hangs, comes back."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tests.tracking.experiments import PROJECT, all_runs, complete, eventually, worker
from windquant import journal

PATIENCE = 180


class Server:
    """One `mlflow server` on a port of its own, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", "artifacts"]
        with (self.folder / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                command + stores, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        eventually(self.answers, PATIENCE)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module", autouse=True)
def no_proxy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


def runs(server: Server, *models: str) -> list[Run]:
    return [run for run in all_runs(MlflowClient(server.uri)) if run.data.tags["model"] in models]


def test_eight_experiments_at_once(server: Server, tmp_path: Path) -> None:
    names = [f"at-once-{index}" for index in range(8)]
    slow = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}  # on few cores one server answers eight of them late
    processes = [worker(tmp_path / name, name, MLFLOW_TRACKING_URI=server.uri, **slow) for name in names]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert errors == [""] * 8
    complete(runs(server, *names), names)
    client = MlflowClient(server.uri)
    for run in all_runs(client):
        if run.data.tags.get("step"):
            assert len(client.get_metric_history(run.info.run_id, "loss")) == 200
        else:
            assert [entry.path for entry in client.list_artifacts(run.info.run_id)] == ["result.json"]


def test_never_up_then_sent_by_the_command(server: Server, tmp_path: Path) -> None:
    """The steps go on without delay and warn once each; `windquant sync` sends all of it when the server is there."""
    server.kill()
    begin = time.monotonic()
    errors = worker(tmp_path, "late", MLFLOW_TRACKING_URI=server.uri).communicate(timeout=PATIENCE)[1].splitlines()
    assert time.monotonic() - begin < 30
    assert len(errors) == 2
    for line in errors:
        assert line.startswith(f"warning: MLflow: {server.uri} does not take this run (ConnectionRefusedError")
        assert line.endswith("or for: python -m windquant sync")
    assert json.loads((tmp_path / "late.manifest.json").read_text())["mlflow_run_id"] is None
    failed = sync(tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: 2 runs are kept in logs/tracking")
    server.start()
    sent = sync(tmp_path)
    assert (sent.returncode, sent.stderr) == (0, "")
    assert "sent 2 runs" in sent.stdout
    complete(runs(server, "late"), ["late"])
    assert sync(tmp_path).stdout.startswith("everything has arrived")


def sync(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "windquant", "sync"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("what", ["dies", "hangs"])
def test_fails_in_the_middle_and_comes_back(what: str, server: Server, tmp_path: Path) -> None:
    """What could not be sent then is sent by the next step that reaches the server."""
    lost = worker(tmp_path, f"server-{what}", 4, MLFLOW_TRACKING_URI=server.uri)
    eventually(lambda: begun(tmp_path), PATIENCE)
    server.kill() if what == "dies" else server.signal(signal.SIGSTOP)
    begin = time.monotonic()
    errors = lost.communicate(timeout=PATIENCE)[1].splitlines()
    assert lost.returncode == 0
    assert time.monotonic() - begin < 8 + 30, "two steps of four seconds"
    assert errors
    assert all(line.startswith(f"warning: MLflow: {server.uri} does not take this run") for line in errors)
    server.start() if what == "dies" else server.signal(signal.SIGCONT)
    again = worker(tmp_path, f"next-{what}", MLFLOW_TRACKING_URI=server.uri)
    again.communicate(timeout=PATIENCE)
    eventually(lambda: not journal.journals(tmp_path / "logs" / "tracking"), PATIENCE)
    names = [f"server-{what}", f"next-{what}"]
    complete(runs(server, *names), names)


def begun(folder: Path) -> bool:
    """Whether a run of the step that has not ended yet is in the store."""
    states = map(journal.State.load, journal.journals(folder / "logs" / "tracking"))
    return any(state is not None and state.run_id is not None for state in states)
