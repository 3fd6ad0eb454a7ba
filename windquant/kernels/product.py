"""The product of a few activations with packed weights: one launch for all linears that read the same input.

    y[m, r] = sum over chunks of scale_r ( sum_j level_rj x_mj + (offset_r - middle) sum_j x_mj )

Three kernels in a row: `prepare` gathers the activations in column order and rotates them chunk by chunk, once for all
linears; `product` reads the codes, every program a tile of rows and some chunks of one action, and adds up in float32;
`reduce` adds their shares in a fixed order. No atomics, so the same input gives the same bits.

One activation is multiplied by the vector units: each thread keeps 16 rows and walks through the columns. Up to 16
activations go through the tensor cores, a chunk at a time, with weights rounded to the activations' type.
"""

import triton
import triton.language as tl

from windquant.kernels import decoding
from windquant.kernels.decoding import GROUP

BATCH = tl.constexpr(16)  # most activations of one launch
#: Columns of the int64 tables that describe a launch (launches.py fills them), and how many there are.
ROWS, TILE, CODES, SCALES, GRID, ROW_SCALES, CHUNK_SCALES, OFFSETS, SHIELDED, SHIELDED_SCALES, TARGET, BIAS = (
    tl.constexpr(place) for place in range(12)
)  # of a linear; all but the first two and TARGET, its first row in the output, are addresses
LINEAR = tl.constexpr(12)
START, WIDTH, COLUMN, SCALE, OFFSET, CHUNK = (tl.constexpr(place) for place in range(6))  # of a unit
UNIT = tl.constexpr(6)
WHICH, ACTION, FIRST_GROUP, FIRST_UNIT, LAST_UNIT, SPLIT = (tl.constexpr(place) for place in range(6))  # of a program
TASK = tl.constexpr(6)


