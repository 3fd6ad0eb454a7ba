"""The MLflow store: its experiment, the parent runs of our experiments, and the run of each step.

Run and experiment ids belong to one store. A deleted mlflow.db, a clone with pulled data, or another server has none
of them, so our runs carry keys of their own, by which they are found again.

An experiment's parent run is open until its result is there. What runs later (after a change of the settings, say)
opens a new parent, so that every result has a run of its own. The steps that all experiments of a model share have no
result; they stay under one parent.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windquant.errors import WindquantError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from windquant.journal import Event

LOCAL = "sqlite:///mlflow.db"  # in the current folder, which is the project's
MLFLOW_EXPERIMENT = "windquant"  # that holds all runs
CLONE = "WINDQUANT_CLONE"  # what tells this clone from others on a common server
URI = "MLFLOW_TRACKING_URI"
LOCK_SECONDS = 60.0  # to wait for another process that works on the store
EXPERIMENT_TAG = "windquant.experiment"  # identifies an experiment in any store, whatever its run id there
RUN_TAG = "windquant.run"  # the same for the run of a step
CLOSED_TAG = "windquant.closed"  # the parent has its result
#: A dead server must cost seconds, not the minutes of MLflow's defaults. A user's own values win.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}
# MLflow's own limits
PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH = 6000, 8000, 36
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000


@dataclass(frozen=True)
class Experiment:
    """Whose parent run a step belongs to: a plan's, or that of all plans of a model."""

    key: str  # identifies the parent in any store
    tags: dict[str, str]  # of the parent, copied to the children
    name: str = MLFLOW_EXPERIMENT

    @classmethod
    def named(cls, name: str) -> "Experiment":
        """Of "smollm2-135m_2.0bits.ppo" or "smollm2-135m"; raises WindquantError for any other form."""
        of_plan = r"_(?P<target_bits>[\d.]+)bits\.(?P<allocator>[a-z0-9-]+)"
        found = re.fullmatch(rf"(?P<model>[A-Za-z0-9.+-]+)({of_plan})?", name)
        if found is None:
            raise WindquantError(f"--experiment {name}: give a plan, as in smollm2-135m_2.0bits.ppo, or a model")
        return cls(f"{name}.{clone()}", {tag: value for tag, value in found.groupdict().items() if value})


def clone() -> str:
    """Eight letters for this clone: on a common server every one has parents of its own."""
    here = f"{platform.node()}:{Path.cwd()}"
    return re.sub(r"[^A-Za-z0-9.+-]", "-", os.environ.get(CLONE, "")) or hashlib.sha256(here.encode()).hexdigest()[:8]


def hand_down() -> list[str]:
    """What jobs on other machines need of the environment to log as this clone, to the same store; sets the former.

    Snakemake writes values on command lines, so an address with a password is not handed down.
    """
    os.environ.setdefault(CLONE, clone())
    uri = os.environ.get(URI)
    return [CLONE, URI] if uri and uri == without_password(uri) else [CLONE]


def address() -> str:
    """The store: the environment's, or else the project's own; a relative sqlite path made absolute."""
    uri = os.environ.get(URI) or LOCAL
    database = sqlite_path(uri)
    return f"sqlite:///{database}" if database else uri


