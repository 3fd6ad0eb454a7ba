"""A quantized linear as it lies on disk: layout, tensors, and the exact number of bytes, known before anything is made.

docs/format.md describes every byte.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from windquant.errors import WindquantError
from windquant.quantizers import Treatment, action, actions
from windquant.quantizers.rotation import unrotate
from windquant.scales import SCALE_BITS, ScaleCoder, decode_offset
from windquant.storage import pack, stream_bytes, unpack
from windquant.units import Linear, chunk_widths, protected_count


@dataclass(frozen=True)
class Format:
    """What all linears of a checkpoint share."""

    chunk: int
    protected: float  # fraction of columns
    window: int  # of the trellis
    dtype: torch.dtype  # original precision: of skipped units


@dataclass(frozen=True)
class Run:
    """Chunks with one action and width, side by side in storage."""

    entry: Treatment
    width: int  # columns of each chunk
    chunks: list[int]  # by their place in column order
    columns: list[int]  # first one of each chunk in column order, the protected ones counted
    place: int  # first byte in `codes`
    stride: int  # bytes of a column of codes
    scale: int  # first row in `scales`
    offset: int  # first row in `offsets`


@dataclass(frozen=True)
class Layout:
    """Where the parts of one linear lie; everything follows from its shape, its actions and the format."""

    linear: Linear
    names: tuple[str, ...]  # action of every chunk, in column order
    format: Format

    @cached_property
    def actions(self) -> list[Treatment]:
        return [action(name, self.format.window, self.format.dtype) for name in self.names]

    @cached_property
    def protected(self) -> int:
        return protected_count(self.linear.columns, self.format.protected)

    @cached_property
    def widths(self) -> list[int]:
        return chunk_widths(self.linear.columns, self.protected, self.format.chunk)

    @cached_property
    def starts(self) -> list[int]:
        """First column of every chunk, in column order without the protected ones."""
        return [sum(self.widths[:index]) for index in range(len(self.widths))]

    @property
    def owner(self) -> bool:
        """Whether this linear stores the column order for all that read the same input."""
        return self.linear.group == self.linear.name

    @property
    def storage_order(self) -> list[int]:
        """Chunks sorted by action, so that chunks of one width are contiguous; ties keep the column order."""
        ranks = {name: rank for rank, name in enumerate(actions())}
        return sorted(range(len(self.names)), key=lambda chunk: ranks[self.names[chunk]])

    @cached_property
    def runs(self) -> list[Run]:
        """What lies where in `codes`, `scales` and `offsets`, in storage order."""
        result = []
        place = scale = offset = 0
        for (_, width), run in groupby(self.storage_order, lambda chunk: (self.names[chunk], self.widths[chunk])):
            chunks = list(run)
            entry = self.actions[chunks[0]]
            stride = code_bytes(entry, self.linear.rows, 1)
            columns = [self.protected + self.starts[chunk] for chunk in chunks]
            result.append(Run(entry, width, chunks, columns, place, stride, scale, offset))
            place += len(chunks) * width * stride
            scale += len(chunks) * entry.has_scale
            offset += len(chunks) * entry.has_offset
        return result

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor."""
        rows, chunks = self.linear.rows, len(self.widths)
        with_scale = sum(entry.has_scale for entry in self.actions)
        with_offset = sum(entry.has_offset for entry in self.actions)
        result: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "actions": ((chunks,), torch.uint8),
            "codes": ((sum(len(run.chunks) * run.width * run.stride for run in self.runs),), torch.uint8),
            "scales": ((with_scale, stream_bytes(rows, (SCALE_BITS, SCALE_BITS))), torch.uint8),
            "scale_grid": ((2,), torch.float16),
            "row_scales": ((rows,), torch.uint8),
            "chunk_scales": ((chunks,), torch.float16),
        }
        if with_offset:
            result["offsets"] = ((with_offset, rows), torch.int8)
        if self.protected:
            result["protected"] = ((self.protected, rows), torch.int8)
            result["protected_scales"] = ((self.protected,), torch.float16)
        if self.owner:
            result["order"] = ((order_bytes(self.linear.columns, len(self.widths), self.protected),), torch.uint8)
        return result

    def bytes(self) -> int:
        """Bytes of all stored tensors: the same as `fixed_bytes` plus `unit_bytes` of every chunk."""
        return tensor_bytes(self.shapes)


