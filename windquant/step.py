"""The frame of every step: command line, seeds, atomic output, manifest, tracking, errors.

    python -m windquant.recovery --model DIR --calibration DIR --checkpoint DIR --output DIR --steps 30

A step module has a `Settings` dataclass, `run(task, settings)`, and ends with

    if __name__ == "__main__":
        step.main("recovery", run, Settings, inputs=("model", "calibration", "checkpoint"))

Exit codes: 0 done; 2 bad input (one line `error: ...`); 1 any other failure (with its traceback);
128 + signal where the process was told to stop.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TypeVar

from windquant import (
    atomic,
    control_groups,
    dependencies,
    exclusive,
    integrity,
    manifest,
    memory,
    settings as settings_module,
    tracking,
)
from windquant.errors import WindquantError, reported
from windquant.manifest import Manifest
from windquant.naming import HIGHEST_SEED
from windquant.settings import Limit
from windquant.task import Task as Task  # steps know it by this module's name

S = TypeVar("S")
OPTIONAL, SEVERAL = ("?", "*"), ("*", "+")  # marks of inputs


@dataclass(frozen=True)
class Frame:
    """The settings that every step has."""

    seed: Annotated[int, Limit("minimum", 0), Limit("maximum", HIGHEST_SEED)] = 0  # of every random choice
    threads: int | None = None  # of the computation; none: OMP_NUM_THREADS, or all cores, which are the most
    code: str = ""  # digest of the code, for the manifest; empty: of the step's module and what it imports
    lock: str = ""  # digest of the locked packages, for the manifest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WindquantError(message.removeprefix("argument "))


def main(
    step: str,
    run: Callable[[Task, S], None],
    settings: type[S],
    inputs: Sequence[str] = (),
    *,
    argv: Sequence[str] | None = None,
    light: bool = False,
) -> None:
    """Run one step from the command line.

    `inputs` are names of path flags: "plan" must be given, "plan?" may be given, "results+" takes one path or more,
    "parts*" any number.
    `light` steps do without torch. Raises SystemExit(2) on bad input; any other exception passes through.
    """
    started = _process_age() if argv is None else 0.0
    start = time.monotonic() - started
    try:
        module = _module(run).removesuffix(".__main__") or step
        description = (sys.modules[run.__module__].__doc__ or "").strip().partition("\n")[0]
        arguments = _parse(module, description, settings, inputs, argv)
        command = shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
        _run(step, run, settings_module.from_arguments(settings, arguments), inputs, arguments, start, light, command)
    except BaseException as error:
        if (code := reported(error, step)) is None:
            raise
        raise SystemExit(code) from None


def _parse(
    module: str, description: str, settings: type, inputs: Sequence[str], argv: Sequence[str] | None
) -> argparse.Namespace:
    parser = _Parser(prog=f"python -m {module}", allow_abbrev=False, description=description)
    for name, mark in map(_split, inputs):
        several: dict[str, Any] = {"nargs": "+"} if mark in SEVERAL else {}
        required = mark not in OPTIONAL
        parser.add_argument(settings_module.flag(name), type=Path, metavar="PATH", required=required, **several)
    parser.add_argument("--output", type=Path, metavar="PATH", required=True, help="file or folder to make")
    parser.add_argument("--experiment", metavar="NAME", help="log to MLflow, as a step of this plan or model")
    settings_module.add_arguments(parser, Frame)
    settings_module.add_arguments(parser.add_argument_group("settings"), settings)
    return parser.parse_args(argv)


def _split(name: str) -> tuple[str, str]:
    """("plan", "?") of "plan?"."""
    return (name[:-1], name[-1]) if name[-1] in OPTIONAL + SEVERAL else (name, "")


def _run(
    step: str,
    run: Callable[[Task, S], None],
    settings: S,
    inputs: Sequence[str],
    arguments: argparse.Namespace,
    start: float,
    light: bool,
    command: str,
) -> None:
    output: Path = arguments.output
    if not output.name:
        raise WindquantError(f"--output {output}: not the name of a file or folder to make")
    if output.is_dir() and any(output.iterdir()) and not atomic.manifest_path(output).exists():
        raise WindquantError(f"--output {output}: holds what no step has made; give another name, or remove it")
    single, several = _collect(inputs, arguments)
    sources = {**single, **{f"{name}.{i}": path for name, paths in several.items() for i, path in enumerate(paths)}}
    digests = {name: {"path": str(path), "sha256": _digest(name, path)} for name, path in sources.items()}
    plain = settings_module.to_json(settings)

    def key() -> str:
        return cache_key(step, plain, arguments.seed, digests, code_digest(run))

    threads = min(arguments.threads or _omp_threads() or sys.maxsize, control_groups.cores())
    if not light:
        import torch

        memory.keep_freed()
        torch.set_num_threads(threads)
    commit, dirty = manifest.git_state()

    child = tracking.child(arguments.experiment, step, plain, arguments.seed, output, commit, dirty)
    with (
        _terminable(),
        exclusive.running(f"step {step}, which makes {output}"),
        child as tracker,
    ):  # the run ends after the artifact has its name and its manifest
        with atomic.output(output) as partial:
            for name, entry in digests.items():
                tracker.dataset(name, entry["path"], entry["sha256"], step)
            seed_everything(arguments.seed, torch=not light)
            task = Task(step, single, partial, files=several, seed=arguments.seed, key=key, tracker=tracker)
            run(task, settings)
            if not partial.exists():
                raise RuntimeError(f"step {step} returned without making {output}")
            document = Manifest(
                step=step,
                settings=plain,
                seed=arguments.seed,
                inputs=digests,
                output={"path": str(output), "sha256": manifest.sha256(partial)},
                seconds=round(time.monotonic() - start, 3),
                peak_memory_bytes=peak_memory(),
                versions=manifest.versions(),
                git_commit=commit,
                git_dirty=dirty,
                mlflow_run_id=tracker.run_id,
                notes=task.notes,
                config_sha256=manifest.config_sha256(step, plain, arguments.seed),
                code=arguments.code or code_digest(run),
                lock=arguments.lock,
                command=command,
                started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - (time.monotonic() - start))),
                machine=manifest.machine(threads),
            )
            json.dumps(document.notes)  # an error here leaves no artifact without a manifest
            tracker.metrics({"seconds": document.seconds, **_flat(document.peak_memory_bytes, "peak_memory_bytes")})
        document.save(output)
        integrity.remember(output)
        task.clear_cache()


def _omp_threads() -> int:
    """What the user's OMP_NUM_THREADS asks for, which torch would take by itself; 0 where that is no number."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # the others are of nested loops
    return int(first) if first.isdecimal() else 0


