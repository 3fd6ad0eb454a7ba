"""How codes lie in bytes: per column, rows one after the other, no bit between them.

A *pattern* (even, odd) gives the bits of the codes at even and odd rows: (2, 2) is two bits a weight, (1, 2) one and a
half. Bits fill bytes from the lowest to the highest; every column starts on a byte. Ternary codes take five to a byte
(3^5 = 243 <= 256), 1.6 bits a weight.
"""

from functools import lru_cache
from math import gcd

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
    if pattern == (8, 8):
        return packed.clone()
    if pattern == (4, 4):  # all scales: two to a byte
        return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :rows]
    return unpack_rows(packed, rows, pattern).T.contiguous()


def unpack_rows(packed: Tensor, rows: int, pattern: Pattern) -> Tensor:
    """Like `unpack`, but [rows, columns]: a row of codes is contiguous, as in the weight."""
    if pattern == (8, 8):
        return packed.T.contiguous()
    if pattern == TERNARY:
        columns, count = packed.shape
        index = packed.T.reshape(-1).int()
        result = torch.empty(count, 5, columns, dtype=torch.uint8, device=packed.device)
        for place, digits in enumerate(ternary_digits().to(packed.device)):
            result[:, place] = digits.index_select(0, index).view(count, columns)
        return result.view(count * 5, columns)[:rows]
    return windows(packed, rows, pattern, pattern).to(torch.uint8)


@lru_cache(maxsize=1)
def ternary_digits() -> Tensor:
    """uint8 [5, 256]: the five digits of every byte."""
    return (
        torch.arange(256)[None].div(torch.tensor([1, 3, 9, 27, 81])[:, None], rounding_mode="floor").remainder(3).byte()
    )


def windows(packed: Tensor, rows: int, pattern: Pattern, lengths: tuple[int, int]) -> Tensor:
    """The last `lengths` (even, odd; at most 17) bits up to the end of every code, int32 [rows, columns].

    packed: bytes uint8 [columns, bytes] of a bit pattern. With the pattern's own lengths these are the codes, with
    longer ones a window that slides over the stream; bits before its beginning are 0.
    """
    columns, count = packed.shape
    pairs = 8 // gcd(sum(pattern), 8)  # after so many pairs of rows the codes end on a byte
    step, period = pairs * sum(pattern) // 8, 2 * pairs
    groups = -(-rows // period)
    before = 3  # bytes of zeros
    padded = torch.zeros(before + groups * step + 2, columns, dtype=torch.int32, device=packed.device)
    padded[before : before + count] = packed.T
    words = padded[:-2] | padded[1:-1] << 8 | padded[2:] << 16  # the 24 bits from every byte on
    result = torch.empty(groups * period, columns, dtype=torch.int32, device=packed.device)
    end = 8 * before
    for phase in range(period):
        end += pattern[phase & 1]
        first, shift = divmod(end - lengths[phase & 1], 8)
        torch.bitwise_right_shift(words[first::step][:groups], shift, out=result[phase::period])
    for parity in (0, 1):
        result[parity::2].bitwise_and_((1 << lengths[parity]) - 1)
    return result[:rows]
