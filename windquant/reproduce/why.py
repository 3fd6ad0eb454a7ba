"""How an artifact came about, and whether it is current.

    python -m windquant why results/smollm2-135m_2.0bits.json

The first part is from the manifests of the artifact and of what it was made from. The second part asks Snakemake what
it would run, and says in which setting, digest or input the command of now differs from the one that was run.
"""

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from windquant import manifest
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.progress import duration
from windquant.reproduce import dryrun, travel

SHORT = 12  # digits of a digest
#: Flags that say where and how fast a step runs, not what it makes.
WITHOUT_EFFECT = ("output", "experiment", "threads")
NOT_GIVEN = "not given"
NAMES = {"code": "code", "lock": "locked packages (requirements.lock)"}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m windquant why", description="How an artifact came about, and whether it is current."
    )
    parser.add_argument("artifact", type=Path, help="a file or folder in data/, results/ or resources/models/")
    artifact = parser.parse_args(arguments).artifact
    for line in why(travel.named(artifact)):
        print(line)


def why(artifact: Path) -> Iterator[str]:
    """The answer, line by line. `artifact` is relative to the project, the current folder."""
    document = _manifest(artifact)
    yield f"{artifact}"
    yield from _origin(document)
    yield "made from"
    yield from _tree(document, "  ", set())
    yield ""
    yield from _currency(artifact, document)


def _manifest(artifact: Path) -> Manifest:
    if manifest_path(artifact).is_file():
        return Manifest.load(artifact)
    if artifact.exists():
        raise WindquantError(
            f"{artifact}: has no manifest beside it, so no step has made or finished it; "
            "artifacts are what the steps write, e.g. data/bank/smollm2-135m.safetensors"
        )
    near = sorted(str(path).removesuffix(".manifest.json") for path in artifact.parent.glob("*.manifest.json"))
    hint = f"; there is {', '.join(near[:6])}" if near else ""
    raise WindquantError(f"{artifact}: no such file or folder{hint}")


def _origin(document: Manifest) -> Iterator[str]:
    """What the artifact's own manifest says."""
    settings = " ".join(f"{name}={_short(value)}" for name, value in document.settings.items())
    machine = ", ".join(filter(None, document.machine.values()))
    commit = f"{document.git_commit or 'none (not a git clone)'}{' and uncommitted changes' * bool(document.git_dirty)}"
    memory = max(document.peak_memory_bytes.values(), default=0) / 1e9
    rows = {
        "step": document.step,
        "started": document.started or "unknown (older manifest)",
        "took": f"{duration(document.seconds)}, {memory:.1f} GB of memory at most",
        "settings": settings or "none",
        "seed": str(document.seed),
        "commit": commit,
        "code": document.code or "unknown",
        "machine": machine or "unknown",
        "packages": ", ".join(f"{name} {version}" for name, version in list(document.versions.items())[:4]) + ", ...",
        "MLflow run": document.mlflow_run_id or "none",
        "sha256": document.output["sha256"],
        "command": document.command or "unknown (older manifest)",
    }
    for name, value in rows.items():
        yield f"  {name:<10} {value}"


def _tree(document: Manifest, indent: str, seen: set[str]) -> Iterator[str]:
    """The inputs and theirs, each one told once: what stands above already is only named."""
    for name, entry in document.inputs.items():
        path = Path(entry["path"])
        if str(path) in seen:
            continue
        seen.add(str(path))
        text = f"{indent}{name}: {path}{'' if path.exists() else ' (no longer here)'}  {entry['sha256'][:SHORT]}"
        if not manifest_path(path).is_file():
            yield text
            continue
        source = Manifest.load(path)
        above = ", ".join(other for other, known in source.inputs.items() if known["path"] in seen)
        text += f"  {source.step}, {source.started or 'unknown'}, {duration(source.seconds)}"
        yield text + f"; from {above} above" * bool(above)
        yield from _tree(source, indent + "  ", seen)
    if not document.inputs:
        yield f"{indent}nothing of this project"


def _currency(artifact: Path, document: Manifest) -> Iterator[str]:
    """What differs from now, and what would run."""
    damaged = artifact.exists() and manifest.sha256(artifact) != document.output["sha256"]
    if damaged:
        yield "damaged: its content is not what its manifest says; delete it and run again"
    try:
        plan = dryrun.plan(Path(), [str(artifact)])
    except WindquantError as error:
        yield f"not the workflow's: {error}"
        return
    if plan.rules:
        yield "not current"
        yield from (f"  {job.output}: {line}" for job in plan.jobs.values() for line in _causes(job))
        yield f"would run: {plan.text}"
        return
    changed = list(_inputs(document))
    yield from changed
    if not damaged and not changed:
        yield "current: configuration, code and inputs are what they were"


def _causes(job: dryrun.Job) -> Iterator[str]:
    """Why a job would run, other than because of the jobs before it. Snakemake names the first such jobs only."""
    path = Path(job.output)
    if not path.exists() or not manifest_path(path).is_file():
        yield "missing"
        return
    document = Manifest.load(path)
    then, now = dryrun.flags(shlex.split(document.command)), dryrun.flags(job.command)
    names = [name for name in [*now, *(name for name in then if name not in now)] if name not in WITHOUT_EFFECT]
    lines = [
        f"{NAMES.get(name, name)} was {_short(then.get(name, NOT_GIVEN))}, is {_short(now.get(name, NOT_GIVEN))}"
        for name in names
        if then.get(name) != now.get(name)
    ]
    yield from [*lines, *_inputs(document)] or filter(None, [job.reason])


def _inputs(document: Manifest) -> Iterator[str]:
    """The inputs that are no longer what the artifact was made from."""
    for name, entry in document.inputs.items():
        path = Path(entry["path"])
        if path.exists() and (digest := manifest.sha256(path)) != entry["sha256"]:
            yield f"{name} {path} was {entry['sha256'][:SHORT]}, is {digest[:SHORT]}"


def _short(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:SHORT]
    return text if len(text) <= 40 else f"{text[:37]}..."
