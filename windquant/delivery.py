"""How one step's journal gets into an MLflow store, and what a store is like that is down."""

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windquant import journal, tracking_store as store
from windquant.journal import Event, State

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

BATCH = 2.0  # seconds between two batches of a step that goes on
RETRY = (5.0, 60.0)  # seconds until a store that is down is tried again: at first, at most
#: What MLflow says of a value or a run that it will never take; anything else may pass.
REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_STATE",
}


class Store:
    """One MLflow store: its client, when to try it again, and the parents that are open."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.retry_at = 0.0
        self.problem: str | None = None
        self.parents: dict[str, dict[str, str]] = {}  # parent's id -> status by the name of the step
        self._wait = RETRY[0]
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}

    @property
    def client(self) -> "MlflowClient":
        if self._client is None:
            self._client = store.connect(self.uri)
        return self._client

    def experiment(self, name: str) -> str:
        if name not in self._experiments:
            self._experiments[name] = store.ensure_experiment(self.client, self.uri, name)
        return self._experiments[name]

    def failed(self, error: Exception) -> str:
        self.problem = brief(error)
        self.retry_at = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, RETRY[1])
        self._client = None
        self.forget()
        return self.problem

    def forget(self) -> None:
        """Look experiments up anew."""
        self._experiments.clear()

    def worked(self) -> None:
        self.problem, self._wait = None, RETRY[0]

    def settle(self) -> None:
        """No step runs any more: parents without a result are not running either."""
        while self.parents:
            parent, steps = self.parents.popitem()
            try:
                run = self.client.get_run(parent)
                if store.CLOSED_TAG in run.data.tags:
                    continue
                bad = [status for status in steps.values() if status != "FINISHED"]
                done = "SCHEDULED" if "target_bits" in run.data.tags else "FINISHED"  # its next step may come any time
                self.client.set_terminated(parent, bad[-1] if bad else done)
            except Exception as error:
                if not refused(error):  # as of a run that was deleted in the UI
                    raise


class Delivery:
    """The journal of one step on its way into the store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = journal.state_path(path).exists()  # by a sender that is gone
        self.state = State.load(path) or State()
        self.next = 0.0
        self.start: Event = journal.read(path, 0)[0][0]
        self.uri = resolve(self.start["uri"])

    def due(self) -> bool:
        """Something is new: at once if it is the beginning or the end, else in batches."""
        if self.path.stat().st_size == self.state.offset:
            return not journal.alive(self.path)
        return time.monotonic() >= self.next or self.ended() or not journal.alive(self.path)

    def ended(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return b'\n{"kind": "end"' in file.read()

    def send(self, to: Store) -> bool:
        """Send what is new; True if that was the end. Raises what MLflow raises where the store is down."""
        living = journal.alive(self.path)  # before reading: what comes after that is for the next time
        events, offset = journal.read(self.path, self.state.offset)
        self.next = time.monotonic() + BATCH
        if self.state.run_id is None:
            self._ensure_run(to)
        self._send_values(to, events)
        end = next((event for event in events if event["kind"] == "end"), None)
        if end is None and not living:
            died = "the process was killed, or ended without a word (out of memory?)"
            end = {"status": "KILLED", "error": died, "time": int(1000 * self.path.stat().st_mtime)}
        if end is not None:
            self._end(to, end, any(event["kind"] == "close" for event in journal.read(self.path, 0)[0]))
        self.state.offset, self.state.problem = offset, None
        self.state.save(self.path)
        return end is not None

    def fail(self, problem: str) -> None:
        self.state.problem = problem
        self.state.save(self.path)

    def _ensure_run(self, to: Store) -> None:
        """LookupError for a run that the store will never take."""
        for last in (False, True):
            try:
                self._make_run(to)
                return
            except Exception as error:
                if not refused(error):
                    raise
                if last:
                    raise LookupError(f"the store takes no such run: {brief(error)}") from error
                to.forget()  # the experiment may have been deleted since it was looked up

    def _make_run(self, to: Store) -> None:
        experiment = to.experiment(self.start["experiment"]["name"])
        found = store.find_run(to.client, experiment, self.path.stem) if self.begun else None
        self.begun = True
        self.state.save(self.path)
        if found is None:
            parent = store.ensure_parent(to.client, experiment, self.start["experiment"], self.start)
            found = store.create_run(to.client, experiment, parent, self.path.stem, self.start), parent
        self.state.run_id, self.state.parent_id = found
        self.state.save(self.path)
        to.parents.setdefault(found[1], {})

    def _send_values(self, to: Store, events: list[Event]) -> None:
        run, parent = str(self.state.run_id), str(self.state.parent_id)
        of = {kind: [event for event in events if event["kind"] == kind] for kind in ("metrics", "params", "dataset")}
        with self._tolerant():
            store.log_metrics(to.client, run, of["metrics"])
        for place, of_parent in ((run, False), (parent, True)):
            with self._tolerant():
                store.log_datasets(to.client, place, [event for event in of["dataset"] if event["parent"] == of_parent])
        for event in of["params"]:
            with self._tolerant():
                store.log_params(to.client, run, event["values"])
        for event in events:
            with self._tolerant():
                if event["kind"] == "artifact":
                    path = self.path.parent / event["path"]
                    store.log_artifact(to.client, parent if event["parent"] else run, path, event["folder"])
                elif event["kind"] == "close":
                    store.close_parent(to.client, to.experiment(self.start["experiment"]["name"]), parent, event)

    def _end(self, to: Store, end: Event, closes: bool) -> None:
        run, parent = str(self.state.run_id), str(self.state.parent_id)
        with self._tolerant():
            if end["error"]:
                to.client.set_tag(run, "error", end["error"][: store.TAG_LENGTH])
            to.client.set_terminated(run, end["status"], end["time"])
            if closes and end["status"] == "FINISHED":
                to.client.set_tag(parent, store.CLOSED_TAG, "true")
                to.client.set_terminated(parent, "FINISHED", end["time"])
        to.parents.setdefault(parent, {})[self.start["name"]] = end["status"]

    @contextlib.contextmanager
    def _tolerant(self) -> Any:
        """What the store will never take is left out, and said."""
        try:
            yield
        except Exception as error:
            if not refused(error) and not isinstance(error, FileNotFoundError):  # somebody tidied up
                raise
            self.state.refused = brief(error)


def refused(error: Exception) -> bool:
    """Whether the store will not take it at any later time either."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in REFUSALS


def resolve(uri: str) -> str:
    """The store's address with the user's password, which is in the environment only."""
    given = os.environ.get(store.URI, "")
    return given if given and store.without_password(given) == uri else uri


def brief(error: BaseException) -> str:
    """One short line. MLflow wraps "connection refused" in a paragraph, so an operating system's reason goes first."""
    reasons: list[BaseException] = [error]
    while (inner := reasons[-1].__cause__ or reasons[-1].__context__) and inner not in reasons:
        reasons.append(inner)
    system = [reason for reason in reasons if isinstance(reason, OSError) and reason.strerror]
    reason = system[-1] if system else error
    return " ".join(f"{type(reason).__name__}: {getattr(reason, 'strerror', None) or reason}".split())[:200]
