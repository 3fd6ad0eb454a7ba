"""Tables for the kernels, made once per group of linears and device, and the launches that read them."""

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from math import gcd
from operator import mul

import torch
import triton
from torch import Tensor

from windquant.kernels import decoding, dequantize, product
from windquant.packed import Layout, code_bytes
from windquant.quantizers import actions
from windquant.quantizers.rotation import blocks, rotation, unrotation
from windquant.quantizers.trellis import TILE, table, tile_rows
from windquant.storage import TERNARY, stream_bytes

IDS = {name: number for number, name in enumerate(actions())}
PROTECTED: int = decoding.PROTECTED.value
ONE: int = decoding.MANTISSA_ONE.value
GROUP: int = decoding.GROUP.value
BATCH: int = product.BATCH.value  # most activations of one launch
WARPS = 16  # of a multiprocessor, in one wave: as many as 128 registers a thread allow
REDUCED, DEPTH = 32, 64  # rows of a program of `reduce`, and splits at a time
SMALLEST = 16  # columns of a part of a chunk
DECODED = 8192  # weights of a program of `decode`, where 16 rows have no more
STEP = (32, 8)  # columns at a time: of several activations, of one


STORED = {torch.float16: triton.language.float16, torch.bfloat16: triton.language.bfloat16}


@dataclass(frozen=True)
class Unit:
    """A chunk, a part of one, or some protected columns, as the kernels read them."""

    action: int
    start: int  # first byte in `codes`, or in `protected`
    width: int
    column: int  # first one in column order, the protected ones counted
    scale: int  # row in `scales`
    offset: int  # row in `offsets`
    chunk: int
    cost: int  # of reading it: bytes, and a quarter for every weight, since decoding takes its time too


