"""How an artifact came about, and whether it is current.

    python -m windquant why results/smollm2-135m_2.0bits.json

The first part is from the manifests of the artifact and of what it was made from. The second part asks Snakemake what
it would run, and says in which setting, digest or input the command of now differs from the one that was run.
"""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from windquant import manifest
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.progress import duration
from windquant.reproduce import dryrun

SHORT = 12  # digits of a digest
#: Flags that say where and how fast a step runs, not what it makes.
WITHOUT_EFFECT = ("output", "experiment", "threads")
NAMES = {"code": "code", "lock": "locked packages (requirements.lock)"}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m windquant why", description="How an artifact came about, and whether it is current."
    )
    parser.add_argument("artifact", type=Path, help="a file or folder in data/, results/ or resources/models/")
    artifact = parser.parse_args(arguments).artifact
    for line in why(_relative(artifact)):
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


def _relative(path: Path) -> Path:
    """The path as rules name it; a manifest stands for its artifact."""
    absolute = path.absolute()
    if not absolute.is_relative_to(Path.cwd()):
        raise WindquantError(f"{path}: not in {Path.cwd()}; call this in the project's folder")
    relative = absolute.relative_to(Path.cwd())
    return relative.with_name(relative.name.removesuffix(".manifest.json"))


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
    """The inputs and theirs, each one told once."""
    for name, entry in document.inputs.items():
        path = Path(entry["path"])
        text = f"{indent}{name}: {path}  {entry['sha256'][:SHORT]}"
        if str(path) in seen:
            yield f"{text}  (see above)"
        elif not manifest_path(path).is_file():
            yield text
        else:
            seen.add(str(path))
            source = Manifest.load(path)
            yield f"{text}  {source.step}, {source.started or 'unknown'}, {duration(source.seconds)}"
            yield from _tree(source, indent + "  ", seen)
    if not document.inputs:
        yield f"{indent}nothing of this project"


def _currency(artifact: Path, document: Manifest) -> Iterator[str]:
    """What differs from now, and what would run."""
    damaged = artifact.exists() and manifest.sha256(artifact) != document.output["sha256"]
    if damaged:
        yield "damaged: its content is not what its manifest says; delete it and run again"
    if not artifact.exists():
        yield "deleted: only its manifest is left"
    try:
        plan = dryrun.plan(Path(), [str(artifact)])
    except WindquantError as error:
        yield f"not the workflow's: {error}"
        return
    command = plan.commands.get(str(artifact))
    if command is None and not plan.rules:
        if not damaged:
            yield "current: configuration, code and inputs are what they were"
        return
    yield "not current"
    differences = list(_differences(document, command or []))
    yield from (f"  {line}" for line in differences or ["something that it is made from differs:"])
    yield from (f"  {line}" for line in _causes(artifact, document, plan, set()))
    yield f"would run: {plan.text}"


def _causes(artifact: Path, document: Manifest, plan: dryrun.Plan, seen: set[str]) -> Iterator[str]:
    """What differs further up, where the command has a reason of its own to run again."""
    for entry in document.inputs.values():
        path = Path(entry["path"])
        command = plan.commands.get(str(path))
        if command is None or str(path) in seen:
            continue
        seen.add(str(path))
        if not manifest_path(path).is_file():
            yield f"{path}: missing"
            continue
        source = Manifest.load(path)
        if not path.exists():
            yield f"{path}: missing"
        yield from (f"{path}: {line}" for line in _differences(source, command))
        yield from _causes(path, source, plan, seen)


def _differences(document: Manifest, command: Sequence[str]) -> Iterator[str]:
    """Settings and digests in which the command of now differs from the manifest; inputs that have changed since."""
    then, now = _flags(shlex.split(document.command)), _flags(command)
    for name in [name for name in now if name not in WITHOUT_EFFECT and now[name] != then.get(name)]:
        yield f"{NAMES.get(name, name)}: was {then.get(name, 'not given')}, is {now[name]}"
    for name in [name for name in then if name not in WITHOUT_EFFECT and name not in now] if command else []:
        yield f"{name}: was {then[name]}, is no longer given"
    for name, entry in document.inputs.items():
        path = Path(entry["path"])
        if not path.exists():
            yield f"{name} {path}: missing"
        elif (digest := manifest.sha256(path)) != entry["sha256"]:
            yield f"{name} {path}: was {entry['sha256'][:SHORT]}, is {digest[:SHORT]}"


def _flags(command: Sequence[str]) -> Mapping[str, str]:
    """{"steps": "30"} of [..., "--steps=30"] and of [..., "--steps", "30"]."""
    flags: dict[str, list[str]] = {}
    name = ""
    for word in command:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            flags[name] = [value] if value else []
        elif name:
            flags[name].append(word)
    return {name: " ".join(values) for name, values in flags.items()}


def _short(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
