"""Get what data.dvc names from the DVC remote, and the models that it was made from.

python -m windquant pull
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from windquant import exclusive, integrity
from windquant.errors import WindquantError
from windquant.reproduce import originals, records
from windquant.reproduce.store import Store, md5
from windquant.reproduce.travel import RESULTS, TRAVELLING_RECORDS, TRAVELLING_RESULTS, copy_changed


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m windquant pull", description="Get data/ and the results.")
    parser.add_argument("--no-models", action="store_true", help="do not get the original models")
    parser.add_argument("--force", action="store_true", help="replace what was never pushed")
    given = parser.parse_args(arguments)
    pull(Path(), models=not given.no_models, force=given.force)


def pull(root: Path, models: bool = True, force: bool = False) -> None:
    """Raises WindquantError if the remote lacks something, and before anything is lost that was never pushed.

    `root` is the current folder, as it is for Snakemake, which cannot work there meanwhile.
    """
    store = Store(root)
    exclusive.claim()
    print(f"from remote {store.remote_name}")
    count = store.fetch()
    incoming = store.listing()
    lost = [] if force else list(unsaved(store, incoming))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise WindquantError(
            f"{lost[0]}{more}: not pushed, and pull would remove it; `make push` first, on a branch of your own if "
            "data.dvc has changed meanwhile, or `python -m windquant pull --force`"
        )
    before = {path.name: md5(path) for path in (root / TRAVELLING_RESULTS).glob("*") if path.is_file()}
    shutil.rmtree(root / integrity.MEMORY, ignore_errors=True)  # what follows changes artifacts on purpose
    store.checkout()
    copy_changed(root / TRAVELLING_RESULTS, root / RESULTS)
    for name, digest in before.items():  # what an earlier pull has brought, and whoever pushed has removed since
        path = root / RESULTS / name
        if not (root / TRAVELLING_RESULTS / name).exists() and path.is_file() and md5(path) == digest:
            path.unlink()
    for warning in originals.restore(root, fetch=models):
        print(f"warning: {warning}", file=sys.stderr)
    travelling = records.load(root / TRAVELLING_RECORDS)
    records.write(root, travelling)
    size = sum(path.stat().st_size for _, path in store.files()) / 1e6
    print(f"{size:,.1f} MB in {len(incoming)} files, {count} of them new here")
    for path in sorted((root / TRAVELLING_RESULTS).glob("*.manifest.json")):
        print(f"  {RESULTS / path.name.removesuffix('.manifest.json')}")


def unsaved(store: Store, incoming: dict[str, str]) -> Iterator[str]:
    """Files that a pull would remove or replace and that are nowhere else: neither pushed from here nor pulled."""
    here = {name: path for name, path in store.files()}
    for path in sorted((store.root / RESULTS).glob("*")):
        name = f"{TRAVELLING_RESULTS.name}/{path.name}"
        if path.is_file() and name in incoming:
            here[name] = path  # not the copy that travels
    for name, path in here.items():
        digest = md5(path)
        if incoming.get(name) != digest and not store.safe(digest):
            yield path.relative_to(store.root).as_posix()