def load_mlflow() -> "type[MlflowClient]":
    """Import MLflow, with our settings: that takes a second."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    return MlflowClient


def connect(uri: str) -> "MlflowClient":
    """A client of the store. Call it under `store_lock`: two processes that create one database break it."""
    return load_mlflow()(uri)


def ensure_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Id of the MLflow experiment, found by name (ids differ between stores) or created; one that was deleted in the UI
    is restored, because its name is taken and it takes no runs.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = sqlite_path(uri)
        location = str(database.with_name("mlartifacts")) if database else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another machine was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def ensure_parent(client: "MlflowClient", experiment_id: str, experiment: Mapping[str, Any], start: "Event") -> str:
    """Id of the parent run for a step that now starts: the open one, or a new one."""
    same = f"tags.`{EXPERIMENT_TAG}` = '{experiment['key']}'"
    found = client.search_runs([experiment_id], same, max_results=1, order_by=["attributes.start_time DESC"])
    if found and CLOSED_TAG not in found[0].data.tags:
        run_id = str(found[0].info.run_id)
        if found[0].info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        return run_id
    own = {"mlflow.source.name": "windquant", EXPERIMENT_TAG: experiment["key"]}
    tags = {**experiment["tags"], **start["source"], **own}
    run = client.create_run(experiment_id, start["time"], tags, title(experiment["tags"]))
    log_params(client, run.info.run_id, experiment["tags"])
    return str(run.info.run_id)


def title(tags: Mapping[str, str]) -> str:
    """E.g. "smollm2-135m 2.0bits ppo", or "smollm2-135m shared steps"."""
    bits = tags.get("target_bits")
    parts = (bits and f"{bits}bits", tags.get("allocator")) if bits else ("shared steps",)
    return " ".join(filter(None, (tags.get("model"), *parts)))


def find_run(client: "MlflowClient", experiment_id: str, key: str) -> tuple[str, str] | None:
    """(run id, parent's id) of a step that another sender has begun to send."""
    found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{key}'", max_results=1)
    return (str(found[0].info.run_id), str(found[0].data.tags["mlflow.parentRunId"])) if found else None


def create_run(client: "MlflowClient", experiment_id: str, parent: str, key: str, start: "Event") -> str:
    tags = {
        **start["experiment"]["tags"],
        **start["source"],
        **start["tags"],
        "mlflow.source.name": f"windquant.{start['step']}",
        "mlflow.parentRunId": parent,
        "step": start["step"],
        RUN_TAG: key,
    }
    run = client.create_run(experiment_id, start_time=start["time"], tags=tags, run_name=start["name"])
    return str(run.info.run_id)


def log_params(client: "MlflowClient", run: str, values: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(key(name), str(value)[:PARAM_LENGTH]) for name, value in values.items()]
    for first in range(0, len(params), PARAMS_PER_BATCH):
        client.log_batch(run, params=params[first : first + PARAMS_PER_BATCH])


def log_metrics(client: "MlflowClient", run: str, events: Iterable["Event"]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(key(name), value, event["time"], event.get("step") or 0)
        for event in events
        for name, value in event["values"].items()
    ]
    for first in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run, metrics=metrics[first : first + METRICS_PER_BATCH])


def log_datasets(client: "MlflowClient", run: str, events: Iterable["Event"]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(event["name"], event["digest"][:DIGEST_LENGTH], "local", json.dumps({"uri": event["source"]})),
            [InputTag("mlflow.data.context", event["context"])],
        )
        for event in events
    ]
    if inputs:
        client.log_inputs(run, inputs)


def log_artifact(client: "MlflowClient", run: str, path: Path, folder: str | None) -> None:
    if path.is_dir():
        client.log_artifacts(run, str(path), "/".join(filter(None, (folder, path.name))))
    else:
        client.log_artifact(run, str(path), folder)


def close_parent(client: "MlflowClient", experiment_id: str, parent: str, event: "Event") -> None:
    """Log the experiment's key numbers on its run; its children get the tags too: filters of the UI need them.

    The run is closed when the step that made the result has ended well, not before.
    """
    from mlflow.entities import RunTag

    tags = [RunTag(name, str(value)[:TAG_LENGTH]) for name, value in event["tags"].items()]
    log_metrics(client, parent, [event])
    log_params(client, parent, event["params"])
    for run in client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"):
        client.log_batch(run.info.run_id, tags=tags)
    note = RunTag("mlflow.note.content", event["description"][:TAG_LENGTH])
    client.log_batch(parent, tags=[*tags, note] if note.value else tags)


def without_password(uri: str) -> str:
    """The store's address without `user:password@`: journals are no place for it."""
    return re.sub(r"(?<=://)(?!/).*@", "", uri)  # a password may hold / and @


def sqlite_path(uri: str) -> Path | None:
    """Absolute path of a sqlite store's file; None for any other store."""
    return Path.cwd() / uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Exclusive among the processes that share a sqlite store; a killed owner frees it. Servers need none.

    Raises an OSError that is no FileNotFoundError if the folder of the file is missing.
    """
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    if not database.parent.is_dir():  # no FileNotFoundError: to the sender that is a journal which somebody cleared
        raise NotADirectoryError(errno.ENOTDIR, f"no such folder: {database.parent}")
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


def key(name: str) -> str:
    """MLflow allows 250 letters, digits and `_-. :/` in names."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in "_-. :/" else "_" for c in name)[:250]
