"""Decode packed weights on a CPU, compiled by numba: what `packed.dequantize` does, bit for bit, in one pass.

A block of rows of one chunk goes from bits to weights while it lies in the processor's nearest memory. With end_r the
bit of a column behind the code of row r, every code is a window on the column's bits that opens a table:

    w_r = table[bits end_r - L .. end_r - 1]

L being the trellis' window, or the code's own length under a scalar action. Ternary bytes open a table of their digits.
Skipped and protected columns, and treatments that are no trellis and not scalar, are decoded by torch.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from windquant.packed import Format, Layout, decode_offsets, decode_protected, decode_run, decode_scales
from windquant.quantizers import actions
from windquant.quantizers.rotation import unrotate, unrotation
from windquant.quantizers.scalar import Scalar
from windquant.quantizers.trellis import TILE, Trellis, table, tile_rows
from windquant.storage import TERNARY, ternary_digits

BLOCK = 64  # rows that are decoded at a time, a multiple of 8
BEFORE, BEHIND = 4, 16  # zeros around the codes: windows begin, and whole words end, outside of them
#: Columns of the table of chunks. PAIR: bits of two rows, 0 for ternary; LENGTH: of a window; BASE: its first value;
#: SCALE, OFFSET: rows of the scales and offsets, OFFSET -1 where there is none.
PLACE, STRIDE, WIDTH, COLUMN, SCALE, OFFSET, PAIR, LENGTH, BASE, ROTATED = range(10)
SINGLE, HALF, BRAIN = range(3)  # how weights are stored: as they are, rounded to half precision, to bfloat16
KINDS = {torch.float32: SINGLE, torch.float16: HALF, torch.bfloat16: BRAIN}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def decode(layout: Layout, tensors: Mapping[str, Tensor], order: Tensor, dtype: torch.dtype, threads: int) -> Tensor:
    """`dequantize(layout, tensors, order).to(dtype)` of tensors on the CPU; dtype: a key of KINDS."""
    rows = layout.linear.rows
    result = torch.empty(rows, layout.linear.columns, dtype=dtype)
    values, places = _tables(layout.format)
    scales, offsets = decode_scales(layout, tensors), decode_offsets(layout, tensors)
    if layout.protected:
        result[:, order[: layout.protected]] = decode_protected(tensors).T.to(dtype)
    chunks = []
    for run in layout.runs:
        if run.entry.name in places:
            for number, column in enumerate(run.columns):
                place = BEFORE + run.place + number * run.width * run.stride
                offset = run.offset + number if run.entry.has_offset else -1
                chunks.append((place, run.stride, run.width, column, run.scale + number, offset,
                               *places[run.entry.name], run.entry.rotated))  # fmt: skip
        else:
            found = decode_run(run, tensors["codes"], rows, scales, offsets)
            found = unrotate(found) if run.entry.rotated else found
            for column, part in zip(run.columns, found.unbind(1), strict=True):
                result[:, order[column : column + run.width]] = part.to(dtype)
    if not chunks:
        return result
    codes = np.zeros(BEFORE + len(tensors["codes"]) + BEHIND, np.uint8)
    codes[BEFORE:-BEHIND] = tensors["codes"].numpy()
    arguments = (
        codes, np.array(chunks), scales.numpy(), offsets.numpy(), order.numpy(),
        values, _factors(layout.widths[0], layout.widths[-1]), tile_rows(rows, TILE), KINDS[dtype],
        result.view(BITS[dtype]).numpy(),
    )  # fmt: skip
    share = rows if threads == 1 else -(-rows // (threads * BLOCK)) * BLOCK
    parts = [(first, min(rows, first + share)) for first in range(0, rows, share)]
    if len(parts) == 1:
        _decode(*arguments, 0, rows)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: _decode(*arguments, *part), parts))
    return result


@lru_cache(maxsize=4)
def _tables(form: Format) -> tuple[NDArray[np.float32], dict[str, tuple[int, int, int]]]:
    """Values of all windows, float32, and PAIR, LENGTH and BASE of every action that the compiled decoder knows."""
    parts: list[Tensor] = []
    places: dict[str, tuple[int, int, int]] = {}
    for name, entry in actions(form.window, form.dtype).items():
        base = sum(map(len, parts))
        if isinstance(entry, Trellis):
            parts.append(table(entry.window))
            places[name] = sum(entry.pattern), entry.window, base
        elif isinstance(entry, Scalar):
            ternary = entry.pattern == TERNARY
            codes = ternary_digits().T.flatten() if ternary else torch.arange(entry.levels)
            parts.append(codes.float() - entry.middle)
            places[name] = sum(entry.pattern), entry.pattern[0], base
    return torch.cat(parts).numpy(), places


@lru_cache(maxsize=16)
def _factors(whole: int, last: int) -> NDArray[np.float32]:
    """`unrotation` of a whole and of the last chunk, float32 [2, whole]."""
    result = np.zeros((2, whole), np.float32)
    for row, width in zip(result, (whole, last), strict=True):
        row[:width] = unrotation(width).numpy()
    return result


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _word(codes: NDArray[np.uint8], place: np.uint64) -> np.uint64:
    """Eight bytes as a little-endian number."""
    result = np.uint64(0)
    for index in range(8):
        result |= np.uint64(codes[place + np.uint64(index)]) << np.uint64(8 * index)
    return result


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _windows(
    line: NDArray[np.float32],
    codes: NDArray[np.uint8],
    values: NDArray[np.float32],
    place: int,
    pair: int,
    length: int,
    shifts: NDArray[np.uint64],
    first: int,
    since: int,
) -> None:
    """Values of the rows from `first` on of the column whose bytes begin at `place`; the stream begins at row `since`.

    Eight rows take 4 * pair bits, so that one word holds all their windows; shifts: where they lie in it.
    """
    mask = np.uint64((1 << length) - 1)
    origin = 8 * place + (pair * since >> 1)
    begin = 8 * place + (pair >> 1) - length
    for row in range(0, len(line), 8):
        place = begin + (pair * (first + row) >> 1)
        at, early = np.uint64(place), np.uint64(max(origin - place, 0))  # bits before the stream's beginning are 0
        word = _word(codes, at >> np.uint64(3)) >> (at & np.uint64(7)) >> early << early
        for index in range(8):
            line[np.uint64(row + index)] = values[(word >> shifts[index]) & mask]


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _digits(
    line: NDArray[np.float32], codes: NDArray[np.uint8], values: NDArray[np.float32], place: int, first: int
) -> None:
    """Values of ternary rows; the last byte has five digits whether or not there are as many rows."""
    for row in range(len(line)):
        byte, digit = divmod(first + row, 5)
        line[row] = values[5 * int(codes[place + byte]) + digit]


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _unrotate(block: NDArray[np.float32], width: int, rows: int, factors: NDArray[np.float32]) -> None:
    """`rotation.unrotate` of the first rows of [width, BLOCK], in place."""
    start = 0
    for power in range(30, -1, -1):
        size = 1 << power
        if not width & size:
            continue
        half = 1
        while half < size:
            for left in range(start, start + size, 2 * half):
                for column in range(left, left + half):
                    first, second = block[column], block[column + half]
                    for row in range(rows):
                        one, other = first[row], second[row]
                        first[row], second[row] = one + other, one - other
            half *= 2
        start += size
    for column in range(width):
        line = block[column]
        for row in range(rows):
            line[row] *= factors[column]


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _half(bits: int) -> int:
    """The bits of a float32 rounded to half precision, to nearest, half to even."""
    size = bits & 0x7FFFFFFF
    if size < 0x38800000:  # a multiple of 2^-24: 2^-24 times an integer of at most 10 bits
        shift = 126 - (size >> 23) if size >= 0x30000000 else 31
        mantissa = (size & 0x7FFFFF) | (0x800000 if size >= 0x800000 else 0)
        rounded = (mantissa + (1 << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift
    elif size < 0x47800000:
        rounded = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13
    else:
        rounded = 0x7E00 if size > 0x7F800000 else 0x7C00
    return (bits >> 16 & 0x8000) | rounded


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _brain(bits: int) -> int:
    """The same in bfloat16."""
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return 0x7FC0 if bits & 0x7FFFFFFF > 0x7F800000 else rounded


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _decode(
    codes: NDArray[np.uint8],
    chunks: NDArray[np.int64],
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32],
    order: NDArray[np.int64],
    values: NDArray[np.float32],
    factors: NDArray[np.float32],
    tile: int,
    kind: int,
    out: NDArray[np.integer[Any]],
    begin: int,
    end: int,
) -> None:
    """Rows begin .. end - 1 of the weight; begin: a multiple of BLOCK. out: the bits of the weights [rows, columns]."""
    whole = factors.shape[1]
    block = np.empty((whole, BLOCK), np.float32)
    narrow = np.empty((whole, BLOCK), out.dtype)
    shifts = np.empty(8, np.uint64)
    row = begin
    while row < end:
        since = row // tile * tile
        count = min(BLOCK, since + tile - row, end - row)
        padded = (count + 7) // 8 * 8
        for number in range(len(chunks)):
            chunk = chunks[number]
            width, column, pair, base = chunk[WIDTH], chunk[COLUMN], chunk[PAIR], chunk[BASE]
            for index in range(8):
                shifts[index] = (pair * (index + 1) >> 1) - (pair >> 1)
            for index in range(width):
                line = block[index, :padded]
                place = chunk[PLACE] + index * chunk[STRIDE]
                if pair:
                    _windows(line, codes, values[base:], place, pair, chunk[LENGTH], shifts, row, since)
                else:
                    _digits(line, codes, values[base:], place, row)
                scale = scales[chunk[SCALE], row : row + count]
                if chunk[OFFSET] >= 0:
                    offset = offsets[chunk[OFFSET], row : row + count]
                    for place in range(count):
                        line[place] = (line[place] + offset[place]) * scale[place]
                else:
                    for place in range(count):
                        line[place] *= scale[place]
            if chunk[ROTATED]:
                _unrotate(block, width, padded, factors[0 if width == whole else 1])
            for index in range(width):
                bits, target = block[index, :padded].view(np.uint32), narrow[index]
                if kind == HALF:
                    for place in range(padded):
                        target[place] = _half(bits[place])
                elif kind == BRAIN:
                    for place in range(padded):
                        target[place] = _brain(bits[place])
                else:
                    for place in range(padded):
                        target[place] = bits[place]
            for first in range(0, count, 8):
                last = min(8, count - first)
                for index in range(width):
                    to = np.uint64(order[column + index])
                    if last == 8:
                        for place in range(8):
                            out[np.uint64(row + first + place), to] = narrow[index, first + place]
                    else:
                        for place in range(last):
                            out[np.uint64(row + first + place), to] = narrow[index, first + place]
        row += count
