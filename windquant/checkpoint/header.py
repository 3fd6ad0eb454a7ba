"""The header of a safetensors file: what is in it and how many bytes it takes, without reading the tensors.

A file is eight bytes (the header's length), the header (JSON), and the tensors. The sizes here are those of the file,
not computed from shapes.
"""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from windquant.errors import WindquantError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that no checkpoint of ours has
    start: int  # first byte in the file
    size: int  # in bytes

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def tensors(wanted: Iterable[Entry]) -> list[Tensor]:
    """The tensors of these entries, on the CPU; every file is opened once."""
    result = []
    with ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        for entry in wanted:
            if entry.file not in opened:
                opened[entry.file] = stack.enter_context(entry.file.open("rb"))
            opened[entry.file].seek(entry.start)
            data = np.frombuffer(bytearray(opened[entry.file].read(entry.size)), np.uint8)
            if entry.dtype is None or len(data) != entry.size:
                raise WindquantError(f"{entry.file}: truncated while it was read, or of a type that no checkpoint has")
            result.append(torch.from_numpy(data).view(entry.dtype).view(entry.shape))
    return result


def entries(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name; WindquantError if it is truncated or no safetensors file."""
    damaged = f"{file}: truncated or no safetensors file; get it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise WindquantError(damaged)
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        first = 8 + length
        found = {
            name: Entry(file, tuple(entry["shape"]), DTYPES.get(entry["dtype"]), first + start, end - start)
            for name, entry in header.items()
            for start, end in (entry["data_offsets"],)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WindquantError(damaged) from error
    if size != max([first, *(entry.start + entry.size for entry in found.values())]):
        raise WindquantError(damaged)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index names them; WindquantError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        file = folder / "model.safetensors"
        if not file.is_file():
            raise WindquantError(f"{file}: missing; get the checkpoint again")
        return [file]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WindquantError(f"{index}: not a readable index of weights; get it again") from error
    for name in names:
        if not (folder / name).is_file():
            raise WindquantError(f"{folder / name}: missing, though {index.name} names it; get it again")
    return [folder / name for name in names]