@triton.jit
def prepare(
    x, order, rotations, prepared, batch, columns, protected,
    SIZE: tl.constexpr, SIDE: tl.constexpr, VECTOR: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Activations [batch, columns] in column order, as they are and rotated.

    rotations: float32 [2, SIDE, SIDE], that of a whole chunk and that of the last one, padded with zeros.
    prepared: float32 [columns, 2] where VECTOR, else the activations' type [2, PADDED, columns], zeros from `batch` on.
    One program a chunk and activation; the protected columns come first, in chunks that are not rotated.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    ahead = (protected + SIZE - 1) // SIZE
    first = tl.where(chunk < ahead, chunk * SIZE, protected + (chunk - ahead) * SIZE)
    last = tl.minimum(tl.where(chunk < ahead, protected, columns), first + SIZE)
    place = tl.arange(0, SIDE)
    inside = first + place < last
    source = tl.load(order + first + place, mask=inside, other=0)
    values = tl.load(x + row.to(tl.int64) * columns + source, mask=inside & (row < batch), other=0).to(tl.float32)
    short = (last - first < SIZE).to(tl.int32)
    square = rotations + short * SIDE * SIDE + place[:, None] * SIDE + place[None, :]
    rotated = tl.sum(values[:, None] * tl.load(square), 0)
    if VECTOR:
        target = prepared + (first + place) * 2
        tl.store(target, values, mask=inside)
        tl.store(target + 1, rotated, mask=inside)
    else:
        kind = prepared.dtype.element_ty
        target = prepared + row * columns + first + place
        tl.store(target, values.to(kind), mask=inside)
        tl.store(target + PADDED * columns, rotated.to(kind), mask=inside)


@triton.jit
def address(linear, FIELD: tl.constexpr, kind: tl.constexpr):
    """One of the addresses in a linear's row of the table."""
    return tl.load(linear + FIELD).to(tl.pointer_type(kind))


@triton.jit
def _add_chunks(
    sums, first_unit, last_unit, units, linear, prepared, table, one, group, logs, columns,
    ACTION: tl.constexpr, ALIGN: tl.constexpr, WINDOW: tl.constexpr, STORED: tl.constexpr,
    STEP: tl.constexpr, VECTOR: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """`sums` plus the product with some chunks of one action: [16, groups] where VECTOR, else [16 groups, PADDED]."""
    slot = tl.arange(0, GROUP)
    rows = tl.load(linear + ROWS).to(tl.int32)
    codes = address(linear, SHIELDED if ACTION == decoding.PROTECTED else CODES, tl.uint8)
    stride = decoding.stride_of(rows, ACTION)
    bits, close = tl.zeros((GROUP, GROUPS), tl.int32), tl.zeros((GROUPS,), tl.int32)
    if decoding.is_trellis(ACTION):
        tile = tl.load(linear + TILE).to(tl.int32)
        bits, close = decoding.begun(group, tile, ACTION, WINDOW), decoding.seam(group, rows, tile, ACTION, WINDOW)
    place = tl.arange(0, STEP)
    factor = decoding.factors(slot, ACTION)
    for unit in range(first_unit, last_unit):
        entry = units + unit * UNIT
        start = tl.load(entry + START)
        width = tl.load(entry + WIDTH).to(tl.int32)
        column = tl.load(entry + COLUMN).to(tl.int32)
        if VECTOR:
            inner = tl.zeros((GROUP, GROUPS), tl.float32)
            total = tl.zeros((GROUPS,), tl.float32)
        else:
            inner = tl.zeros((GROUP * GROUPS, PADDED), tl.float32)
            total = tl.zeros((PADDED,), tl.float32)
        for step in range(0, width, STEP):
            inside = step + place < width
            base = codes + start + (step + place).to(tl.int64) * stride
            found = decoding.levels(base, inside, group, stride, bits, close, table, one, ACTION, ALIGN, WINDOW, STORED)
            at = column + step + place
            if VECTOR:
                # Two floats apart and the same for all groups: loaded in the layout of the codes, one a register.
                pointers = prepared + (at * 2 + decoding.is_trellis(ACTION))[:, None] + tl.zeros((1, GROUPS), tl.int32)
                x = tl.load(pointers, mask=inside[:, None], other=0)
                if ACTION == decoding.PROTECTED:
                    shares = address(linear, SHIELDED_SCALES, tl.float16) + at
                    x *= tl.load(shares, mask=inside, other=0).to(tl.float32)[:, None]
                inner += tl.sum(found * x[None], 1)
                total += tl.sum(x, 0)
            else:
                kind = prepared.dtype.element_ty
                number = tl.arange(0, PADDED) + decoding.is_trellis(ACTION) * PADDED
                x = tl.load(prepared + number[None, :] * columns + at[:, None], mask=inside[:, None], other=0)
                if decoding.has_one(ACTION):
                    found = (found - 1) * factor[:, None, None]
                if ACTION == decoding.PROTECTED:
                    shares = address(linear, SHIELDED_SCALES, tl.float16) + at
                    share = tl.load(shares, mask=inside, other=0).to(tl.float32)
                    found = (found - decoding.middle(ACTION)) * share[None, :, None]
                weight = tl.reshape(tl.permute(found.to(kind), (0, 2, 1)), (GROUP * GROUPS, STEP))
                inner = tl.dot(weight, x, inner)
                total += tl.sum(x.to(tl.float32), 0)
        if VECTOR:
            if decoding.has_one(ACTION):
                inner = factor[:, None] * (inner - total[None, :])
            shift = total[None, :] * -decoding.middle(ACTION)
        else:
            shift = total[None, :] * (0.0 if ACTION == decoding.PROTECTED else -decoding.middle(ACTION))
        if decoding.has_offset(ACTION):
            offsets = address(linear, OFFSETS, tl.uint8) + tl.load(entry + OFFSET) * rows
            offset = decoding.chunk_offset(offsets, group, rows, ACTION, ALIGN)
            if VECTOR:
                shift += offset * total[None, :]
            else:
                shift += tl.reshape(offset, (GROUP * GROUPS,))[:, None] * total[None, :]
        inner += shift
        if decoding.has_scale(ACTION):
            share = tl.load(address(linear, CHUNK_SCALES, tl.float16) + tl.load(entry + CHUNK)).to(tl.float32)
            packed = address(linear, SCALES, tl.uint8) + tl.load(entry + SCALE) * ((rows + 1) // 2)
            scale = decoding.chunk_scale(packed, share, address(linear, GRID, tl.float16), logs, group, rows, ALIGN)
            if VECTOR:
                inner *= scale
            else:
                inner *= tl.reshape(scale, (GROUP * GROUPS,))[:, None]
        sums += inner
    return sums


@triton.jit
def product(
    tasks, linears, units, prepared, table, one, partial, batch, columns, height,
    PRESENT: tl.constexpr, ALIGN: tl.constexpr, WINDOW: tl.constexpr, STORED: tl.constexpr,
    STEP: tl.constexpr, VECTOR: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The share of some chunks in some rows of the product: partial[split, activation, row], float32.

    tasks, linears, units: tables of the columns above; one: the bits of 1.0 (see `in_mantissa`); height: rows of all
    linears; PRESENT: bits of the actions that occur; STEP: columns at a time.
    """
    task = tasks + tl.program_id(0) * TASK
    which = tl.load(task + WHICH)
    linear = linears + which * LINEAR
    rows = tl.load(linear + ROWS).to(tl.int32)
    group = tl.load(task + FIRST_GROUP).to(tl.int32) + tl.arange(0, GROUPS)
    first, last = tl.load(task + FIRST_UNIT).to(tl.int32), tl.load(task + LAST_UNIT).to(tl.int32)
    logs = decoding.row_logs(
        address(linear, ROW_SCALES, tl.uint8), address(linear, GRID, tl.float16), group, rows, ALIGN
    )
    sums = tl.zeros((GROUP, GROUPS) if VECTOR else (GROUP * GROUPS, PADDED), tl.float32)
    chosen = tl.load(task + ACTION)
    for action in tl.static_range(decoding.ACTIONS):
        if (PRESENT >> action) & 1:  # the compiler decides this one, the kernel the next
            if chosen == action:
                sums = _add_chunks(
                    sums, first, last, units, linear, prepared, table, one, group, logs, columns,
                    action, ALIGN, WINDOW, STORED, STEP, VECTOR, PADDED, GROUPS,
                )  # fmt: skip
    target = partial + tl.load(task + SPLIT) * batch * height + tl.load(linear + TARGET)
    if VECTOR:
        row = group[None, :] * GROUP + tl.arange(0, GROUP)[:, None]
        tl.store(target + row, sums, mask=row < rows)
    else:
        row = tl.reshape(group[None, :] * GROUP + tl.arange(0, GROUP)[:, None], (GROUP * GROUPS,))
        number = tl.arange(0, PADDED)
        inside = (row < rows)[:, None] & (number < batch)[None, :]
        tl.store(target + number[None, :] * height + row[:, None], sums, mask=inside)


@triton.jit
def reduce(partial, blocks, linears, splits, out, batch, height, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add the splits of every row, DEPTH at a time, and the bias; out: one [batch, rows] after the other.

    blocks: [programs, 2], linear and first row of each; splits: of every linear.
    """
    block = blocks + tl.program_id(0) * 2
    which = tl.load(block)
    linear = linears + which * LINEAR
    rows = tl.load(linear + ROWS).to(tl.int32)
    number = tl.program_id(1)
    row = tl.load(block + 1).to(tl.int32) + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(linear + TARGET)
    kind = out.dtype.element_ty
    sums = tl.zeros((BLOCK,), tl.float32)
    count = tl.load(splits + which).to(tl.int32)
    for first in range(0, count, DEPTH):
        split = first + tl.arange(0, DEPTH)
        source = partial + (split.to(tl.int64) * batch + number) * height + target
        keep = (split < count)[:, None] & inside[None, :]
        sums += tl.sum(tl.load(source[:, None] + row[None, :], mask=keep, other=0), 0)
    bias = tl.load(linear + BIAS)
    if bias != 0:
        sums += tl.load(bias.to(tl.pointer_type(kind)) + row, mask=inside, other=0).to(tl.float32)
    tl.store(out + target * batch + number.to(tl.int64) * rows + row, sums.to(kind), mask=inside)
