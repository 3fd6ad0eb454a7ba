"""What travels inside data/ besides the steps' artifacts, so that a clone has nothing to do."""

import shutil
from pathlib import Path

from windquant import atomic, integrity
from windquant.reproduce.store import md5

RESULTS = Path("results")
MODELS = Path("resources/models")
TRAVELLING_RESULTS = Path("data/results")
TRAVELLING_MODELS = Path("data/models")  # the manifests of the models alone
TRAVELLING_RECORDS = Path("data/snakemake.json")


def copy_changed(source: Path, target: Path) -> None:
    """Copy the files that differ, each one whole or not at all."""
    for path in whole_files(source):
        copy = target / path.name
        if not (copy.is_file() and md5(copy) == md5(path)):
            with atomic.output(copy) as partial:
                shutil.copyfile(path, partial)
            integrity.forget(copy.with_name(copy.name.removesuffix(integrity.ENDING)))  # it changes on purpose


def whole_files(folder: Path) -> list[Path]:
    """The files of a folder, without those that are partial or damaged."""
    files = [path for path in sorted(folder.glob("*")) if path.is_file()]
    return [path for path in files if atomic.MARK not in path.name and not path.name.endswith(integrity.DAMAGED)]
