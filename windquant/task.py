"""What the `run` of a step gets: where its inputs are, where to write, and whom to tell."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from windquant import atomic, tracking
from windquant.progress import Progress

T = TypeVar("T")
CACHE = Path(".cache")


class Task:
    """One run of one step."""

    def __init__(
        self,
        step: str,
        inputs: dict[str, Path],
        output: Path,
        *,
        files: dict[str, list[Path]] | None = None,
        seed: int = 0,
        key: Callable[[], str] = lambda: "default",
        tracker: "tracking.Tracker | None" = None,
    ) -> None:
        self.step = step
        self.inputs = inputs  # the inputs that take one path; an optional one that was not given is missing
        self.files = files or {}  # the inputs that take several paths
        self.output = output  # write here: a file or a folder of your making; it is renamed when `run` returns
        self.seed = seed
        self.notes: dict[str, Any] = {}
        self.tracker = tracker or tracking.Tracker()
        self._final_name = atomic.final_name(output)
        self._key = key  # called only where a cache is used: it reads the step's code
        self._cache: Path | None = None

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        self.tracker.metrics({name: value}, step)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.tracker.metrics(values, step)

    def params(self, values: Mapping[str, Any]) -> None:
        """More parameters than the settings, e.g. what was measured on the input."""
        self.tracker.params(values)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder (`path` may lie in `output`) into the run's artifacts."""
        self.tracker.artifact(path, folder, self._final_name if path == self.output else None)

    def dataset(self, name: str, source: str, digest: str, context: str = "") -> None:
        """Name the data that the step read: `digest` identifies its content, `context` says what for."""
        self.tracker.dataset(name, source, digest, context)

    def note(self, key: str, value: Any) -> None:
        """A JSON value for the manifest's `notes`, where the steps that follow find it."""
        self.notes[key] = value

    def progress(self, iterable: Iterable[T] | None = None, total: int | None = None, label: str = "") -> Progress[T]:
        """A bar or lines for the user, and the metric `progress/<label>` in percent for the run."""
        name = f"progress/{label or self.step}"

        def report(done: int, total: int | None) -> None:
            if total:
                self.metric(name, 100 * done / total, done)

        return Progress(iterable, total, label or self.step, report=report)

    @property
    def cache(self) -> Path:
        """Folder for training checkpoints: the same for the same settings, inputs and code; removed after success."""
        if self._cache is None:
            self._cache = CACHE / self.step / self._key()
        self._cache.mkdir(parents=True, exist_ok=True)
        return self._cache

    def clear_cache(self) -> None:
        if self._cache is not None:
            shutil.rmtree(self._cache, ignore_errors=True)
