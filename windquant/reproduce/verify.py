"""Make results again from the configuration, in a scratch folder, and compare every artifact on the way.

    python -m windquant verify results/smollm2-135m_2.0bits.json

compares with what data/ and results/ hold, pulled or made here. The exit code is 0 if all is identical or equal, 1 if
something differs or is missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from windquant import configuration, exclusive, manifest
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.progress import Progress
from windquant.reproduce import differences, dryrun, records
from windquant.reproduce.differences import Verdict
from windquant.reproduce.store import Store
from windquant.reproduce.travel import MODELS, RESULTS, named

SCRATCH = Path(".verify") / "project"  # its own parent, for what the configuration names by `../`
#: What the workflow makes, and what belongs to the clone: all else is linked into the scratch folder.
OWN = {"data", "results", "resources", "logs", "mlartifacts", "mlruns", ".snakemake", ".cache", ".git", ".dvc"}
REUSED = "reused"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m windquant verify",
        description="Make results again from the configuration and compare every artifact on the way.",
    )
    parser.add_argument("results", nargs="*", type=Path, help="e.g. results/smollm2-135m_2.0bits.json; none: all here")
    parser.add_argument("--cores", default="all", help="for Snakemake; the number of threads decides the last bits")
    parser.add_argument("--keep", action="store_true", help=f"keep what was made again, in {SCRATCH}")
    given = parser.parse_args(arguments)
    with exclusive.alone("verify"):
        results = [named(path) for path in given.results] or _results(Path())
        table = verify(Path(), results, given.cores)
        if any(verdict.status in (differences.DIFFERENT, differences.MISSING) for verdict in table.values()):
            print(f"not reproduced; what was made again is in {SCRATCH}")
            sys.exit(1)
        if not given.keep:
            _clear(SCRATCH.parent)
        print("reproduced")


def verify(root: Path, results: Sequence[Path], cores: str = "all") -> dict[str, Verdict]:
    """Artifact -> verdict, printed as a table. What was made again stays in SCRATCH.

    Raises WindquantError if a result is not here to compare with, or cannot be made again.
    """
    for path in results:
        if not (root / path).exists() or not manifest_path(root / path).is_file():
            raise WindquantError(f"{path}: not here; `make pull` gets it, or `snakemake --cores all {path}` makes it")
    print(_version(root))
    scratch = root / SCRATCH
    _clear(scratch.parent)
    _link(root, scratch)
    targets = [str(path) for path in results]
    reused = _reuse_models(root, scratch, targets)
    _snakemake(scratch, targets, cores)
    table = compare(root, scratch, reused)
    show(table)
    print(_machines(root, scratch, list(table)))
    return table


def compare(root: Path, scratch: Path, reused: Sequence[str]) -> dict[str, Verdict]:
    """Artifact -> verdict, of all artifacts in `scratch`; a damaged one in `root` is different."""
    made = [name for name in records.read(scratch) if not name.endswith(".manifest.json")]
    table = {name: Verdict(REUSED, "digest checked") for name in reused}
    for name in Progress([name for name in made if name not in reused], label="comparing"):
        allowed = differences.tolerance(name)
        if allowed is None:
            continue
        try:
            if (root / name).exists():
                manifest.verified_sha256(root / name)
            table[name] = differences.compare(root / name, scratch / name, allowed)
        except WindquantError as error:
            table[name] = Verdict(differences.DIFFERENT, str(error).removeprefix(f"{root / name}: "))
    return table


def _results(root: Path) -> list[Path]:
    found = sorted((root / RESULTS).glob("*.manifest.json"))
    found = [path for path in found if differences.tolerance(str(RESULTS / path.name.removesuffix(".manifest.json")))]
    if not found:
        raise WindquantError(f"{root / RESULTS}: holds no result to compare with; `make pull` gets them")
    return [RESULTS / path.name.removesuffix(".manifest.json") for path in found]


def _version(root: Path) -> str:
    """Whether data/ is what everybody else gets."""
    try:
        store = Store(root)
        differing = store.differing()
    except WindquantError as error:
        return f"data/ is not compared with its remote: {error}"
    if differing:
        return f"data/ differs from data.dvc in {len(differing)} files, e.g. {differing[0]}: comparing with data/"
    return f"data/ is the version in data.dvc ({store.version[:12]})"


def _clear(scratch: Path) -> None:
    """Remove the scratch folder, which the sender of its MLflow runs may still write to for a moment."""
    deadline = time.monotonic() + 10
    while scratch.exists():
        shutil.rmtree(scratch, ignore_errors=time.monotonic() < deadline)


def _link(root: Path, scratch: Path) -> None:
    """A project without artifacts: links to the code and configuration, and to files that those may name."""
    (scratch / MODELS).mkdir(parents=True)
    skipped = {*OWN, SCRATCH.parts[0]}
    entries = [path for path in root.iterdir() if path.name not in skipped and not path.name.startswith("mlflow.db")]
    resources = root / MODELS.parent
    if resources.is_dir():
        entries += [path for path in resources.iterdir() if path.name != MODELS.name]
    for path in entries:
        (scratch / path.relative_to(root)).symlink_to(path.absolute())
    for text in _texts(configuration.load(root / "config" / "config.yaml")):
        _link_sibling(root, scratch, text)


def _link_sibling(root: Path, scratch: Path, text: str) -> None:
    """Link what `../my-model` leads through beside the scratch folder too; any other text leads nowhere."""
    parts = Path(os.path.normpath(text)).parts
    if parts[:1] != ("..",) or not (root / text).exists():
        return
    if len(parts) == 1 or parts[1] in ("..", scratch.name):
        raise WindquantError(f"config/config.yaml: {text}: verify cannot follow this path; give an absolute one")
    link = scratch.parent / parts[1]
    if not link.exists():
        link.symlink_to(root.resolve().parent / parts[1])


def _texts(value: Any) -> Iterator[str]:
    """All texts of a configuration."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _reuse_models(root: Path, scratch: Path, targets: Sequence[str]) -> list[str]:
    """Link the models that would be got anew and are here intact; their folders, as links to each file."""
    jobs = dryrun.plan(scratch, targets).jobs
    reused = [str(MODELS / path.name) for path in (root / MODELS).glob("*") if str(MODELS / path.name) in jobs]
    reused = [name for name in reused if manifest_path(root / name).is_file()]
    known = records.read(root)
    for name in reused:
        manifest.verified_sha256(root / name)
        for path in (root / name).rglob("*"):
            if path.is_file() and path.name != manifest.SNAKEMAKE_MARK:
                link = scratch / path.relative_to(root)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())
        shutil.copy2(manifest_path(root / name), manifest_path(scratch / name))
        ours = (name, str(manifest_path(Path(name))))
        records.write(scratch, {artifact: known[artifact] for artifact in ours if artifact in known})
    left = dryrun.plan(scratch, targets).jobs
    return [name for name in reused if name not in left]  # another configuration or version gets another model


