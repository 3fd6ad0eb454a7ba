"""What travels inside data/ besides the steps' artifacts, so that a clone has nothing to do."""

import shutil
from pathlib import Path

from windquant import atomic
from windquant.reproduce.store import md5

RESULTS = Path("results")
MODELS = Path("resources/models")
TRAVELLING_RESULTS = Path("data/results")
TRAVELLING_MODELS = Path("data/models")  # the manifests of the models alone
TRAVELLING_RECORDS = Path("data/snakemake.json")


def copy_changed(source: Path, target: Path) -> None:
    """Copy the files that differ, each one whole or not at all."""
    for path in sorted(source.glob("*")):
        copy = target / path.name
        if path.is_file() and atomic.MARK not in path.name and not (copy.is_file() and md5(copy) == md5(path)):
            with atomic.output(copy) as partial:
                shutil.copyfile(path, partial)
