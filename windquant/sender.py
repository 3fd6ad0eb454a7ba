"""Send what the steps have told (`journal.py`) to their MLflow store.

    python -m windquant sync      send what is left, and say what cannot be sent

One process per folder does so for all steps: the first step starts it, and it ends when none has lived for a while. So
MLflow is imported once, not by every step; a store that hangs makes nobody else wait; and a step that was killed has
somebody to report it.
"""

import argparse
import contextlib
import sys
import time
import traceback
from pathlib import Path

from windquant import journal, tracking_store as store
from windquant.delivery import Delivery, Store
from windquant.errors import WindquantError

LINGER = 20.0  # seconds without a living step until the sender goes
LOOK = 0.1  # seconds between two looks at the journals
UNREADABLE = ".unreadable"  # what a journal is called from then on that makes no sense


class Sender:
    """All journals of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stores: dict[str, Store] = {}
        self.deliveries: dict[Path, Delivery] = {}
        self.unreadable: list[Path] = []  # what they are called now

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
            self.unreadable.append(path.rename(path.with_suffix(UNREADABLE)))
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
    print(f"sent {len(waiting) - len(journal.journals(folder)) - len(sender.unreadable)} runs")
    problems = {to.uri: to.problem for to in sender.stores.values() if to.problem}
    if left:
        reasons = "; ".join(f"{store.without_password(uri)}: {problem}" for uri, problem in problems.items())
        raise WindquantError(f"{len(left)} runs are kept in {journal.FOLDER} ({reasons}); run this again later")
    if sender.unreadable:
        names = ", ".join(str(path.relative_to(Path.cwd())) for path in sender.unreadable)
        raise WindquantError(f"{names}: not readable, or refused by the store, for the reason above; delete it")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
