"""Scalar treatment: affine with a float offset for 2 to 8 bits, ternary, binary with offset, symmetric 8 bits.

A code stands for w = scale (code - (levels - 1) / 2 + offset). Scale and offset come from the closed-form least
squares on the codes, weighted by the channels' energy, over a grid of clips (llama.cpp's imatrix and AutoRound search
the same way). With two levels and equal energies the result is BiLLM's mean -+ mean|w - mean| (arXiv 2402.04291).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from windquant.quantizers.base import Coded, Fit
from windquant.storage import Pattern, unpack_rows

CLIPS = 12  # candidates between half and the whole range of a row
ROUNDS = 2  # of codes and least squares for each candidate
LARGEST_OFFSET = 127 / 256  # of the levels' range, as scales.py stores offsets


@dataclass(frozen=True)
class Scalar:
    name: str
    bits: float
    pattern: Pattern
    levels: int
    has_offset: bool
    rotated: bool = False
    has_scale: bool = True

    @property
    def covers(self) -> bool:
        return self.levels == 256

    @property
    def middle(self) -> float:
        return (self.levels - 1) / 2

    def fit(self, chunk: Tensor, energy: Tensor) -> Fit:
        tiny = torch.finfo(torch.float32).tiny
        low, high = chunk.amin(1), chunk.amax(1)
        if not self.has_offset:
            high = torch.maximum(high, -low)
            low = -high
        spread = (high - low).clamp_min(1e-8)
        center = (high + low) / 2
        weights = energy / energy.mean().clamp_min(tiny)
        best = Fit(spread / max(self.levels - 1, 1), center / spread * max(self.levels - 1, 1))
        lowest = torch.full_like(low, torch.inf)
        clips = [1.0] if self.covers else torch.linspace(0.35, 1.0, CLIPS).tolist()
        for clip in clips:
            scale = spread * clip / (self.levels - 1)
            offset = center / scale
            for _ in range(ROUNDS):
                level = self._level(self._codes(chunk.T, Fit(scale, offset)).T)
                scale, offset = self._least_squares(chunk, level, weights, scale, offset)
            fitted = Fit(scale, offset)
            decoded = self.decode(self._codes(chunk.T, fitted), fitted).T
            error = ((chunk - decoded).square() * weights).sum(1)
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            best = Fit(torch.where(better, scale, best.scale), torch.where(better, offset, _offset(best)))
        return best if self.has_offset else Fit(best.scale)

    def _least_squares(
        self, chunk: Tensor, level: Tensor, weights: Tensor, scale: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """min over s, o of sum_j weights_j (w_j - s (level_j + o))^2 in every row; the old pair where singular.

        An offset beyond what can be stored becomes the nearest that can, and the scale the best one with that.
        """
        if not self.has_offset:
            square = (level.square() * weights).sum(1)
            slope = (chunk * level * weights).sum(1) / square
            return torch.where((square > 0) & (slope > 0), slope, scale), torch.zeros_like(offset)
        total = weights.sum()
        mean_level, mean = (level * weights).sum(1) / total, (chunk * weights).sum(1) / total
        centered = (level - mean_level[:, None]) * weights
        variance = (centered * level).sum(1)
        slope = (centered * chunk).sum(1) / variance
        good = (variance > 0) & (slope > 0)
        slope = torch.where(good, slope, scale)
        offset = torch.where(good, mean / slope - mean_level, offset)
        largest = LARGEST_OFFSET * self.levels
        nearest = offset.clamp(-largest, largest)
        level = level + nearest[:, None]
        refit = (chunk * level * weights).sum(1) / (level.square() * weights).sum(1)
        return torch.where((offset.abs() >= largest) & (refit > 0), refit, slope), nearest

    def _level(self, codes: Tensor) -> Tensor:
        return codes.float() - self.middle

    def _codes(self, columns: Tensor, fit: Fit) -> Tensor:
        shift = self.middle - fit.offset if fit.offset is not None else self.middle
        return (columns / fit.scale + shift).round_().clamp_(0, self.levels - 1).to(torch.uint8)

    def encode(self, columns: Tensor, fit: Fit, importance: Tensor, feedback: Tensor) -> Coded:
        codes = torch.empty(columns.shape, dtype=torch.uint8)
        decoded = torch.empty_like(columns)
        errors = torch.empty_like(columns)
        for i in range(len(columns)):
            codes[i] = self._codes(columns[i], fit)
            decoded[i] = self.decode(codes[i], fit)
            errors[i] = (columns[i] - decoded[i]) / feedback[i, i]
            columns[i + 1 :] -= feedback[i, i + 1 :, None] * errors[i]
        return Coded(codes, decoded, errors)

    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        level = self._level(codes)
        return (level if fit.offset is None else level + fit.offset) * fit.scale

    def unscaled(self, packed: Tensor, rows: int) -> Tensor:
        return self._level(unpack_rows(packed, rows, self.pattern))

    def error(self, chunk: Tensor, energy: Tensor) -> Tensor:
        fit = self.fit(chunk, energy)
        decoded = self.decode(self._codes(chunk.T, fit), fit).T
        return ((chunk - decoded).square() * energy).sum(1)


def _offset(fit: Fit) -> Tensor:
    return fit.offset if fit.offset is not None else torch.zeros_like(fit.scale)
