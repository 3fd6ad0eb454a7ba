"""Decode packed weights on a CPU: what `packed.dequantize` does, bit for bit, in one pass of compiled code.

A block of rows of one chunk goes from bits to weights while it lies in the processor's nearest memory. With end_r the
bit of a column behind the code of row r, every code is a window on the column's bits that opens a table:

    w_r = table[bits end_r - L .. end_r - 1]

L being the trellis' window, or the code's own length under a scalar action. Ternary bytes open a table of their digits.
Skipped and protected columns, and treatments that are no trellis and not scalar, are decoded by torch.

The compiled code is that of compiled.py; machine_code.py loads it, without numba wherever numba has compiled it before.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from windquant.kernels import machine_code
from windquant.packed import Format, Layout, decode_offsets, decode_protected, decode_run, decode_scales
from windquant.quantizers import actions
from windquant.quantizers.rotation import unrotate, unrotation
from windquant.quantizers.scalar import Scalar
from windquant.quantizers.trellis import TILE, Trellis, table, tile_rows
from windquant.storage import TERNARY, ternary_digits

BLOCK = 64  # rows that are decoded at a time; this and KINDS as in compiled.py
#: Bytes around the codes that are read without a say: windows and words overlap the ends. At most header.py's MARGIN.
BEFORE, BEHIND = 4, 16
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # SINGLE, HALF and BRAIN


def decode(layout: Layout, tensors: Mapping[str, Tensor], order: Tensor, dtype: torch.dtype, threads: int) -> Tensor:
    """`dequantize(layout, tensors, order).to(dtype)` of tensors on the CPU; dtype: a key of KINDS."""
    rows, columns = layout.linear.rows, layout.linear.columns
    result = torch.empty(rows, columns, dtype=dtype)
    values, places = _tables(layout.format)
    scales, offsets = decode_scales(layout, tensors), decode_offsets(layout, tensors)
    chunks = []
    others = [(0, decode_protected(tensors).T)] if layout.protected else []  # columns that torch decodes
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
            others += zip(run.columns, found.unbind(1), strict=True)
    if chunks:
        chunk_table, factors = np.array(chunks), _factors(layout.widths[0], layout.widths[-1])
        codes = _surrounded(tensors["codes"])
        code = machine_code.decoder(8 * dtype.itemsize)
        share = -(-rows // (threads * BLOCK)) * BLOCK

        def decode_rows(begin: int) -> None:
            block = np.empty((len(factors[0]), BLOCK), np.float32)
            lines = np.empty((columns, BLOCK), f"u{dtype.itemsize}")
            code(
                codes.data_ptr() - BEFORE, chunk_table.ctypes.data, scales.data_ptr(), offsets.data_ptr(),
                order.data_ptr(), values.ctypes.data, factors.ctypes.data, block.ctypes.data, lines.ctypes.data,
                result.data_ptr(),
                len(chunks), len(values), rows, columns, len(block), tile_rows(rows, TILE), KINDS[dtype],
                begin, min(rows, begin + share),
            )  # fmt: skip

        if share >= rows:
            decode_rows(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(decode_rows, range(0, rows, share)))
    for column, found in others:  # they are in the way of the compiled code, which writes whole rows
        result[:, order[column : column + found.shape[1]]] = found.to(dtype)
    return result


def _surrounded(codes: Tensor) -> Tensor:
    """The codes [bytes], if bytes may be read before and behind them as in a mapped file; else a copy of that kind."""
    before = codes.storage_offset()
    behind = codes.untyped_storage().nbytes() - before - len(codes)
    if before >= BEFORE and behind >= BEHIND and codes.is_contiguous():
        return codes
    copy = codes.new_zeros(BEFORE + len(codes) + BEHIND)
    copy[BEFORE:-BEHIND] = codes
    return copy[BEFORE:-BEHIND]


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
