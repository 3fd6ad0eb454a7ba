"""Send what the steps have told (`journal.py`) to their MLflow store.

    python -m windquant sync      send what is left, and say what cannot be sent

One process per folder does so for all steps: the first step starts it, and it ends when none has lived for a while. So
MLflow is imported once, not by every step; a store that hangs makes nobody else wait; and a step that was killed has
somebody to report it.
"""

import argparse
import contextlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windquant import journal, tracking, tracking_store as store
from windquant.errors import WindquantError
from windquant.journal import Event, State

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LINGER = 20.0  # seconds without a living step until the sender goes
LOOK = 0.1  # seconds between two looks at the journals
BATCH = 2.0  # seconds between two batches of a step that goes on
RETRY = (5.0, 60.0)  # seconds until a store that is down is tried again: at first, at most
UNREADABLE = ".unreadable"  # what a journal is called from then on that makes no sense
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
        self._experiments.clear()
        return self.problem

    def worked(self) -> None:
        self.problem, self._wait = None, RETRY[0]

    def settle(self) -> None:
        """No step runs any more: parents without a result are not running either."""
        for parent, steps in self.parents.items():
            run = self.client.get_run(parent)
            if store.CLOSED_TAG in run.data.tags:
                continue
            bad = [status for status in steps.values() if status != "FINISHED"]
            done = "SCHEDULED" if "target_bits" in run.data.tags else "FINISHED"  # its next step may come any time
            self.client.set_terminated(parent, bad[-1] if bad else done)
        self.parents.clear()


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
            self._make_run(to)
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
                to.client.set_terminated(parent, "FINISHED", end["time"])
        to.parents.setdefault(parent, {})[self.start["name"]] = end["status"]

    @contextlib.contextmanager
    def _tolerant(self) -> Any:
        """What the store will never take is left out, and said."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            self.state.refused = brief(error)
        except FileNotFoundError as error:  # somebody tidied up
            self.state.refused = brief(error)


class Sender:
    """All journals of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stores: dict[str, Store] = {}
        self.deliveries: dict[Path, Delivery] = {}

    def round(self) -> bool:
        """Look at every journal once, the oldest first; whether a step still lives."""
        living = False
        for path in journal.journals(self.folder):
            with contextlib.suppress(FileNotFoundError):  # a folder that somebody clears
                living |= journal.alive(path)
                self._advance(path)
        return living

    def _advance(self, path: Path) -> None:
        try:
            if path not in self.deliveries:
                self.deliveries[path] = Delivery(path)
            done = self._deliver(self.deliveries[path])
        except (LookupError, TypeError, AttributeError):  # of another version, or damaged: no reason to keep the others
            self.deliveries.pop(path, None)
            path.rename(path.with_suffix(UNREADABLE))
            print(f"{path}: not readable", traceback.format_exc(), sep="\n", file=sys.stderr, flush=True)
            return
        if done:
            del self.deliveries[path]
            watched = journal.alive(path)
            journal.remove(path)
            if not watched:
                journal.state_path(path).unlink(missing_ok=True)

    def _deliver(self, delivery: Delivery) -> bool:
        """Send what is new, unless the store is down; whether that was all."""
        to = self.stores.setdefault(delivery.uri, Store(delivery.uri))
        if to.problem and delivery.state.problem != to.problem:  # who waits shall know before the next attempt
            delivery.fail(to.problem)
        if time.monotonic() < to.retry_at or not delivery.due():
            return False
        try:
            with store.store_lock(to.uri):
                done = delivery.send(to)
            to.worked()
            return done
        except (FileNotFoundError, LookupError, TypeError, AttributeError):
            raise
        except Exception as error:
            delivery.fail(to.failed(error))
            return False

    def settle(self) -> None:
        for to in self.stores.values():
            if to.problem is None:
                with contextlib.suppress(Exception), store.store_lock(to.uri):
                    to.settle()


def serve(folder: Path, linger: float = LINGER) -> None:
    """Send until no step has lived for `linger` seconds, or the folder is gone. One process per folder stays."""
    for _ in range(10):  # a step that looks whether there is a sender holds the lock for a moment
        if not folder.is_dir():
            return
        with journal.sending(folder) as mine:
            if mine:
                _serve(folder, linger)
                return
        time.sleep(0.1)


def _serve(folder: Path, linger: float) -> None:
    store.load_mlflow()  # before anybody waits
    journal.remove_stale(folder)
    sender, last = Sender(folder), time.monotonic()
    while time.monotonic() - last < linger and folder.is_dir():
        if sender.round():
            last = time.monotonic()
        time.sleep(LOOK)
    sender.settle()


def main(arguments: list[str]) -> None:
    """Send what is left. WindquantError names the stores that do not answer, and how many runs wait for them."""
    parser = argparse.ArgumentParser(prog="python -m windquant sync", description=(__doc__ or "").partition("\n")[0])
    parser.parse_args(arguments)
    folder = Path.cwd() / journal.FOLDER
    waiting = journal.journals(folder)
    if not waiting:
        print("everything has arrived: no run waits in", journal.FOLDER)
        return
    with contextlib.ExitStack() as stack:
        deadline = time.monotonic() + LINGER + 5
        while not stack.enter_context(journal.sending(folder)):  # the one that the last step has left goes soon
            if time.monotonic() > deadline:
                raise WindquantError(f"{journal.FOLDER}: a sender is at work, because a step runs; try again later")
            time.sleep(0.5)
        sender = Sender(folder)
        living = sender.round()
        sender.settle() if not living else None
    left = [path for path in journal.journals(folder) if not journal.alive(path)]
    print(f"sent {len(waiting) - len(journal.journals(folder))} runs")
    problems = {to.uri: to.problem for to in sender.stores.values() if to.problem}
    if left:
        reasons = "; ".join(f"{tracking.without_password(uri)}: {problem}" for uri, problem in problems.items())
        raise WindquantError(f"{len(left)} runs are kept in {journal.FOLDER} ({reasons}); run this again later")


def resolve(uri: str) -> str:
    """The store's address with the user's password, which is in the environment only."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if given and tracking.without_password(given) == uri else uri


def brief(error: BaseException) -> str:
    """One short line. MLflow wraps "connection refused" in a paragraph, so an operating system's reason goes first."""
    reasons: list[BaseException] = [error]
    while (inner := reasons[-1].__cause__ or reasons[-1].__context__) and inner not in reasons:
        reasons.append(inner)
    system = [reason for reason in reasons if isinstance(reason, OSError) and reason.strerror]
    reason = system[-1] if system else error
    return " ".join(f"{type(reason).__name__}: {getattr(reason, 'strerror', None) or reason}".split())[:200]


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
