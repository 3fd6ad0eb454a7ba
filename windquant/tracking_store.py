"""Where runs are kept: the MLflow store, its experiment and the parent runs, found or made.

Run and experiment ids belong to one store. A deleted mlflow.db, a clone with pulled data, or another server has none
of them, so an experiment carries a key of its own, by which its parent run is found again or made anew.
"""

import contextlib
import fcntl
import getpass
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windquant import manifest
from windquant.errors import WindquantError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LOCAL = "sqlite:///mlflow.db"  # relative to the project, so that the experiment file means the same in a clone
LOCK_SECONDS = 60.0  # to wait for another process that opens the store
KEY_TAG = "windquant.experiment"  # identifies an experiment in any store, whatever its run id there
#: A dead server must cost seconds, not the minutes of MLflow's defaults. A user's own values win.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Experiment:
    """The content of `data/experiments/X.json`."""

    tracking_uri: str
    name: str  # of the MLflow experiment
    experiment_id: str | None  # None where the store could not be reached
    run_id: str | None  # the parent run
    key: str
    tags: dict[str, str]  # of the parent, copied to the children

    @classmethod
    def load(cls, path: Path) -> "Experiment":
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise WindquantError(f"--experiment {path}: not readable ({error}); delete it and run again") from error

    @property
    def uri(self) -> str:
        """The store: the environment's, or else the one of the file; a relative sqlite path made absolute."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.tracking_uri
        database = sqlite_path(uri)
        return f"sqlite:///{database}" if database else uri

    @property
    def title(self) -> str:
        """E.g. "smollm2-135m 2.0bits ppo"."""
        bits = self.tags.get("target_bits")
        return " ".join(filter(None, (self.tags.get("model"), bits and f"{bits}bits", self.tags.get("allocator"))))


def connect(uri: str) -> "MlflowClient":
    """A client of the store; a local database is created by one process at a time."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient  # takes a second

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    with store_lock(uri):
        return MlflowClient(uri)


def ensure_experiment(client: "MlflowClient", experiment: Experiment) -> str:
    """Id of the MLflow experiment, found by name (ids differ between stores) or created."""
    found = client.get_experiment_by_name(experiment.name)
    if found is None:
        database = sqlite_path(experiment.uri)
        location = str(database.with_name("mlartifacts")) if database else None
        with store_lock(experiment.uri):
            found = client.get_experiment_by_name(experiment.name)
            if found is None:
                return str(client.create_experiment(experiment.name, artifact_location=location))
    return str(found.experiment_id)


def ensure_parent(client: "MlflowClient", experiment: Experiment, experiment_id: str) -> str:
    """Id of the parent run; one that is not in this store (deleted, cloned, another server) is made anew, once."""
    from mlflow.exceptions import MlflowException

    if experiment.run_id is not None:
        with contextlib.suppress(MlflowException):
            run = client.get_run(experiment.run_id)
            if run.info.lifecycle_stage == "active":
                return str(run.info.run_id)
    with store_lock(experiment.uri):
        found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{experiment.key}'", max_results=1)
        return str(found[0].info.run_id) if found else create_parent(client, experiment, experiment_id)


def create_parent(client: "MlflowClient", experiment: Experiment, experiment_id: str) -> str:
    from mlflow.entities import Param

    tags = {**experiment.tags, **source_tags("windquant"), KEY_TAG: experiment.key}
    run = client.create_run(experiment_id, tags=tags, run_name=experiment.title)
    client.log_batch(run.info.run_id, params=[Param(*item) for item in experiment.tags.items()])
    return str(run.info.run_id)


def close_parent(
    client: "MlflowClient",
    child: str,
    metrics: Mapping[str, float],
    artifacts: Mapping[str, Path],
    tags: Mapping[str, Any],
) -> None:
    """Log all this on the parent of run `child`, whose children get the tags too, and mark it finished."""
    from mlflow.entities import Metric, RunTag

    info = client.get_run(child)
    parent = info.data.tags["mlflow.parentRunId"]
    numbers = [Metric(key(name), float(value), now(), 0) for name, value in metrics.items()]
    texts = [RunTag(name, str(value)) for name, value in tags.items()]
    client.log_batch(parent, metrics=numbers, tags=texts)
    for name, path in artifacts.items():
        log_artifact(client, parent, path, None, name)
    for run in client.search_runs([info.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"):
        client.log_batch(run.info.run_id, tags=texts)
    client.set_terminated(parent, "FINISHED")


def source_tags(name: str) -> dict[str, str]:
    """The tags that `mlflow.start_run` would set and `MlflowClient.create_run` does not."""
    commit, dirty = manifest.git_state()
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    tags = {"mlflow.source.name": name, "mlflow.source.type": "LOCAL", "mlflow.user": user}
    return tags if commit is None else {**tags, "mlflow.source.git.commit": commit, "git_dirty": str(dirty).lower()}


def sqlite_path(uri: str) -> Path | None:
    """Absolute path of a sqlite store's file; None for any other store."""
    return Path.cwd() / uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Exclusive among the processes that share the store's folder; a killed owner frees it."""
    database = sqlite_path(uri) or Path.cwd() / "mlflow.db"
    with database.with_name(database.name + ".lock").open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{file.name} has been locked for {LOCK_SECONDS:.0f} seconds") from None
                time.sleep(0.05)
        yield


def log_artifact(client: "MlflowClient", run: str, path: Path, folder: str | None, name: str | None) -> None:
    if path.is_dir():
        client.log_artifacts(run, str(path), "/".join(filter(None, (folder, name or path.name))))
    elif name in (None, path.name):
        client.log_artifact(run, str(path), folder)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / str(name)
            shutil.copyfile(path, copy)
            client.log_artifact(run, str(copy), folder)


def key(name: str) -> str:
    """MLflow allows 250 letters, digits and `_-. :/` in names."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in "_-. :/" else "_" for c in name)[:250]


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
