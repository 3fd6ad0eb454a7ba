"""MLflow tracking: one parent run per experiment, one child run per step.

    python -m windquant.tracking --output data/experiments/X.json --model smollm2-135m --bits 2.0 --allocator ppo

makes the store, the MLflow experiment and the parent run, before anything runs in parallel; every step that gets
`--experiment data/experiments/X.json` logs a child run. The store is MLFLOW_TRACKING_URI, or else sqlite in mlflow.db
in the current folder with the artifacts in mlartifacts/.

Tracking never stops a step: whatever MLflow raises becomes one line `warning: ...`. What could not be sent is kept
and tried once more when the step ends.
"""

import contextlib
import json
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windquant import tracking_store as store
from windquant.tracking_store import Experiment

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from windquant.step import Task

FLUSH_SECONDS = 10.0  # between two batches of metrics
# MLflow's own limits
PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH, PARAMS_PER_BATCH, METRICS_PER_BATCH = 6000, 8000, 36, 100, 1000


@dataclass(frozen=True)
class Settings:
    model: str  # name of the model's entry in the configuration
    bits: float | None = None  # target bits; none for the steps that all experiments of a model share
    allocator: str | None = None  # what makes the plan
    chunk: int | None = None  # columns per unit
    name: str = "windquant"  # MLflow experiment that holds the runs


class Tracker:
    """What a step tells about itself. This one, without an experiment, tracks nothing."""

    run_id: str | None = None
    parent_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step of the search or training, kept and sent in batches."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Values that stay the same during the run."""

    def artifact(self, path: Path, folder: str | None = None, name: str | None = None) -> None:
        """A file (under another `name`, if given) or a folder, copied at once."""

    def dataset(self, name: str, source: str, digest: str, context: str = "") -> None:
        """Data that the run reads."""

    def close_parent(
        self, metrics: Mapping[str, float], artifacts: Mapping[str, Path], tags: Mapping[str, Any]
    ) -> None:
        """Log the experiment's key metrics and artifacts (name -> file) on the parent run and mark it finished.

        `tags` are what is only known now; its children get them too, because filters of the UI drop those without.
        """


@dataclass
class _Buffer:
    """What has not reached the store yet."""

    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, ms since 1970, step
    params: dict[str, str] = field(default_factory=dict)
    datasets: list[tuple[str, str, str, str]] = field(default_factory=list)  # name, source, digest, context


