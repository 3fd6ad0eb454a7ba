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
from windquant.storage import Pattern, windows

#: Mean squared error on a unit Gaussian by (bits, window), as `python -m benchmarks.distortion` measures it.
DISTORTION = {
    (1.0, 8): 0.307,
    (1.5, 8): 0.166,
    (2.0, 8): 0.0885,
    (2.5, 8): 0.0487,
    (3.0, 8): 0.0255,
    (3.5, 8): 0.0141,
    (4.0, 8): 0.0076,
    (1.0, 10): 0.289,
    (1.5, 10): 0.153,
    (2.0, 10): 0.0803,
    (2.5, 10): 0.0426,
    (3.0, 10): 0.0221,
    (3.5, 10): 0.0118,
    (4.0, 10): 0.0061,
    (1.0, 12): 0.279,
    (1.5, 12): 0.145,
    (2.0, 12): 0.0748,
    (2.5, 12): 0.0389,
    (3.0, 12): 0.0200,
    (3.5, 12): 0.0104,
    (4.0, 12): 0.0053,
    (1.0, 14): 0.274,
    (1.5, 14): 0.142,
    (2.0, 14): 0.0723,
    (2.5, 14): 0.0374,
    (3.0, 14): 0.0190,
    (3.5, 14): 0.0098,
    (4.0, 14): 0.0049,
}
#: Scale of the table in root mean squares: the fewer the bits, the closer to zero the best reproduction of a Gaussian
#: lies (its variance is 1 - distortion), and with many bits a wider table has better values in the tails. The best at
#: 4096 states.
SHRINK = {1.0: 0.88, 1.5: 0.97, 2.0: 1.02, 2.5: 1.05, 3.0: 1.09, 3.5: 1.1, 4.0: 1.11}
SEED = 0x57494E44  # of the table's shuffle; part of the format, as is
TILE = 512  # most rows of one stream
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


def states(codes: Tensor, pattern: Pattern, window: int, tile: int) -> Tensor:
    """State at every row, int32 [width, rows], of codes uint8 [width, rows]: the last `window` bits of the stream."""
    width, rows = codes.shape
    even, odd = pattern
    padded = torch.zeros(width, -(-rows // tile) * tile, dtype=torch.int32)
    padded[:, :rows] = codes
    stream = padded.view(width, -1, tile)
    result = torch.zeros_like(stream)
    odd_row = torch.arange(tile) & 1
    position = torch.full((tile,), window)  # where the code of `age` rows ago begins in the state of each row
    for age in range(min(tile, -(-window // min(even, odd)))):
        bits = torch.where((odd_row ^ age & 1).bool(), odd, even)
        position = position - bits
        shifted = torch.zeros_like(stream)
        shifted[..., age:] = stream[..., : tile - age]
        up, down = position.clamp(min=0), (-position).clamp(min=0, max=8)  # the oldest code may be cut
        result |= shifted << up >> down
    return result.view(width, -1)[:, :rows]


def packed_states(packed: Tensor, rows: int, pattern: Pattern, window: int, tile: int) -> Tensor:
    """`states` of codes that are still packed, uint8 [columns, bytes]: int32 [rows, columns], contiguous.

    The bits of the stream lie in memory as the state shifts them in, so a state is a window on the bytes.
    """
    result = windows(packed, rows, pattern, (window, window))
    bits = 0
    for row in range(min(tile, rows)):  # at the start of a tile: what is left of the tile before goes
        bits += pattern[row & 1]
        if bits >= window:
            break
        result[row::tile].bitwise_and_(((1 << bits) - 1) << (window - bits))
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

    def fit(self, chunk: Tensor, energy: Tensor) -> Fit:
        """The scale follows the root mean square: the table has unit variance. The rotation has made energies alike."""
        return Fit(chunk.square().mean(1).sqrt() * SHRINK[float(self.bits)])

    def encode(self, columns: Tensor, fit: Fit, importance: Tensor, feedback: Tensor) -> Coded:
        from windquant.quantizers.viterbi import compiled, use_threads

        use_threads(torch.get_num_threads())
        codes, decoded, errors = compiled(*self.pattern, self.window)(
            columns.contiguous().numpy(),
            np.ascontiguousarray(fit.scale.numpy()),
            np.ascontiguousarray(row_weights(importance, fit.scale).numpy()),
            np.ascontiguousarray(feedback.numpy()),
            table(self.window).numpy(),
            tile_rows(columns.shape[1], self.tile),
        )
        return Coded(torch.from_numpy(codes), torch.from_numpy(decoded), torch.from_numpy(errors))

    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        tile = tile_rows(codes.shape[1], self.tile)
        return table(self.window)[states(codes, self.pattern, self.window, tile)] * fit.scale

    def unscaled(self, packed: Tensor, rows: int) -> Tensor:
        values = table(self.window).to(packed.device)
        found = packed_states(packed, rows, self.pattern, self.window, tile_rows(rows, self.tile))
        return values.index_select(0, found.view(-1)).view(found.shape)

    def error(self, chunk: Tensor, energy: Tensor) -> Tensor:
        return chunk.square().sum(1) * energy.mean() * DISTORTION[self.bits, self.window]
