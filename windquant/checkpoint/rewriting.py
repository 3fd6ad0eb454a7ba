"""A packed checkpoint with other values in some of its tensors: the file is copied, and bytes change in place."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from windquant.checkpoint.files import Measured, measure
from windquant.checkpoint.header import entries, weight_files


def rewrite(source: Path, folder: Path, changes: Mapping[str, Tensor]) -> Measured:
    """Copy the checkpoint `source` to `folder` with the tensors `changes` in it, by name and in the types on disk.

    Takes the memory of one tensor. Raises ValueError for a name or shape that the checkpoint does not have (a caller's
    bug), WindquantError for a damaged checkpoint.
    """
    shutil.copytree(source, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)  # also of a read-only one
    found = {name: entry for file in weight_files(folder) for name, entry in entries(file).items()}
    for name, value in changes.items():
        entry = found.get(name)
        if entry is None or entry.dtype is None or entry.shape != tuple(value.shape):
            raise ValueError(f"{source}: {name} {list(value.shape)} is not in the checkpoint, which has {entry}")
        with entry.file.open("r+b") as file:
            file.seek(entry.start)
            file.write(value.to(entry.dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    return measure(folder)