class ChildRun(Tracker):
    """The child run of one step. No method raises what MLflow raises."""

    def __init__(self, experiment: Experiment, step: str, tags: Mapping[str, Any]) -> None:
        self.experiment = experiment
        self.step = step
        self.tags = {"step": step, **tags}
        self.start = store.now()
        self._buffer = _Buffer()
        self._last_flush = time.monotonic()
        self._down = False  # the store failed: keep everything until the end
        self._client: MlflowClient | None = None

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        now = store.now()
        self._buffer.metrics += [(store.key(name), float(value), now, step or 0) for name, value in values.items()]
        if time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def params(self, values: Mapping[str, Any]) -> None:
        self._buffer.params.update({store.key(name): str(value)[:PARAM_LENGTH] for name, value in values.items()})

    def dataset(self, name: str, source: str, digest: str, context: str = "") -> None:
        self._buffer.datasets.append((name, source, digest[:DIGEST_LENGTH], context))

    def artifact(self, path: Path, folder: str | None = None, name: str | None = None) -> None:
        with self._guard(f"artifact {name or path.name}"):
            store.log_artifact(*self._run(), path, folder, name)

    def close_parent(
        self, metrics: Mapping[str, float], artifacts: Mapping[str, Path], tags: Mapping[str, Any]
    ) -> None:
        with self._guard("closing the experiment's run"):
            store.close_parent(*self._run(), metrics, artifacts, tags)

    def flush(self) -> None:
        """Send what is buffered, unless the store has already failed."""
        self._last_flush = time.monotonic()
        if not self._down:
            with self._guard("sending values"):
                self._send()

    def finish(self, status: str, error: BaseException | None = None) -> None:
        """Send the rest, even to a store that failed before, and end the run."""
        self._down = False
        self.flush()
        if self._client is None or self.run_id is None:
            return
        with self._guard(f"ending the run of step {self.step}"):
            if error is not None:
                self._client.set_tag(self.run_id, "error", f"{type(error).__name__}: {error}"[:TAG_LENGTH])
            self._client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """Turn failures into one warning; keep the step's random numbers as if nothing was tracked."""
        state = random.getstate()
        try:
            yield
        except Exception as error:
            self._down = True
            _warn(f"{what} failed", error)
        finally:
            random.setstate(state)

    def _run(self) -> "tuple[MlflowClient, str]":
        """The client and the id of this step's run, made at the first call."""
        if self._down:
            raise ConnectionError("the store has failed before")
        if self._client is None:
            self._client = store.connect(self.experiment.uri)
        if self.run_id is None:
            experiment_id = store.ensure_experiment(self._client, self.experiment)
            self.parent_id = store.ensure_parent(self._client, self.experiment, experiment_id)
            tags = {**self.experiment.tags, **store.source_tags(self.step), **self.tags}
            tags["mlflow.parentRunId"] = self.parent_id
            run = self._client.create_run(experiment_id, start_time=self.start, tags=tags, run_name=self.step)
            self.run_id = run.info.run_id
        return self._client, self.run_id

    def _send(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        client, run = self._run()
        buffer, items = self._buffer, list(self._buffer.params.items())
        for first in range(0, len(items), PARAMS_PER_BATCH):
            client.log_batch(run, params=[Param(*item) for item in items[first : first + PARAMS_PER_BATCH]])
        buffer.params = {}
        while buffer.metrics:
            client.log_batch(run, metrics=[Metric(*metric) for metric in buffer.metrics[:METRICS_PER_BATCH]])
            del buffer.metrics[:METRICS_PER_BATCH]
        if buffer.datasets:
            inputs = [
                DatasetInput(
                    Dataset(name, digest, "local", json.dumps({"uri": source})),
                    [InputTag("mlflow.data.context", context)],
                )
                for name, source, digest, context in buffer.datasets
            ]
            client.log_inputs(run, inputs)
            buffer.datasets = []


@contextlib.contextmanager
def child(experiment: Path | None, step: str, params: Mapping[str, Any], seed: int = 0) -> Iterator[Tracker]:
    """The tracker of one step; without an experiment file one that tracks nothing.

    The run ends FINISHED, FAILED (an exception) or KILLED (SIGTERM, Ctrl-C).
    """
    if experiment is None:
        yield Tracker()
        return
    tracker = ChildRun(Experiment.load(experiment), step, {"seed": str(seed)})
    tracker.params({**params, "seed": seed})
    try:
        tracker.flush()
        yield tracker
    except BaseException as error:
        tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED", error)
        raise
    tracker.finish("FINISHED")


def _warn(what: str, error: Exception) -> None:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"warning: MLflow: {what}, going on without ({text[:300]})", file=sys.stderr, flush=True)


def run(task: "Task", settings: Settings) -> None:
    """Make the parent run and write what the other steps need to find it. An unreachable store is no error."""
    tags = {
        "model": settings.model,
        "target_bits": settings.bits,
        "allocator": settings.allocator,
        "chunk": settings.chunk,
    }
    experiment = Experiment(
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or store.LOCAL,
        name=settings.name,
        experiment_id=None,
        run_id=None,
        key=uuid.uuid4().hex,
        tags={name: str(value) for name, value in tags.items() if value is not None},
    )
    document = dict(vars(experiment))
    try:
        client = store.connect(experiment.uri)
        document["experiment_id"] = store.ensure_experiment(client, experiment)
        document["run_id"] = store.create_parent(client, experiment, document["experiment_id"])
    except Exception as error:
        _warn("creating the experiment's run failed", error)
    task.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    from windquant import step

    step.main("experiment", run, Settings, light=True)
