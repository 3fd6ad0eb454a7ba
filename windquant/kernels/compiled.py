"""What numba compiles for cpu.py. Only machine_code.py imports this, once on a machine; it keeps the result.

A block of rows goes from bits to weights in two passes. Chunk by chunk, while it lies in the processor's nearest
memory, it becomes lines: one for every column of the weight, in natural order, rows side by side. The lines are then
turned into rows of the weight. Nothing is allocated, nothing outside of these functions is called, and indices are
unsigned where that counts: numba takes a negative one from the end.
"""

from typing import Any

import numba
import numpy as np
from numba import carray, types
from numpy.typing import NDArray

BLOCK = 64  # rows that are decoded at a time, a multiple of 8
#: Columns of the table of chunks. PAIR: bits of two rows, 0 for ternary; LENGTH: of a window; BASE: its first value;
#: SCALE, OFFSET: rows of the scales and offsets, OFFSET -1 where there is none.
PLACE, STRIDE, WIDTH, COLUMN, SCALE, OFFSET, PAIR, LENGTH, BASE, ROTATED = range(10)
SINGLE, HALF, BRAIN = range(3)  # how weights are stored: as they are, rounded to half precision, to bfloat16

_OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}  # nothing here raises
_compiled = numba.njit(**_OPTIONS)


@_compiled
def _word(codes: NDArray[np.uint8], place: np.uint64) -> np.uint64:
    """Eight bytes as a little-endian number."""
    result = np.uint64(0)
    for index in range(8):
        result |= np.uint64(codes[place + np.uint64(index)]) << np.uint64(8 * index)
    return result


@_compiled
def _windows(
    line: NDArray[np.float32],
    codes: NDArray[np.uint8],
    values: NDArray[np.float32],
    place: int,
    pair: int,
    length: int,
    first: int,
    since: int,
    until: int,
) -> None:
    """Values of the rows from `first` on of the column whose bytes begin at `place`, of a stream from row `since` to
    `until`.

    Eight rows take 4 * pair bits, so that one word holds all their windows. Before the stream's beginning come the bits
    of its end; or zeros, where it has an odd number of rows or fewer bits than a window.
    """
    mask = np.uint64((1 << length) - 1)
    origin, close = 8 * place + (pair * since >> 1), 8 * place + (pair * until >> 1)
    ring = (until - since) % 2 == 0 and close - origin >= length
    begin = 8 * place + (pair >> 1) - length
    one, both = np.uint64(pair - (pair >> 1)), np.uint64(pair)
    for row in range(0, len(line), 8):
        place = begin + (pair * (first + row) >> 1)
        at, early = np.uint64(place), np.uint64(max(origin - place, 0))  # bits before the stream's beginning
        word = _word(codes, at >> np.uint64(3)) >> (at & np.uint64(7)) >> early << early
        if early and ring:
            at = np.uint64(close) - early
            last = _word(codes, at >> np.uint64(3)) >> (at & np.uint64(7))
            word |= last & ((np.uint64(1) << early) - np.uint64(1))
        for index in range(row, row + 8, 2):
            line[np.uint64(index)] = values[word & mask]
            line[np.uint64(index + 1)] = values[word >> one & mask]
            word >>= both


@_compiled
def _digits(
    line: NDArray[np.float32], codes: NDArray[np.uint8], values: NDArray[np.float32], place: int, first: int
) -> None:
    """Values of ternary rows; the last byte has five digits whether or not there are as many rows."""
    for row in range(len(line)):
        byte, digit = divmod(first + row, 5)
        line[row] = values[5 * int(codes[place + byte]) + digit]


@_compiled
def _unrotate(block: NDArray[np.float32], width: int, rows: int, factors: NDArray[np.float32]) -> None:
    """`rotation.unrotate` of the first rows of [width, BLOCK], in place."""
    start = 0
    for power in range(30, -1, -1):
        size = 1 << power
        if not width & size:
            continue
        half = 1
        while 4 * half <= size:  # two of the reference's steps at a time: the same sums, half the way to memory
            for left in range(start, start + size, 4 * half):
                for column in range(left, left + half):
                    a, b = block[column], block[column + half]
                    c, d = block[column + 2 * half], block[column + 3 * half]
                    for row in range(rows):
                        e, f, g, h = a[row] + b[row], a[row] - b[row], c[row] + d[row], c[row] - d[row]
                        a[row], b[row], c[row], d[row] = e + g, f + h, e - g, f - h
            half *= 4
        if half < size:
            for column in range(start, start + half):
                a, b = block[column], block[column + half]
                for row in range(rows):
                    a[row], b[row] = a[row] + b[row], a[row] - b[row]
        start += size
    for column in range(width):
        line = block[column]
        for row in range(rows):
            line[row] *= factors[column]


