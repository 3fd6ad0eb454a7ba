"""How codes lie in bytes: per column, rows one after the other, no bit between them.

A *pattern* (even, odd) gives the bits of the codes at even and odd rows: (2, 2) is two bits a weight, (1, 2) one and a
half. Bits fill bytes from the lowest to the highest; every column starts on a byte. Ternary codes take five to a byte
(3^5 = 243 <= 256), 1.6 bits a weight.
"""

import numpy as np
import torch
from torch import Tensor

Pattern = tuple[int, int]
TERNARY: Pattern = (0, 0)  # stands for five base-3 digits a byte


def stream_bytes(rows: int, pattern: Pattern) -> int:
    """Bytes of one column of `rows` codes."""
    if pattern == TERNARY:
        return -(-rows // 5)
    even, odd = pattern
    return -(-((rows + 1) // 2 * even + rows // 2 * odd) // 8)


def pack(codes: Tensor, pattern: Pattern) -> Tensor:
    """Codes uint8 [columns, rows] -> bytes uint8 [columns, stream_bytes(rows, pattern)]."""
    columns, rows = codes.shape
    values = codes.numpy()
    if pattern == TERNARY:
        digits = np.zeros((columns, stream_bytes(rows, pattern) * 5), np.uint8)
        digits[:, :rows] = values
        powers = np.array([1, 3, 9, 27, 81], np.uint8)
        return torch.from_numpy((digits.reshape(columns, -1, 5) * powers).sum(2, dtype=np.uint8))
    if pattern == (8, 8):
        return codes.clone()
    pairs = np.zeros((columns, (rows + 1) // 2, 2), np.uint8)
    pairs.reshape(columns, -1)[:, :rows] = values
    bits = [pairs[:, :, place, None] >> np.arange(width, dtype=np.uint8) & 1 for place, width in enumerate(pattern)]
    packed = np.packbits(np.concatenate(bits, 2).reshape(columns, -1), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(packed[:, : stream_bytes(rows, pattern)]))


def unpack(packed: Tensor, rows: int, pattern: Pattern) -> Tensor:
    """The inverse of `pack`: bytes uint8 [columns, bytes] -> codes uint8 [columns, rows]."""
    columns = len(packed)
    if pattern == TERNARY:
        powers = np.array([1, 3, 9, 27, 81], np.uint8)
        digits = packed.numpy()[:, :, None] // powers % 3
        return torch.from_numpy(np.ascontiguousarray(digits.reshape(columns, -1)[:, :rows]))
    if pattern == (8, 8):
        return packed.clone()
    even, odd = pattern
    pairs = (rows + 1) // 2
    count = pairs * (even + odd)
    padded = np.zeros((columns, -(-count // 8)), np.uint8)
    padded[:, : packed.shape[1]] = packed.numpy()
    bits = np.unpackbits(padded, axis=1, count=count, bitorder="little").reshape(columns, pairs, even + odd)
    codes = np.empty((columns, pairs, 2), np.uint8)
    for place, part in enumerate((bits[:, :, :even], bits[:, :, even:])):
        codes[:, :, place] = (part << np.arange(part.shape[2], dtype=np.uint8)).sum(2, dtype=np.uint8)
    return torch.from_numpy(np.ascontiguousarray(codes.reshape(columns, -1)[:, :rows]))
