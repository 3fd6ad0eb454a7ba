"""Decode a packed linear into a dense weight: tiles of codes, rotated back on the way.

Columns stay in column order, so that rows are written in one piece; the caller gathers weight or activations.
"""

import triton
import triton.language as tl

from windquant.kernels import decoding
from windquant.kernels.decoding import GROUP
from windquant.kernels.product import (
    CHUNK,
    CHUNK_SCALES,
    CODES,
    COLUMN,
    GRID,
    OFFSET,
    OFFSETS,
    ROW_SCALES,
    ROWS,
    SCALE,
    SCALES,
    SHIELDED,
    SHIELDED_SCALES,
    START,
    TILE,
    UNIT,
    WIDTH,
    address,
)


@triton.jit
def _unrotate(values, depth, factor, ROWS: tl.constexpr, SIDE: tl.constexpr, STAGES: tl.constexpr):
    """`rotation.unrotate`: W' R^T, that is W, for W' [ROWS, SIDE]; the same sums in the same order.

    A matrix product would need the whole rotation in shared memory, 256 KiB of it for 256 columns. Every stage of the
    butterflies adds and subtracts neighbours and puts the sums before the differences, so that after STAGES =
    log2(SIDE) of them all columns are back in their places. depth: int32 [SIDE], log2 of the Hadamard block of every
    column: the stages that it takes part in.
    """
    HALF: tl.constexpr = SIDE // 2
    for stage in tl.static_range(STAGES):
        first, second = tl.split(tl.reshape(values, (ROWS, HALF, 2)))
        depths, others = tl.split(tl.reshape(depth, (HALF, 2)))  # equal where the pair is of one block
        pair = (depths > stage)[None, :]
        joined = tl.join(tl.where(pair, first + second, first), tl.where(pair, first - second, second))
        values = tl.reshape(tl.permute(joined, (0, 2, 1)), (ROWS, SIDE))
        depth = tl.reshape(tl.permute(tl.join(depths, others), (1, 0)), (SIDE,))
    return values * factor[None, :]


@triton.jit
def decode(
    linear, units, actions, table, one, depths, factors, out, columns,
    PRESENT: tl.constexpr, ALIGN: tl.constexpr, WINDOW: tl.constexpr, STORED: tl.constexpr, SIZE: tl.constexpr,
    SIDE: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One unit and 16 GROUPS rows of the weight, out [rows, columns] in column order.

    linear, units: as in product.py; actions: of every unit. depths: int32 and factors: float32 [2, SIDE], what
    `_unrotate` takes, of a whole chunk and of the last one, padded with zeros. SIDE = 2^STAGES.
    """
    unit = tl.program_id(0)
    entry = units + unit * UNIT
    rows = tl.load(linear + ROWS).to(tl.int32)
    start, width = tl.load(entry + START), tl.load(entry + WIDTH).to(tl.int32)
    slot = tl.arange(0, GROUP)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    row = group[None, :] * GROUP + slot[:, None]
    place = tl.arange(0, SIDE)
    inside = place < width
    grid = address(linear, GRID, tl.float16)
    logs = decoding.row_logs(address(linear, ROW_SCALES, tl.uint8), grid, group, rows, ALIGN)
    chosen = tl.load(actions + unit)
    values = tl.zeros((GROUP * GROUPS, SIDE), tl.float32)
    for action in tl.static_range(decoding.ACTIONS):
        if (PRESENT >> action) & 1:  # the compiler decides this one, the kernel the next
            if chosen == action:
                stride = decoding.stride_of(rows, action)
                bits, close = tl.zeros((GROUP, GROUPS), tl.int32), tl.zeros((GROUPS,), tl.int32)
                if decoding.is_trellis(action):
                    tile = tl.load(linear + TILE).to(tl.int32)
                    bits = decoding.begun(group, tile, action, WINDOW)
                    close = decoding.seam(group, rows, tile, action, WINDOW)
                base = address(linear, SHIELDED if action == decoding.PROTECTED else CODES, tl.uint8) + start
                base += place.to(tl.int64) * stride
                found = decoding.levels(
                    base, inside, group, stride, bits, close, table, one, action, ALIGN, WINDOW, STORED
                )
                if decoding.has_one(action):
                    found = (found - 1) * decoding.factors(slot, action)[:, None, None] - decoding.middle(action)
                if decoding.has_offset(action):
                    offsets = address(linear, OFFSETS, tl.uint8) + tl.load(entry + OFFSET) * rows
                    found += decoding.chunk_offset(offsets, group, rows, action, ALIGN)[:, None, :]
                if action == decoding.PROTECTED:
                    shares = address(linear, SHIELDED_SCALES, tl.float16) + tl.load(entry + COLUMN) + place
                    found *= tl.load(shares, mask=inside, other=0).to(tl.float32)[None, :, None]
                elif decoding.has_scale(action):
                    share = tl.load(address(linear, CHUNK_SCALES, tl.float16) + tl.load(entry + CHUNK)).to(tl.float32)
                    packed = address(linear, SCALES, tl.uint8) + tl.load(entry + SCALE) * ((rows + 1) // 2)
                    found *= decoding.chunk_scale(packed, share, grid, logs, group, rows, ALIGN)[:, None, :]
                values = tl.reshape(tl.permute(found, (0, 2, 1)), (GROUP * GROUPS, SIDE))
                if decoding.is_trellis(action):
                    which = (width < SIZE).to(tl.int32) * SIDE + place
                    factor = tl.load(factors + which)
                    values = _unrotate(values, tl.load(depths + which), factor, GROUP * GROUPS, SIDE, STAGES)
    flat = tl.reshape(row, (GROUP * GROUPS,))
    target = out + flat[:, None].to(tl.int64) * columns + tl.load(entry + COLUMN) + place[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=(flat < rows)[:, None] & inside[None, :])