def units(layout: Layout, most: int) -> list[Unit]:
    """In storage order, which is the order of the actions, the protected columns last; of at most so many columns each.

    A part of a chunk has the scales and offsets of the whole: its share of the product is scaled all the same.
    """
    rows = layout.linear.rows
    result = []
    start = scale = offset = 0
    for chunk in layout.storage_order:
        entry, width = layout.actions[chunk], layout.widths[chunk]
        column = layout.protected + layout.starts[chunk]
        size = code_bytes(entry, rows, 1)
        for first in range(0, width, most):
            part = min(most, width - first)
            place, cost = start + first * size, part * (size + rows // 4)
            result.append(Unit(IDS[entry.name], place, part, column + first, scale, offset, chunk, cost))
        start += width * size
        scale += entry.has_scale
        offset += entry.has_offset
    for column in range(0, layout.protected, most):
        width = min(most, layout.protected - column)
        result.append(Unit(PROTECTED, column * rows, width, column, 0, 0, 0, width * rows * 5 // 4))
    return result


@lru_cache(maxsize=4)
def state_values(window: int, device: torch.device) -> Tensor:
    """The trellis' table on a device, float32 [2^window]."""
    return table(window).to(device)


def padded(whole: int) -> int:
    """Columns that a kernel takes for a chunk: a power of two."""
    return max(GROUP, triton.next_power_of_2(whole))


@lru_cache(maxsize=16)
def rotations(whole: int, last: int, device: torch.device) -> Tensor:
    """Rotations of a whole and of the last chunk, float32 [2, n, n], padded with zeros to a power of two."""
    side = padded(whole)
    result = torch.zeros(2, side, side)
    for square, width in zip(result, (whole, last), strict=True):
        square[:width, :width] = rotation(width)
    return result.to(device)


@lru_cache(maxsize=16)
def butterflies(whole: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """log2 of the Hadamard block of every column, int32, and what it is multiplied by once unrotated, float32.

    Both [2, n], of a whole and of the last chunk, padded with zeros to a power of two.
    """
    side = padded(whole)
    depths, factors = torch.zeros(2, side, dtype=torch.int32), torch.zeros(2, side)
    for depth, factor, width in zip(depths, factors, (whole, last), strict=True):
        sizes = torch.tensor(blocks(width))
        depth[:width] = sizes.log2().int().repeat_interleave(sizes)
        factor[:width] = unrotation(width)
    return depths.to(device), factors.to(device)


def launching(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, whatever GPU its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def present(layouts: Iterable[Layout]) -> set[int]:
    """Numbers of the actions that occur in some linears."""
    return {unit.action for layout in layouts for unit in units(layout, layout.format.chunk)}


def _cuts(costs: Sequence[int], pieces: int) -> list[int]:
    """Where to cut a run into that many pieces of about equal cost."""
    ends = list(accumulate(costs))
    places = [sum(end * pieces <= ends[-1] * piece for end in ends) for piece in range(pieces + 1)]
    return sorted(set(places))


@dataclass(frozen=True)
class Tasks:
    """How the product is divided: every program takes a tile of rows and a run of units of one action.

    The runs are of about equal cost.
    """

    groups: int  # of 16 rows, in a tile
    units: Tensor  # int64 [units, 6]
    table: Tensor  # int64 [programs, 6]
    splits: Tensor  # int64 [linears]
    most: int  # splits of one linear

    @classmethod
    def divide(cls, layouts: Sequence[Layout], groups: int, programs: int, device: torch.device) -> "Tasks":
        """About so many programs; chunks are divided where there would be less than a third as many."""
        tiles = [triton.cdiv(layout.linear.rows, groups * GROUP) for layout in layouts]
        size = layouts[0].format.chunk
        while True:
            found = [units(layout, size) for layout in layouts]
            if size <= SMALLEST or 3 * sum(map(mul, tiles, map(len, found))) >= programs:
                break
            size //= 2
        whole = sum(many * sum(unit.cost for unit in each) for many, each in zip(tiles, found, strict=True))
        table, splits = [], []
        begin = 0
        for linear, (many, each) in enumerate(zip(tiles, found, strict=True)):
            runs = []
            for action, run in groupby(each, lambda unit: unit.action):
                costs = [unit.cost for unit in run]
                pieces = min(max(1, round(sum(costs) * programs / whole)), len(costs))
                runs += [(action, begin + first, begin + last) for first, last in pairwise(_cuts(costs, pieces))]
                begin += len(costs)
            splits.append(len(runs))
            table += [
                (linear, action, tile * groups, first, last, split)
                for tile in range(many)
                for split, (action, first, last) in enumerate(runs)
            ]
        flat = [unit for each in found for unit in each]
        return cls(
            groups,
            unit_table(flat).to(device),
            torch.tensor(table).to(device),
            torch.tensor(splits).to(device),
            max(splits),
        )


def unit_table(found: Iterable[Unit]) -> Tensor:
    """The columns of product.py, int64 [units, 6]."""
    return torch.tensor(
        [(unit.start, unit.width, unit.column, unit.scale, unit.offset, unit.chunk) for unit in found],
        dtype=torch.int64,
    )


class Launch:
    """Linears that read the same input: their tables on a device, and the product with up to 16 activations.

    tensors: of each linear, as `Layout.shapes` names them; order: the column order of the group, int64 [columns];
    biases: [rows] or none, in the dtype of the activations. Their addresses are in the tables: they are kept alive
    here, and must not be replaced or moved. present: the actions of all the model, so that one compiled kernel serves
    every group.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        tensors: Sequence[Mapping[str, Tensor]],
        order: Tensor,
        biases: Sequence[Tensor | None],
        present: Set[int] = frozenset(),
    ) -> None:
        first = layouts[0]
        self.form, self.device = first.format, order.device
        self.columns, self.protected = first.linear.columns, first.protected
        self.rows = [layout.linear.rows for layout in layouts]
        self.kept = [*tensors, *biases]
        found = [units(layout, first.format.chunk) for layout in layouts]
        flat = [unit for each in found for unit in each]
        self.constants = {
            "PRESENT": sum(1 << number for number in {unit.action for unit in flat} | present),
            "ALIGN": _alignment(self.rows, flat, tensors),
            "WINDOW": self.form.window,
            "STORED": STORED[self.form.dtype],
        }
        self.order = order.int()
        self.values = state_values(self.form.window, self.device)
        self.whole = min(self.form.chunk, self.columns)
        last = (self.columns - self.protected) % self.form.chunk or self.whole
        self.rotations = rotations(self.whole, last, self.device)
        self.butterflies = butterflies(self.whole, last, self.device)
        self.chunks = -(-self.protected // self.form.chunk) + len(first.widths)
        targets = list(accumulate(self.rows, initial=0))
        self.height = targets.pop()
        self.linears = self._table(map(_linear, self.rows, tensors, targets, biases))
        self.units = unit_table(flat).to(self.device)
        self.actions = torch.tensor([unit.action for unit in flat]).to(self.device)
        self.begins = list(accumulate(map(len, found), initial=0))
        self.blocks = self._table(
            (linear, row) for linear, rows in enumerate(self.rows) for row in range(0, rows, REDUCED)
        )
        programs = multiprocessors(self.device) * WARPS
        groups = 64 if sum(-rows % 1024 for rows in self.rows) <= self.height // 8 else 32
        self.one = Tasks.divide(layouts, groups, programs * 32 // groups, self.device)
        self.some = Tasks.divide(layouts, 8, programs // 4, self.device)

    def _table(self, rows: Iterable[Iterable[int]]) -> Tensor:
        return torch.tensor([list(row) for row in rows], dtype=torch.int64).to(self.device)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Activations [batch, columns], contiguous, bfloat16 or float16 -> of each linear [batch, rows], same dtype.

        batch is 1 to 16. Nothing here waits for the device, so the launches can be captured in a CUDA graph.
        """
        batch = len(x)
        vector = batch == 1
        tasks = self.one if vector else self.some
        shape = (self.columns, 2) if vector else (2, BATCH, self.columns)
        # Triton's interpreter does not multiply matrices of bfloat16.
        exact = vector or self.device.type == "cpu"
        prepared = torch.empty(shape, dtype=torch.float32 if exact else x.dtype, device=self.device)
        partial = torch.empty(tasks.most, batch, self.height, device=self.device)
        out = torch.empty(batch * self.height, dtype=x.dtype, device=self.device)
        with launching(self.device):
            product.prepare[self.chunks, 1 if vector else BATCH](
                x, self.order, self.rotations, prepared, batch, self.columns, self.protected,
                SIZE=self.form.chunk, SIDE=self.rotations.shape[1], VECTOR=vector, PADDED=BATCH,
            )  # fmt: skip
            product.product[(len(tasks.table),)](
                tasks.table, self.linears, tasks.units, prepared, self.values, ONE, partial, batch, self.columns,
                self.height, STEP=STEP[vector], VECTOR=vector, PADDED=BATCH, GROUPS=tasks.groups,
                num_warps=tasks.groups // 32 if vector else 4, maxnreg=128 if vector else None, **self.constants,
            )  # fmt: skip
            product.reduce[len(self.blocks), batch](
                partial, self.blocks, self.linears, tasks.splits, out, batch, self.height, DEPTH=DEPTH, BLOCK=REDUCED
            )
        parts = out.split([batch * rows for rows in self.rows])
        return [part.view(batch, rows) for part, rows in zip(parts, self.rows, strict=True)]

    def weight(self, linear: int, dtype: torch.dtype) -> Tensor:
        """The decoded weight [rows, columns] of one of the linears, its columns in column order."""
        first, last = self.begins[linear : linear + 2]
        rows = self.rows[linear]
        out = torch.empty(rows, self.columns, dtype=dtype, device=self.device)
        side = padded(self.whole)
        groups = max(1, DECODED // (GROUP * side))
        with launching(self.device):
            dequantize.decode[last - first, triton.cdiv(rows, GROUP * groups)](
                self.linears[linear], self.units[first:last], self.actions[first:last], self.values, ONE,
                *self.butterflies, out, self.columns, SIZE=self.form.chunk, SIDE=side, STAGES=side.bit_length() - 1,
                GROUPS=groups, **self.constants,
            )  # fmt: skip
        return out


def _linear(rows: int, tensors: Mapping[str, Tensor], target: int, bias: Tensor | None) -> list[int]:
    """A row of the table of linears, as product.py names its columns."""

    def address(name: str) -> int:
        return tensors[name].data_ptr() if name in tensors else 0

    return [
        rows, tile_rows(rows, TILE), address("codes"), address("scales"), address("scale_grid"), address("row_scales"),
        address("chunk_scales"), address("offsets"), address("protected"), address("protected_scales"), target,
        0 if bias is None else bias.data_ptr(),
    ]  # fmt: skip


def _alignment(rows: Sequence[int], found: Iterable[Unit], tensors: Sequence[Mapping[str, Tensor]]) -> int:
    """Bytes, 1 to 8, that divide every address from which the kernels read a group of 16 rows."""
    if any(count % GROUP for count in rows):
        return 1
    known = list(actions().values())
    patterns = {known[unit.action].pattern for unit in found if unit.action != PROTECTED} - {TERNARY}
    strides = [stream_bytes(count, pattern) for count in rows for pattern in patterns]
    read = ("codes", "scales", "row_scales", "offsets", "protected")
    addresses = [each[key].data_ptr() for each in tensors for key in read if key in each and each[key].numel()]
    return gcd(8, *strides, *addresses, *(unit.start for unit in found))