def _collect(inputs: Sequence[str], arguments: argparse.Namespace) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    single: dict[str, Path] = {}
    several: dict[str, list[Path]] = {}
    for name, mark in map(_split, inputs):
        value = getattr(arguments, name)
        if mark in SEVERAL:
            several[name] = value or []
        elif value is not None:
            single[name] = value
    return single, several


def _digest(name: str, path: Path) -> str:
    if not path.exists():
        raise WindquantError(f"{settings_module.flag(name.partition('.')[0])} {path}: no such file or folder")
    try:
        return manifest.verified_sha256(path)
    except WindquantError:
        integrity.forget(path)
        raise


def cache_key(
    step: str, settings: Mapping[str, Any], seed: int, inputs: Mapping[str, Mapping[str, str]], code: str
) -> str:
    """Digest of whatever a training checkpoint depends on."""
    content = {name: entry["sha256"] for name, entry in inputs.items()}
    text = json.dumps([step, settings, seed, content, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(run: Callable[..., None]) -> str:
    """Digest of the step's module and what it imports, comments aside; empty outside of the package."""
    name = _module(run)
    return dependencies.digest(name) if name.startswith(dependencies.PACKAGE + ".") else ""


def _module(run: Callable[..., None]) -> str:
    """Name of the module that `run` is of; `python -m` keeps the real one in its spec. Empty where there is none."""
    spec = getattr(sys.modules.get(run.__module__), "__spec__", None)
    return spec.name if spec is not None else ""


def seed_everything(seed: int, torch: bool = True) -> None:
    """Seed python, numpy and (unless the step is light) torch, which then refuses nondeterministic kernels."""
    random.seed(seed)
    if "numpy" in sys.modules or torch:
        import numpy

        numpy.random.seed(seed % 2**32)
    if torch:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        import torch as torch_module

        torch_module.manual_seed(seed)
        torch_module.use_deterministic_algorithms(True)
        # It also fills all new memory with NaN: the frame of a streamed model, never touched, would take memory.
        memory: Any = torch_module.utils.deterministic
        memory.fill_uninitialized_memory = False


def peak_memory() -> dict[str, int]:
    """Bytes: host = the largest of this process and its children, gpu = torch's peak, 0 without a GPU."""
    kibibytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    torch = sys.modules.get("torch")
    gpu = torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0
    return {"host": kibibytes * 1024, "gpu": gpu}


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that the partial output goes; worker processes that inherit this just die."""
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _flat(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _process_age() -> float:
    """Seconds since this process was started, so that a step's time includes its imports; 0 where unknown."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return 0.0
