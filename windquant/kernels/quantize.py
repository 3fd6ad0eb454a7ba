"""Quantize a chunk on the GPU: fit and encode the scalar treatment, search the trellis, pack the codes.

The formulas are those of quantizers/scalar.py, quantizers/viterbi.py and storage.py, in the same order of operations
and without fused multiply-adds, so that the codes are the same, bit for bit, for the same scales and offsets. A fit
adds up over the columns in an order of its own: its scales agree to the last few bits.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it off rounds to the nearest integer, half to even


@triton.jit
def _codes(values, scale, shift, LEVELS: tl.constexpr):
    """round(values / scale + shift) within 0 .. LEVELS - 1, float32."""
    found = tl.minimum(tl.maximum(tl.div_rn(values, scale) + shift, -1.0), LEVELS)  # small enough for ROUND
    return tl.minimum(tl.maximum((found + ROUND) - ROUND, 0.0), LEVELS - 1)


@triton.jit
def fit(
    columns, energy, clips, scales, offsets, rows, width,
    LEVELS: tl.constexpr, OFFSET: tl.constexpr, CLIPS: tl.constexpr, ROUNDS: tl.constexpr, LARGEST: tl.constexpr,
    SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`Scalar.fit`: scale and offset [rows] of a chunk, columns [width, rows]. One program for BLOCK rows."""
    middle = (LEVELS - 1) / 2
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, SIDE)
    inside = place < width
    keep = inside[:, None] & (row < rows)[None, :]
    values = tl.load(columns + place[:, None] * rows + row[None, :], mask=keep, other=0)
    weight = tl.load(energy + place, mask=inside, other=0)
    count = tl.sum(inside.to(tl.float32), 0)  # Triton makes a width of 1 a constant, which has no type
    weight = tl.div_rn(weight, tl.maximum(tl.div_rn(tl.sum(weight, 0), count), 1.1754943508222875e-38))
    weight = weight[:, None]
    low = tl.min(tl.where(inside[:, None], values, float("inf")), 0)
    high = tl.max(tl.where(inside[:, None], values, float("-inf")), 0)
    if not OFFSET:
        high = tl.maximum(high, -low)
        low = -high
    spread = tl.maximum(high - low, 1e-8)
    center = (high + low) / 2
    best_scale = tl.div_rn(spread, tl.full((BLOCK,), LEVELS - 1, tl.float32))
    best_offset = tl.div_rn(center, spread) * (LEVELS - 1)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    total = tl.sum(weight, 0)
    for clip in range(CLIPS):
        scale = tl.div_rn(spread * tl.load(clips + clip), tl.full((BLOCK,), LEVELS - 1, tl.float32))
        offset = tl.div_rn(center, scale)
        for _ in range(ROUNDS):
            level = _codes(values, scale[None, :], (middle - offset)[None, :], LEVELS) - middle
            if OFFSET:
                mean_level = tl.div_rn(tl.sum(level * weight, 0), total)
                mean = tl.div_rn(tl.sum(values * weight, 0), total)
                centered = (level - mean_level[None, :]) * weight
                variance = tl.sum(centered * level, 0)
                slope = tl.div_rn(tl.sum(centered * values, 0), variance)
                good = (variance > 0) & (slope > 0)
                scale = tl.where(good, slope, scale)
                offset = tl.where(good, tl.div_rn(mean, scale) - mean_level, offset)
                nearest = tl.minimum(tl.maximum(offset, -LARGEST * LEVELS), LARGEST * LEVELS)
                level += nearest[None, :]
                slope = tl.div_rn(tl.sum(values * level * weight, 0), tl.sum(level * level * weight, 0))
                scale = tl.where((tl.abs(offset) >= LARGEST * LEVELS) & (slope > 0), slope, scale)
                offset = nearest
            else:
                square = tl.sum(level * level * weight, 0)
                slope = tl.div_rn(tl.sum(values * level * weight, 0), square)
                scale = tl.where((square > 0) & (slope > 0), slope, scale)
                offset = tl.zeros_like(offset)
        code = _codes(values, scale[None, :], (middle - offset)[None, :], LEVELS)
        error = values - (code - middle + offset[None, :]) * scale[None, :]
        loss = tl.sum(error * error * weight, 0)
        better = loss < lowest
        lowest = tl.where(better, loss, lowest)
        best_scale = tl.where(better, scale, best_scale)
        best_offset = tl.where(better, offset, best_offset)
    tl.store(scales + row, best_scale, mask=row < rows)
    if OFFSET:
        tl.store(offsets + row, best_offset, mask=row < rows)