@_compiled
def half(value: np.float32) -> Any:
    """The bits of a number rounded to half precision, to nearest, half to even."""
    bits = np.float32(value).view(np.uint32)
    size = bits & 0x7FFFFFFF
    if size < 0x38800000:  # becomes a multiple of 2^-24, as every number from 0.5 to 1 is one
        rounded: Any = np.float32(abs(value) + np.float32(0.5)).view(np.uint32) - 0x3F000000
    elif size < 0x47800000:
        rounded = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13
    else:
        rounded = 0x7E00 if size > 0x7F800000 else 0x7C00
    return (bits >> 16 & 0x8000) | rounded


@_compiled
def brain(value: np.float32) -> Any:
    """The same in bfloat16."""
    bits = np.float32(value).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return 0x7FC0 if bits & 0x7FFFFFFF > 0x7F800000 else rounded


@_compiled
def _chunk(
    chunk: NDArray[np.int64],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32],
    values: NDArray[np.float32],
    factors: NDArray[np.float32],
    block: NDArray[np.float32],
    row: int,
    count: int,
    since: int,
    until: int,
) -> None:
    """Weights of `count` rows of a chunk, padded to a multiple of 8: the first columns of the block."""
    padded = (count + 7) // 8 * 8
    width, pair = chunk[WIDTH], chunk[PAIR]
    for index in range(width):
        line, place = block[index, :padded], chunk[PLACE] + index * chunk[STRIDE]
        if pair:
            _windows(line, codes, values[chunk[BASE] :], place, pair, chunk[LENGTH], row, since, until)
        else:
            _digits(line, codes, values[chunk[BASE] :], place, row)
        scale = scales[chunk[SCALE], row : row + count]
        if chunk[OFFSET] >= 0:
            offset = offsets[chunk[OFFSET], row : row + count]
            for place in range(count):
                line[place] = (line[place] + offset[place]) * scale[place]
        else:
            for place in range(count):
                line[place] *= scale[place]
    if chunk[ROTATED]:
        _unrotate(block, width, padded, factors[0 if width == factors.shape[1] else 1])


@_compiled
def _store(lines: NDArray[Any], order: NDArray[np.int64], block: NDArray[np.float32], count: int, kind: int) -> None:
    """The columns of the block, which are those of `order`, in the type of the weight."""
    for index in range(len(order)):
        line, target = block[index], lines[order[index]]
        if kind == HALF:
            for row in range(count):
                target[row] = half(line[row])
        elif kind == BRAIN:
            for row in range(count):
                target[row] = brain(line[row])
        else:
            for row in range(count):
                target[row] = np.float32(line[row]).view(np.uint32)


@_compiled
def _turn(out: NDArray[Any], lines: NDArray[Any], begin: int, count: int) -> None:
    """Lines [columns, BLOCK] -> `count` rows of out [rows, columns], as many columns at a time as near memory holds."""
    columns = len(lines)
    for first in range(0, columns, 32):
        last = min(first + 32, columns)
        for row in range(count):
            target = out[begin + row]
            for column in range(first, last):
                target[np.uint64(column)] = lines[np.uint64(column), np.uint64(row)]


def decode(
    codes: Any, chunks: Any, scales: Any, offsets: Any, order: Any, values: Any, factors: Any, block: Any, lines: Any,
    out: Any, count: int, entries: int, rows: int, columns: int, whole: int, tile: int, kind: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Rows begin .. end - 1 of the weight; begin: a multiple of BLOCK. Arrays are addresses:

    codes uint8; chunks int64 [count, 10]; scales, offsets float32 [.., rows]; order int64 [columns]; values float32
    [entries]; factors float32 [2, whole], whole being the width of all chunks but the last; block float32
    [whole, BLOCK] and lines [columns, BLOCK] to work in; out: the bits of the weights [rows, columns].
    """
    unseen = 1  # a length that nothing looks at
    codes, values, order = carray(codes, unseen), carray(values, entries), carray(order, columns)
    chunks, factors = carray(chunks, (count, 10)), carray(factors, (2, whole))
    scales, offsets = carray(scales, (unseen, rows)), carray(offsets, (unseen, rows))
    block, lines, out = carray(block, (whole, BLOCK)), carray(lines, (columns, BLOCK)), carray(out, (rows, columns))
    row = begin
    while row < end:
        since = row // tile * tile
        until = min(since + tile, rows)
        here = min(BLOCK, until - row, end - row)
        for number in range(count):
            chunk = chunks[number]
            _chunk(chunk, codes, scales, offsets, values, factors, block, row, here, since, until)
            _store(lines, order[chunk[COLUMN] : chunk[COLUMN] + chunk[WIDTH]], block, here, kind)
        _turn(out, lines, row, here)
        row += here


def callback(bits: int) -> Any:
    """`decode` of weights of 16 or 32 bits as numba's `CFunc`, a function that C can call."""
    number = types.uint16 if bits == 16 else types.uint32
    single, whole = types.float32, types.int64
    arrays = (types.uint8, whole, single, single, whole, single, single, single, number, number)
    signature = types.void(*(types.CPointer(array) for array in arrays), *[whole] * 9)
    return numba.cfunc(signature, **_OPTIONS)(decode)
