"""MLflow tracking: one parent run per experiment, one child run per step.

A step that is told `--experiment smollm2-135m_2.0bits.ppo` logs a child run below that plan's run; one that all plans
of a model share is told `--experiment smollm2-135m`. The store is MLFLOW_TRACKING_URI, or else sqlite in mlflow.db in
the current folder with the artifacts in mlartifacts/.

A step writes a journal (`journal.py`) and a process beside it, the sender (`sender.py`), passes it on to MLflow. So
tracking never stops a step and hardly costs it time; what the store did not take becomes one line `warning: ...`.
"""

import contextlib
import getpass
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from windquant import journal, tracking_store as store
from windquant.system_metrics import Sampler
from windquant.tracking_store import Experiment

RESTART_SECONDS, RESTARTS = 3.0, 3  # between two attempts to start a sender, and how many
PATIENCE = 60.0  # seconds that a finished step waits for the sender to say whether the run has arrived


class Tracker:
    """What a step tells about itself. This one, without an experiment, tells nobody."""

    @property
    def run_id(self) -> str | None:
        """Of the step's run in the store; None where that is not known."""
        return None

    @property
    def parent_id(self) -> str | None:
        """Of the experiment's run."""
        return None

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step of the search or training."""
        self._write("metrics", values={name: float(value) for name, value in values.items()}, step=step)

    def params(self, values: Mapping[str, Any]) -> None:
        """Values that stay the same during the run."""
        self._write("params", values={name: str(value) for name, value in values.items()})

    def artifact(self, path: Path, folder: str | None = None, name: str | None = None) -> None:
        """A file or a folder, copied at once (under another `name`, if given)."""
        self._copy(path, folder, name or path.name)

    def dataset(self, name: str, source: str, digest: str, context: str = "", parent: bool = False) -> None:
        """Data that the run reads, or that the whole experiment (`parent`) is about."""
        self._write("dataset", name=name, source=source, digest=digest, context=context, parent=parent)

    def close_parent(
        self,
        metrics: Mapping[str, float],
        artifacts: Mapping[str, Path],
        tags: Mapping[str, Any],
        params: Mapping[str, Any] | None = None,
        description: str = "",
    ) -> None:
        """Log the experiment's key numbers and artifacts (name -> file) on the parent run, finished with this step.

        `tags` are what is only known now; its children get them too. `description` is Markdown.
        """
        for name, path in artifacts.items():
            self._copy(path, None, name, parent=True)
        self._write(
            "close",
            values={name: float(value) for name, value in metrics.items()},
            tags={name: str(value) for name, value in tags.items()},
            params={name: str(value) for name, value in (params or {}).items()},
            description=description,
        )

    def _write(self, kind: str, **content: Any) -> None:
        """An event."""

    def _copy(self, path: Path, folder: str | None, name: str, parent: bool = False) -> None:
        """An artifact; `parent` is whether it belongs to the experiment's run."""


class ChildRun(Tracker):
    """The run of one step, told to its journal. No method raises: a full disk ends the tracking, not the step."""

    def __init__(self, experiment: Experiment, step: str, name: str, **start: Any) -> None:
        self.uri = store.address()
        self._folder = Path.cwd() / journal.FOLDER
        self._patient = True
        self._warned = False
        self._sampler: Sampler | None = None
        self._journal: journal.Writer | None = None
        with self._guard():
            self._journal = journal.Writer(
                self._folder,
                uri=store.without_password(self.uri),
                experiment=vars(experiment),
                step=step,
                name=name,
                **start,
            )
            start_sender(self._folder)
            self._sampler = Sampler(self._sample)

    @property
    def run_id(self) -> str | None:
        state = self._wait(lambda state: state is not None and state.run_id is not None)
        return state.run_id if state else None

    @property
    def parent_id(self) -> str | None:
        state = self._wait(lambda state: state is not None and state.parent_id is not None)
        return state.parent_id if state else None

    def finish(self, status: str, error: BaseException | None = None) -> None:
        """End the run and say so if the store has not got it."""
        if self._sampler is not None:
            self._sampler.stop()
        text = f"{type(error).__name__}: {error}" if error is not None else None
        self._write("end", status=status, error=text)
        writer = self._journal
        if writer is None:
            return
        if status == "KILLED":
            self._patient = False  # who asked for an end shall not wait
        state = self._wait(lambda state: not writer.path.exists())
        if writer.path.exists():
            reason = (state and state.problem) or f"no answer, see {journal.FOLDER / 'sender.txt'}"
            _warn(
                f"{store.without_password(self.uri)} does not take this run ({reason}); it is kept in {journal.FOLDER} "
                "for the next step that reaches it, or for: python -m windquant sync"
            )
        else:
            journal.state_path(writer.path).unlink(missing_ok=True)
        if state and state.refused:
            _warn(f"{store.without_password(self.uri)} refused a part of this run ({state.refused})")
        writer.close()
        self._journal = None

    def _sample(self, values: dict[str, float], number: int) -> None:
        self.metrics(values, number)
        start_sender(self._folder)  # should it have died

    def _write(self, kind: str, **content: Any) -> None:
        with self._guard():
            if self._journal is not None:
                self._journal.write(kind, **content)

    def _copy(self, path: Path, folder: str | None, name: str, parent: bool = False) -> None:
        with self._guard():
            if self._journal is not None:
                self._journal.artifact(path, folder, name, parent)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                _warn(f"{error.filename or journal.FOLDER}: {error.strerror}; the step goes on, a part of it untracked")
            self._warned = True

    def _wait(self, arrived: Callable[[journal.State | None], bool]) -> journal.State | None:
        """The state as soon as `arrived` holds for it, the store is known to be down, or patience is at its end."""
        if self._journal is None:
            return None
        path, deadline = self._journal.path, time.monotonic() + PATIENCE
        while True:
            state = journal.State.load(path)
            if arrived(state):
                return state
            if state is not None and state.problem:
                self._patient = False
            if not self._patient:
                return state
            if time.monotonic() > deadline or not start_sender(self._folder):
                self._patient = False
            time.sleep(0.02)


