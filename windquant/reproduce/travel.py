"""What travels inside data/ besides the steps' artifacts, so that a clone has nothing to do."""

import os
import shutil
from pathlib import Path

from windquant import atomic, integrity
from windquant.errors import WindquantError
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


def named(path: Path) -> Path:
    """An artifact's path as rules name it, in the project that is the current folder; a manifest stands for its
    artifact. WindquantError for a path elsewhere.
    """
    absolute = Path(os.path.normpath(path.absolute()))
    if not absolute.is_relative_to(Path.cwd()):
        raise WindquantError(f"{path}: not in {Path.cwd()}; call this in the project's folder")
    relative = absolute.relative_to(Path.cwd())
    return relative.with_name(relative.name.removesuffix(".manifest.json"))
