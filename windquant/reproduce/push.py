"""Send `data/` and the results to the DVC remote, so that a clone has nothing to do.

    python -m windquant push      verify, add, send; then commit data.dvc

Results, Snakemake's records and the models' manifests travel inside data/.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from windquant import atomic, exclusive, manifest
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.progress import Progress
from windquant.reproduce import dryrun, originals, records
from windquant.reproduce.store import DATA, Store
from windquant.reproduce.travel import (
    MODELS,
    RESULTS,
    TRAVELLING_RECORDS,
    TRAVELLING_RESULTS,
    copy_changed,
    whole_files,
)


def main(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser(
        prog="python -m windquant push", description="Send data/ and the results to the DVC remote."
    ).parse_args(arguments)
    push(Path())


def push(root: Path) -> None:
    """Raises WindquantError for damaged data, and where the remote cannot be used; data.dvc is then as it was.

    `root` is the current folder, as it is for Snakemake, which cannot work there meanwhile.
    """
    store = Store(root)
    exclusive.claim()
    print(f"to remote {store.remote_name}")
    artifacts = {name: record for name, record in records.read(root).items() if _travels(root, name)}
    if not any(manifest_path(root / name).exists() for name in artifacts):
        raise WindquantError(f"{root / DATA}: nothing to push, no step has finished here; `make run` first")
    check_contents(root, artifacts)
    _mirror(root / RESULTS, root / TRAVELLING_RESULTS)
    absent = originals.save(root, artifacts)
    records.save(root / TRAVELLING_RECORDS, absent | artifacts)
    with _unchanged_on_failure(store.file):
        store.add()
        sent = store.push()
    size = sum(path.stat().st_size for _, path in store.files()) / 1e6
    print(f"{sum(name.endswith('.manifest.json') for name in artifacts)} artifacts, {size:,.1f} MB: {sent} files sent")
    for warning in _surprises(root):
        print(f"warning: {warning}", file=sys.stderr)
    if _git(root, "status", "--porcelain", "--", str(store.file.relative_to(root))):
        print("now commit it: git add data.dvc && git commit -m 'Data' && git push")
    else:
        print("data.dvc is as committed")


def check_contents(root: Path, artifacts: Iterable[str]) -> None:
    """WindquantError naming the first artifact whose content is not what its manifest says."""
    finished = [root / name for name in artifacts if manifest_path(root / name).exists()]
    for path in Progress(finished, label="verifying"):
        manifest.verified_sha256(path)


def _travels(root: Path, artifact: str) -> bool:
    """Artifacts in data/ and results/ do; of a model the records do, if it is there with its manifest."""
    if artifact.startswith(f"{MODELS}/"):
        path = root / artifact
        return path.name.endswith(".manifest.json") or manifest_path(path).exists()
    return artifact.startswith((f"{DATA}/", f"{RESULTS}/"))


def _mirror(source: Path, target: Path) -> None:
    """Make `target` hold the finished results of `source`, and nothing else."""
    names = {path.name for path in whole_files(source)}
    if not names and any(target.glob("*")):
        raise WindquantError(f"{source}: empty, though {target} holds results; `make pull` brings them back")
    for path in target.glob("*"):
        if path.name not in names:
            print(f"no longer there: {source / path.name}", file=sys.stderr)
            path.unlink()
    copy_changed(source, target)


def _surprises(root: Path) -> Iterator[str]:
    """What would keep a colleague from finding everything in place."""
    changed = [line[3:] for line in _git(root, "status", "--porcelain").splitlines() if line[3:] != "data.dvc"]
    if changed:
        yield f"not committed, so a clone will not have it: {', '.join(changed[:5])}{', ...' * (len(changed) > 5)}"
    results = [
        str(path.relative_to(root)) for path in sorted((root / RESULTS).glob("*")) if manifest_path(path).exists()
    ]
    try:
        plan = dryrun.plan(root, results) if results else None
    except WindquantError as error:  # e.g. of a result that the configuration no longer knows; the data are sent
        yield f"cannot say whether results are current: {error}"
        return
    if plan and plan.rules:
        yield f"Snakemake would make results again here, and so it would in a clone: {plan.text}"


@contextlib.contextmanager
def _unchanged_on_failure(file: Path) -> Iterator[None]:
    """A data.dvc that names what the remote lacks must not be committed."""
    before = file.read_text() if file.is_file() else None
    try:
        yield
    except BaseException:
        if before is not None:
            atomic.write_text(file, before)
        raise


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout
