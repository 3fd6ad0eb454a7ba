"""Trellis treatment: bit-shift trellis codes at 1, 1.5, 2, 2.5, 3, 3.5 and 4 bits on rotated chunks (see viterbi.py).

The torch functions are the reference on every device; on a CPU with numba the compiled search does the same.
"""

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from windquant.quantizers.base import Coded, Fit
from windquant.storage import Pattern, pack, windows

#: Mean squared error on a unit Gaussian by (bits, window), as `python -m benchmarks.distortion` measures it.
DISTORTION = {
    (1.0, 8): 0.304,
    (1.5, 8): 0.164,
    (2.0, 8): 0.0875,
    (2.5, 8): 0.0479,
    (3.0, 8): 0.0250,
    (3.5, 8): 0.0137,
    (4.0, 8): 0.0075,
    (1.0, 10): 0.285,
    (1.5, 10): 0.150,
    (2.0, 10): 0.0786,
    (2.5, 10): 0.0414,
    (3.0, 10): 0.0216,
    (3.5, 10): 0.0114,
    (4.0, 10): 0.0060,
    (1.0, 12): 0.275,
    (1.5, 12): 0.142,
    (2.0, 12): 0.0732,
    (2.5, 12): 0.0379,
    (3.0, 12): 0.0195,
    (3.5, 12): 0.0100,
    (4.0, 12): 0.0051,
    (1.0, 14): 0.270,
    (1.5, 14): 0.138,
    (2.0, 14): 0.0702,
    (2.5, 14): 0.0358,
    (3.0, 14): 0.0183,
    (3.5, 14): 0.0093,
    (4.0, 14): 0.0047,
}
#: Scale of the table in root mean squares: the fewer the bits, the closer to zero the best reproduction of a Gaussian
#: lies (its variance is 1 - distortion), and with many bits a wider table has better values in the tails. The best at
#: 4096 states.
SHRINK = {1.0: 0.88, 1.5: 0.97, 2.0: 1.02, 2.5: 1.05, 3.0: 1.09, 3.5: 1.1, 4.0: 1.11}
SEED = 0x57494E44  # of the table's shuffle; part of the format, as is
TILE = 512  # most rows of one stream
SEAM = 64  # rows on either side of where a stream begins and ends, an even number, by which the search finds its state
LEAST = 0.1  # what a row counts in its stream at least, of the mean


@lru_cache(maxsize=8)
def table(window: int) -> Tensor:
    """Value of every state, float32 [2^window]: unit-variance Gaussian quantiles in a fixed random order."""
    states = 1 << window
    normal = NormalDist()
    quantiles = torch.tensor([normal.inv_cdf((state + 0.5) / states) for state in range(states)], dtype=torch.float64)
    quantiles /= quantiles.square().mean().sqrt()
    shuffle = torch.randperm(states, generator=torch.Generator().manual_seed(SEED))
    return quantiles[shuffle].float()


def tile_rows(rows: int, tile: int) -> int:
    """Rows of one stream: equal tiles of at most `tile` rows, an even number of rows each."""
    tiles = -(-rows // tile)
    return -(-rows // tiles) + 1 & ~1


def states(packed: Tensor, rows: int, pattern: Pattern, window: int, tile: int) -> Tensor:
    """State at every row of packed codes uint8 [columns, bytes]: int32 [rows, columns], contiguous.

    The bits of the stream lie in memory as the state shifts them in, so a state is a window on the bytes: the last
    `window` bits of the stream, which is a ring. Where it has an odd number of rows, or fewer bits than a state, bits
    before its beginning are 0.
    """
    result = windows(packed, rows, pattern, (window, window))
    begins = torch.arange(0, rows, tile, device=packed.device)
    lengths = (begins + tile).clamp(max=rows) - begins
    ring = (lengths % 2 == 0) & (lengths // 2 * sum(pattern) >= window)
    final = result[begins + lengths - 1] * ring[:, None]  # state at the end of every stream
    bits = 0
    for row in range(min(tile, rows)):  # at the beginning of a stream: what is left of the one before goes
        bits += pattern[row & 1]
        if bits >= window:
            break
        first = result[row::tile]
        first.bitwise_and_(((1 << bits) - 1) << (window - bits)).bitwise_or_(final[: len(first)] >> bits)
    return result


def row_weights(importance: Tensor, scale: Tensor) -> Tensor:
    """What an error of a row, in its scale, counts in its stream, float32 [rows]: relative to the mean, at least LEAST.

    Never nothing: rows share their streams' codes, and one that counted for nothing would get what suits the others.
    That is noise where the calibration text has only not reached it (a neuron behind a ReLU that has not fired yet).
    """
    weights = importance * scale.square()
    return (weights / weights.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(LEAST)


@dataclass(frozen=True)
class Trellis:
    name: str
    bits: float
    pattern: Pattern
    window: int = 10  # L: the search keeps 2^L states
    tile: int = TILE
    rotated: bool = True
    has_scale: bool = True
    has_offset: bool = False
    covers: bool = False

    def fit(self, chunk: Tensor, energy: Tensor) -> Fit:
        """The scale follows the root mean square: the table has unit variance. The rotation has made energies alike."""
        return Fit(chunk.square().mean(1).sqrt() * SHRINK[float(self.bits)])

    def encode(self, columns: Tensor, fit: Fit, importance: Tensor, feedback: Tensor) -> Coded:
        from windquant.quantizers.viterbi import quantize

        codes, decoded, errors = quantize(
            columns.contiguous().numpy(),
            np.ascontiguousarray(fit.scale.numpy()),
            np.ascontiguousarray(row_weights(importance, fit.scale).numpy()),
            np.ascontiguousarray(feedback.numpy()),
            table(self.window).numpy(),
            self.pattern,
            tile_rows(columns.shape[1], self.tile),
            SEAM,
            torch.get_num_threads(),
        )
        return Coded(torch.from_numpy(codes), torch.from_numpy(decoded), torch.from_numpy(errors))

    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        return self.unscaled(pack(codes, self.pattern), codes.shape[1]).T * fit.scale

    def unscaled(self, packed: Tensor, rows: int) -> Tensor:
        values = table(self.window).to(packed.device)
        found = states(packed, rows, self.pattern, self.window, tile_rows(rows, self.tile))
        return values.index_select(0, found.view(-1)).view(found.shape)

    def error(self, chunk: Tensor, energy: Tensor) -> Tensor:
        return chunk.square().sum(1) * energy.mean() * DISTORTION[self.bits, self.window]