@triton.jit
def encode(
    columns, scales, offsets, feedback, codes, decoded, errors, rows, width,
    LEVELS: tl.constexpr, OFFSET: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`Scalar.encode` of BLOCK rows: column after column, each on what the errors of those before it leave.

    columns: float32 [width, rows]; feedback: U [width, width]; codes: uint8, decoded and errors: float32 [width, rows].
    """
    middle = (LEVELS - 1) / 2
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, SIDE)
    keep = (place < width)[:, None] & (row < rows)[None, :]
    work = tl.load(columns + place[:, None] * rows + row[None, :], mask=keep, other=0)
    scale = tl.load(scales + row, mask=row < rows, other=1)
    offset = tl.zeros((BLOCK,), tl.float32)
    shift = tl.full((BLOCK,), middle, tl.float32)
    if OFFSET:
        offset = tl.load(offsets + row, mask=row < rows, other=0)
        shift = middle - offset
    for column in range(width):
        values = tl.sum(tl.where((place == column)[:, None], work, 0.0), 0)
        code = _codes(values, scale, shift, LEVELS)
        level = code - middle
        quantized = (level + offset) * scale if OFFSET else level * scale
        error = tl.div_rn(values - quantized, tl.zeros_like(values) + tl.load(feedback + column * width + column))
        target = column * rows + row
        tl.store(codes + target, code.to(tl.uint8), mask=row < rows)
        tl.store(decoded + target, quantized, mask=row < rows)
        tl.store(errors + target, error, mask=row < rows)
        later = (place > column) & (place < width)
        factor = tl.load(feedback + column * width + place, mask=later, other=0)
        work -= tl.where(later[:, None], factor[:, None] * error[None, :], 0.0)


@triton.jit
def pack(codes, packed, rows, stride, EVEN: tl.constexpr, ODD: tl.constexpr, BLOCK: tl.constexpr):
    """`storage.pack`: codes uint8 [columns, rows] -> packed uint8 [columns, stride]; EVEN 0 stands for ternary."""
    source = codes + tl.program_id(0).to(tl.int64) * rows
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros((BLOCK,), tl.int32)
    if EVEN == 0:
        power = 1
        for digit in tl.static_range(5):
            row = 5 * byte + digit
            result += tl.load(source + row, mask=row < rows, other=0).to(tl.int32) * power
            power *= 3
    else:
        for bit in tl.static_range(8):
            position = 8 * byte + bit
            place = position % (EVEN + ODD)
            odd = (place >= EVEN).to(tl.int32)
            row = position // (EVEN + ODD) * 2 + odd
            code = tl.load(source + row, mask=row < rows, other=0).to(tl.int32)
            result |= ((code >> (place - odd * EVEN)) & 1) << bit
    tl.store(packed + tl.program_id(0).to(tl.int64) * stride + byte, result.to(tl.uint8), mask=byte < stride)


@triton.jit
def _stage(cost, value, weight, table, came, BITS: tl.constexpr, WINDOW: tl.constexpr):
    """One place of the search: of the states that differ in their oldest bits the best, then one code more."""
    BRANCHES: tl.constexpr = 1 << BITS
    GROUPS: tl.constexpr = 1 << (WINDOW - BITS)
    best, oldest = tl.min(tl.reshape(cost, (GROUPS, BRANCHES)), 1, return_indices=True)
    tl.store(came + tl.arange(0, GROUPS), oldest.to(tl.uint8))
    error = value - tl.reshape(table, (BRANCHES, GROUPS))
    return tl.reshape(best[None, :] + weight * (error * error), (1 << WINDOW,))


@triton.jit
def _row(source, scales, weights, row):
    """What the search is to reach at a row, and what its error counts."""
    return tl.div_rn(tl.load(source + row), tl.load(scales + row)), tl.load(weights + row)


@triton.jit
def search(
    columns, scales, weights, feedback, table, codes, decoded, errors, previous, rows, width, tile, side,
    EVEN: tl.constexpr, ODD: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The Viterbi search of quantizers/viterbi.py; one program a stream of `tile` rows, column after column.

    columns: float32 [width, rows], overwritten; scales, weights: [rows]; feedback: U [width, width]; previous: uint8
    [streams, max(tile, 2 side), 2^WINDOW], where every state came from; side: rows on either side of the seam; BLOCK:
    power of two, at least `tile`.
    """
    STATES: tl.constexpr = 1 << WINDOW
    start = tl.program_id(0) * tile
    length = tl.minimum(rows - start, tile)
    came = previous + tl.program_id(0).to(tl.int64) * tl.maximum(tile, 2 * side) * STATES
    values = tl.load(table + tl.arange(0, STATES))
    place = tl.arange(0, BLOCK)
    inside = place < length
    scale = tl.load(scales + start + place, mask=inside, other=1)
    ring = (length % 2 == 0) & (length // 2 * (EVEN + ODD) >= WINDOW)
    side = tl.minimum(side, length)
    for column in range(width):
        source, scaled, counted = columns + column * rows + start, scales + start, weights + start
        around = tl.zeros((), tl.int32)
        if ring:  # the state at the seam, by the rows around it
            cost = tl.zeros((STATES,), tl.float32)
            for pair in range(side):
                row = tl.where(2 * pair < side, length - side + 2 * pair, 2 * pair - side)
                value, weight = _row(source, scaled, counted, row)
                cost = _stage(cost, value, weight, values, came + 2 * pair * STATES, EVEN, WINDOW)
                value, weight = _row(source, scaled, counted, row + 1)
                cost = _stage(cost, value, weight, values, came + (2 * pair + 1) * STATES, ODD, WINDOW)
            tl.debug_barrier()  # `came` is read by other threads than those that wrote it
            around = tl.argmin(cost, 0).to(tl.int32)
            for back in range(side):
                row = 2 * side - 1 - back
                bits = tl.where(row % 2 == 1, ODD, EVEN)
                group = around % (1 << (WINDOW - bits))
                around = (group << bits) + tl.load(came + row * STATES + group).to(tl.int32)
            tl.debug_barrier()
        cost = tl.where(tl.arange(0, STATES) == around, 0.0, float("inf"))
        for pair in range((length + 1) // 2):
            row = 2 * pair
            value, weight = _row(source, scaled, counted, row)
            cost = _stage(cost, value, weight, values, came + row * STATES, EVEN, WINDOW)
            row += 1
            if row < length:
                value, weight = _row(source, scaled, counted, row)
                cost = _stage(cost, value, weight, values, came + row * STATES, ODD, WINDOW)
        tl.debug_barrier()
        state = tl.where(ring, around, tl.argmin(cost, 0).to(tl.int32))
        target = column * rows + start
        for back in range(length):
            row = length - 1 - back
            bits = tl.where(row % 2 == 1, ODD, EVEN)
            groups = 1 << (WINDOW - bits)
            tl.store(codes + target + row, (state // groups).to(tl.uint8))
            tl.store(decoded + target + row, tl.load(table + state))
            group = state % groups
            state = (group << bits) + tl.load(came + row * STATES + group).to(tl.int32)
        tl.debug_barrier()
        quantized = tl.load(decoded + target + place, mask=inside, other=0) * scale
        tl.store(decoded + target + place, quantized, mask=inside)
        diagonal = tl.zeros_like(quantized) + tl.load(feedback + column * width + column)
        error = tl.div_rn(tl.load(source + place, mask=inside, other=0) - quantized, diagonal)
        tl.store(errors + target + place, error, mask=inside)
        for later in range(column + 1, width):
            other = columns + later * rows + start + place
            factor = tl.load(feedback + column * width + later)
            tl.store(other, tl.load(other, mask=inside, other=0) - error * factor, mask=inside)
        tl.debug_barrier()
