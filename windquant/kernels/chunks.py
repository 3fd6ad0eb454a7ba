"""Quantize chunks where their weights are, on a GPU: what a treatment's `fit`, `encode` and `pack` do, by Triton."""

import torch
import triton
from torch import Tensor

from windquant.kernels import quantize
from windquant.quantizers import Coded, Fit
from windquant.quantizers.scalar import CLIPS, LARGEST_OFFSET, ROUNDS, Scalar
from windquant.quantizers.trellis import SEAM, Trellis, row_weights, table, tile_rows
from windquant.storage import Pattern, stream_bytes

EXACT = {"enable_fp_fusion": False}  # products are rounded before they are added, as on a CPU


def fit(entry: Scalar, columns: Tensor, energy: Tensor) -> Fit:
    """`Scalar.fit` of a chunk given as its columns, float32 [width, rows]; energy: float32 [width]."""
    width, rows = columns.shape
    scales = torch.empty(rows, device=columns.device)
    offsets = torch.empty_like(scales) if entry.has_offset else None
    clips = torch.ones(1) if entry.covers else torch.linspace(0.35, 1.0, CLIPS)
    block = 16
    quantize.fit[(triton.cdiv(rows, block),)](
        columns, energy, clips.to(columns.device), scales, offsets, rows, width, LEVELS=entry.levels,
        OFFSET=entry.has_offset, CLIPS=len(clips), ROUNDS=ROUNDS, LARGEST=LARGEST_OFFSET,
        SIDE=triton.next_power_of_2(width), BLOCK=block, **EXACT,
    )  # fmt: skip
    return Fit(scales, offsets)


def encode(entry: Scalar | Trellis, columns: Tensor, found: Fit, importance: Tensor, feedback: Tensor) -> Coded:
    """`Treatment.encode` of columns, float32 [width, rows]: codes, decoded weights and errors, bit for bit the same."""
    width, rows = columns.shape
    columns, feedback = columns.clone(), feedback.contiguous()
    codes = torch.empty(width, rows, dtype=torch.uint8, device=columns.device)
    decoded, errors = torch.empty_like(columns), torch.empty_like(columns)
    if isinstance(entry, Scalar):
        block = 16
        quantize.encode[(triton.cdiv(rows, block),)](
            columns, found.scale, found.offset, feedback, codes, decoded, errors, rows, width, LEVELS=entry.levels,
            OFFSET=entry.has_offset, SIDE=triton.next_power_of_2(width), BLOCK=block, **EXACT,
        )  # fmt: skip
    else:
        weights, values = row_weights(importance, found.scale), table(entry.window).to(columns.device)
        tile = tile_rows(rows, entry.tile)
        streams = triton.cdiv(rows, tile)
        side = min(SEAM, tile)
        shape = streams, max(tile, 2 * side), 1 << entry.window
        previous = torch.empty(shape, dtype=torch.uint8, device=columns.device)
        even, odd = entry.pattern
        quantize.search[(streams,)](
            columns, found.scale, weights, feedback, values, codes, decoded, errors, previous, rows, width, tile, side,
            EVEN=even, ODD=odd, WINDOW=entry.window, BLOCK=triton.next_power_of_2(tile), num_warps=8, **EXACT,
        )  # fmt: skip
    return Coded(codes, decoded, errors)


def pack(codes: Tensor, pattern: Pattern) -> Tensor:
    """`storage.pack`: codes uint8 [columns, rows] -> bytes uint8 [columns, stream_bytes(rows, pattern)]."""
    columns, rows = codes.shape
    size = stream_bytes(rows, pattern)
    packed = torch.empty(columns, size, dtype=torch.uint8, device=codes.device)
    block = 256
    quantize.pack[columns, triton.cdiv(size, block)](
        codes, packed, rows, size, EVEN=pattern[0], ODD=pattern[1], BLOCK=block
    )
    return packed
