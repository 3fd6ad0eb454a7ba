"""The header of a safetensors file: what is in it and how many bytes it takes, without its tensors, read or laid out.

A file is eight bytes (the header's length), the header (JSON), and the tensors. The sizes here are those of the file,
not computed from shapes.
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from windquant.errors import WindquantError

#: In the order that the safetensors library writes them in, those of one type by name.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MARGIN = 16  # bytes; what decodes codes reads a little more (kernels/cpu.py)


class Entry(NamedTuple):
    """One tensor of a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that no checkpoint of ours has
    start: int  # first byte in the file
    size: int  # in bytes

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def tensors(wanted: Iterable[Entry]) -> list[Tensor]:
    """The tensors of these entries, on the CPU: views of the mapped files, which no change of a tensor changes.

    Where the file has them, each one's storage has MARGIN more bytes before and behind it.
    """
    result = []
    files: dict[Path, mmap.mmap] = {}
    for entry in wanted:
        if entry.file not in files:
            with entry.file.open("rb") as opened:
                files[entry.file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped, end = files[entry.file], entry.start + entry.size
        if entry.dtype is None or len(mapped) < end:
            raise WindquantError(f"{entry.file}: truncated while it was read, or of a type that no checkpoint has")
        first, last = max(0, entry.start - MARGIN), min(end + MARGIN, len(mapped))
        data = torch.frombuffer(mapped, dtype=torch.uint8, count=last - first, offset=first)
        data = data[entry.start - first : end - first]
        if entry.start % entry.dtype.itemsize:  # only other writers put a tensor there
            data = data.clone()
        result.append(data.view(entry.dtype).view(entry.shape))
    return result


def lay_out(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Make a file for these tensors, whose values come later (`put`), as safetensors' `save_file` does; places by name.

    Only shapes and dtypes are looked at. The file has its full length at once, but takes no disk until values come.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    ranks = {dtype: rank for rank, dtype in enumerate(names)}
    order = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    return entries(file)


def put(entry: Entry, value: Tensor) -> None:
    """Write a tensor at its place, in the type on disk; ValueError for another shape."""
    if entry.dtype is None or entry.shape != tuple(value.shape):
        raise ValueError(f"{entry.file}: a tensor {list(value.shape)} has no place at {entry}")
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        file.write(value.cpu().to(entry.dtype).contiguous().flatten().view(torch.uint8).numpy().data)


def entries(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name; WindquantError if it is truncated or no safetensors file."""
    damaged = f"{file}: truncated or no safetensors file; get it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise WindquantError(damaged)
            first = 8 + length

            def place(entry: dict[str, Any]) -> Any:
                if "data_offsets" not in entry:
                    return entry
                start, end = entry["data_offsets"]
                return Entry(file, tuple(entry["shape"]), DTYPES.get(entry["dtype"]), first + start, end - start)

            found: dict[str, Entry] = json.loads(opened.read(length), object_hook=place)
        found.pop("__metadata__", None)
        if size != max([first, *(entry.start + entry.size for entry in found.values())]):
            raise WindquantError(damaged)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WindquantError(damaged) from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face folder: those that transformers would read.

    That is model.safetensors or, without it, what its index names. WindquantError if one is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise WindquantError(f"{single}: missing, and no index beside it; only safetensors are read, never pickles")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WindquantError(f"{index}: not a readable index of weights; get it again") from error
    for name in names:
        if not (folder / name).is_file():
            raise WindquantError(f"{folder / name}: missing, though {index.name} names it; get it again")
    return [folder / name for name in names]