_starts: dict[Path, list[float]] = {}  # times at which this process has started a sender that is not to be seen yet


def start_sender(folder: Path) -> bool:
    """See to it that a sender works on the folder: a process of its own that outlives the step for some seconds.

    False if none can be started, or none survives.
    """
    starts = _starts.setdefault(folder, [])
    if starts and time.monotonic() - starts[-1] < RESTART_SECONDS:
        return True
    try:
        if journal.has_sender(folder):
            starts.clear()
            return True
        starts.append(time.monotonic())
        if len(starts) > RESTARTS:
            return False
        _spawn(folder)
    except OSError:
        return False
    return True


def _spawn(folder: Path) -> None:
    package = str(Path(__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / "sender.txt").open("w") as log:
        subprocess.Popen(
            [sys.executable, "-m", "windquant.sender", str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # what kills the step's group shall not kill the one who reports it
        )


@contextlib.contextmanager
def child(
    experiment: str | None,
    step: str,
    params: Mapping[str, Any],
    seed: int = 0,
    output: Path | None = None,
    commit: str | None = None,
    dirty: bool | None = None,
) -> Iterator[Tracker]:
    """The tracker of one step; without an experiment's name one that tracks nothing.

    The run ends FINISHED, FAILED (an exception) or KILLED (SIGTERM, Ctrl-C; by the sender after a SIGKILL).
    """
    if experiment is None:
        yield Tracker()
        return
    tracker = ChildRun(
        Experiment.named(experiment),
        step,
        name=f"{step} {variant(step, output)}".strip(),
        tags={"seed": str(seed), "artifact": str(output)},
        source=source_tags(commit, dirty),
    )
    tracker.params({**params, "seed": seed})
    try:
        yield tracker
    except BaseException as error:
        tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED", error)
        raise
    tracker.finish("FINISHED")


def variant(step: str, output: Path | None) -> str:
    """What tells a step's runs in one experiment apart: "quantized" of "m_2.0bits.ppo.quantized.STEP.json", and
    "quantized cloze" of "m_2.0bits.ppo.quantized.STEP.cloze.json".
    """
    name, found, task = (output.name.removesuffix(".json") if output else "").rpartition(f".{step}")
    return f"{name.rpartition('.')[2]} {task.removeprefix('.')}".strip() if found else ""


def source_tags(commit: str | None, dirty: bool | None) -> dict[str, str]:
    """What `mlflow.start_run` would set and `MlflowClient.create_run` does not, and the version of the data."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    tags = {"mlflow.source.type": "LOCAL", "mlflow.user": user}
    if commit is not None:
        tags |= {"mlflow.source.git.commit": commit, "git_dirty": str(dirty).lower()}
    with contextlib.suppress(OSError):
        if found := re.search(r"\bmd5: *(\w+)", Path("data.dvc").read_text()):
            tags["dvc.data"] = found[1]
    return tags


def _warn(text: str) -> None:
    print("warning: MLflow:", " ".join(text.split())[:600], file=sys.stderr, flush=True)