def tensor_bytes(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


def code_bytes(entry: Treatment, rows: int, width: int) -> int:
    return width * stream_bytes(rows * 2 if entry.name == "skip" else rows, entry.pattern)


def unit_bytes(entry: Treatment, rows: int, width: int) -> int:
    """Bytes that a chunk of `width` columns takes under an action: codes, scales, offsets."""
    scales = stream_bytes(rows, (SCALE_BITS, SCALE_BITS)) if entry.has_scale else 0
    return code_bytes(entry, rows, width) + scales + (rows if entry.has_offset else 0)


def fixed_bytes(linear: Linear, form: Format) -> int:
    """Bytes of a linear that no action changes."""
    protected = protected_count(linear.columns, form.protected)
    chunks = len(chunk_widths(linear.columns, protected, form.chunk))
    order = order_bytes(linear.columns, chunks, protected) if linear.group == linear.name else 0
    return order + linear.rows + 4 + 3 * chunks + protected * (linear.rows + 2)


def _order_bits(chunks: int, protected: int) -> int:
    return max(1, (chunks + bool(protected) - 1).bit_length())


def order_bytes(columns: int, chunks: int, protected: int) -> int:
    bits = _order_bits(chunks, protected)
    return stream_bytes(columns, (bits, bits)) if bits <= 8 else 2 * columns


def pack_order(order: Tensor, widths: list[int], protected: int) -> Tensor:
    """Column order -> the chunk of every column, bit-packed. Inside a chunk the columns keep their natural order."""
    chunk_of = torch.empty(len(order), dtype=torch.int64)
    sizes = torch.tensor([protected, *widths])
    labels = torch.cat([torch.tensor([len(widths)]), torch.arange(len(widths))])
    chunk_of[order] = labels.repeat_interleave(sizes)
    bits = _order_bits(len(widths), protected)
    if bits > 8:
        return chunk_of.to(torch.int16).view(torch.uint8)
    return pack(chunk_of.to(torch.uint8)[None], (bits, bits))[0]


def unpack_order(packed: Tensor, columns: int, widths: list[int], protected: int) -> Tensor:
    """The inverse of `pack_order`: int64 [columns], protected columns first, then chunk by chunk."""
    bits = _order_bits(len(widths), protected)
    data = packed.cpu().numpy()
    if bits > 8:
        chunk_of = data.view("<i2").astype(np.int64)
    else:
        digits = np.unpackbits(data, count=columns * bits, bitorder="little").reshape(columns, bits)
        chunk_of = digits @ (1 << np.arange(bits))
    if protected:
        chunk_of = np.where(chunk_of == len(widths), 0, chunk_of + 1)
    sizes = [protected, *widths] if protected else widths
    if chunk_of.min() < 0 or not np.array_equal(np.bincount(chunk_of, minlength=len(sizes)), sizes):
        raise WindquantError("a stored column order disagrees with the chunks; the checkpoint is damaged")
    order = np.argsort(chunk_of.astype(np.uint16), kind="stable")  # of so short numbers numpy sorts the digits
    return torch.from_numpy(order).to(packed.device)


def chunk_order(order: Tensor, widths: list[int], protected: int) -> Tensor:
    """The order that is really used and stored: the given one with each chunk's columns in natural order."""
    parts = order.split([protected, *widths])
    return torch.cat([part.sort().values for part in parts])


def dequantize(layout: Layout, tensors: Mapping[str, Tensor], order: Tensor) -> Tensor:
    """The weight [rows, columns], float32, natural column order, that the stored tensors stand for.

    order: the unpacked column order of the linear's group, int64 [columns]. The result is where the tensors are. This
    is the reference of `kernels`, which decode faster.
    """
    protected = layout.protected
    parts, columns = [], [order[:protected]]
    if protected:
        parts.append(decode_protected(tensors).T)
    for run, values in segments(layout, tensors):
        parts.append((unrotate(values) if run.entry.rotated else values).flatten(1))
        columns += [order[column : column + run.width] for column in run.columns]
    return torch.cat(parts, 1).index_select(1, torch.argsort(torch.cat(columns)))


def decode_protected(tensors: Mapping[str, Tensor]) -> Tensor:
    """Protected columns, float32 [protected, rows]."""
    return tensors["protected"].float() * tensors["protected_scales"].float()[:, None]


def decode_scales(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Scales of all chunks that have one, float32 [chunks with a scale, rows], in storage order."""
    coder = ScaleCoder(tensors["scale_grid"][0], tensors["scale_grid"][1], tensors["row_scales"])
    codes = unpack(tensors["scales"], layout.linear.rows, (SCALE_BITS, SCALE_BITS))
    chunks = [chunk for run in layout.runs if run.entry.has_scale for chunk in run.chunks]
    return coder.decode(codes, tensors["chunk_scales"][chunks][:, None])


def decode_offsets(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Offsets of all chunks that have one, float32 [chunks with an offset, rows], in storage order."""
    runs = [run for run in layout.runs if run.entry.has_offset]
    if not runs:
        return torch.empty(0, layout.linear.rows)
    parts = tensors["offsets"].split([len(run.chunks) for run in runs])
    return torch.cat([decode_offset(part, round(2**run.entry.bits)) for run, part in zip(runs, parts, strict=True)])


def segments(layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Run, Tensor]]:
    """The runs of n chunks with one action and width, and their weights [rows, n, width], not yet rotated back.

    In storage order, float32, where the tensors are.
    """
    scales, offsets = decode_scales(layout, tensors), decode_offsets(layout, tensors)
    for run in layout.runs:
        yield run, decode_run(run, tensors["codes"], layout.linear.rows, scales, offsets)


def decode_run(run: Run, codes: Tensor, rows: int, scales: Tensor, offsets: Tensor) -> Tensor:
    """Weights [rows, chunks, width] of a run, of the linear's stored codes and of its decoded scales and offsets."""
    count = len(run.chunks)
    own = codes[run.place : run.place + count * run.width * run.stride]
    values = run.entry.unscaled(own.view(-1, run.stride), rows).view(rows, count, run.width)
    if run.entry.has_offset:
        values += offsets[run.offset : run.offset + count].T[:, :, None]
    if run.entry.has_scale:
        values *= scales[run.scale : run.scale + count].T[:, :, None]
    return values