def _snakemake(scratch: Path, targets: Sequence[str], cores: str) -> None:
    command = [sys.executable, "-m", "snakemake", "--cores", cores, "--", *targets]
    # its own MLflow store: what is made again is no experiment of the team's
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
    if subprocess.run(command, cwd=scratch, env=environment, stdout=sys.stderr).returncode:
        raise WindquantError(f"{', '.join(targets)}: could not be made again; see above, and {scratch / 'logs'}")


def show(table: dict[str, Verdict]) -> None:
    width = max(map(len, table), default=0)
    print(f"{'artifact':<{width}}  verdict")
    for name, verdict in sorted(table.items()):
        detail = f"  {verdict.detail}" if verdict.detail else ""
        print(f"{name:<{width}}  {verdict.status}{detail}")


def _machines(root: Path, scratch: Path, names: Sequence[str]) -> str:
    """Whether the same bytes were to be expected."""
    pairs = [
        tuple(Manifest.load(folder / name).machine for folder in (root, scratch))
        for name in names
        if manifest_path(root / name).is_file() and manifest_path(scratch / name).is_file()
    ]
    for then, now in pairs:
        other = [
            f"{key} then: {then.get(key) or 'none'}, now: {now[key] or 'none'}"
            for key in now
            if then.get(key) != now[key]
        ]
        if other:
            return f"made on another kind of machine, or in other threads: bytes may differ ({'; '.join(other)})"
    return "made on the same kind of machine: bytes should not differ"
