"""A packed checkpoint with other values in some of its tensors: the file is copied, and bytes change in place."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from windquant.checkpoint.files import Measured, measure
from windquant.header import entries, put, weight_files


def rewrite(source: Path, folder: Path, changes: Iterable[tuple[str, Tensor]]) -> Measured:
    """Copy the checkpoint `source` to `folder` with other tensors in it, given by name, in the types on disk.

    Takes the memory of one tensor. Raises ValueError for a name or shape that the checkpoint does not have (a caller's
    bug), WindquantError for a damaged checkpoint.
    """
    shutil.copytree(source, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)  # also of a read-only one
    found = {name: entry for file in weight_files(folder) for name, entry in entries(file).items()}
    for name, value in changes:
        if name not in found:
            raise ValueError(f"{source}: {name} {list(value.shape)} is not in the checkpoint")
        put(found[name], value)
    return measure(folder)
