"""Scales and offsets as codes. The scale of row r in chunk c takes four bits beside what rows and chunks share:

    log2 scale = base + row_r / 16 + chunk_c + step (code_rc - 7.5)

with base, step and chunk_c in FP16 and row_r in eight bits. docs/format.md describes every byte.
"""

import torch
from torch import Tensor

SCALE_BITS = 4
ROW_STEP = 1 / 16  # of log2 of a row's scale
STEPS = tuple(0.02 * 1.3**i for i in range(14))  # candidates for `step`, 0.02 to 0.6
FLOOR = 2.0**-40  # of a scale: a row of zeros has one too
HALF_ERROR = 2.0**-6  # of a chunk's share rounded to FP16, below 2^6
DEAD = 2.0**-15  # of the largest scale: what is below (a row or block of zeros) has no say in what rows share


class ScaleCoder:
    """Scales of one linear, coded chunk by chunk against what its rows share."""

    def __init__(self, base: Tensor, step: Tensor, rows: Tensor) -> None:
        self.base, self.step = base.half(), step.half()  # scalars
        self.rows = rows  # uint8 [rows]

    @classmethod
    def fit(cls, scales: Tensor) -> "ScaleCoder":
        """Rows and step for scales [rows, chunks] as they are expected."""
        logs = torch.where(_alive(scales), scales.clamp_min(FLOOR).log2(), torch.nan)
        shared = logs.nanmean(1)
        shared = shared.nan_to_num((DEAD * scales.max()).clamp_min(FLOOR).log2().item())
        logs = torch.where(logs.isnan(), shared[:, None], logs)
        base = shared.min().half()
        rows = ((shared - base.float()) / ROW_STEP).round().clamp(0, 255).to(torch.uint8)
        rest = logs - base.float() - rows.float()[:, None] * ROW_STEP
        rest = rest - rest.mean(0)
        errors = [(_snap(rest, step) - rest).square().mean() for step in STEPS]
        return cls(base, base.new_tensor(STEPS[int(torch.stack(errors).argmin())], dtype=torch.float32), rows)

    @property
    def row_logs(self) -> Tensor:
        return self.base.float() + self.rows.float() * ROW_STEP

    def encode(self, scale: Tensor, least: bool = False) -> tuple[Tensor, Tensor]:
        """Scale of one chunk [rows] -> codes uint8 [rows] and the chunk's share, an FP16 scalar.

        least: none may get smaller, because the largest weights would be cut off. With nearest codes a row whose scale
        in this chunk is far above its others gets the highest code, which may be far too low.
        """
        rest = scale.clamp_min(FLOOR).log2() - self.row_logs
        chunk = rest[_alive(scale)].median().half()
        step = self.step.float()
        if not least:
            codes = ((rest - chunk.float()) / step + 7.5).round()
        else:
            chunk = torch.maximum(chunk, (rest.max() - 7.5 * step + HALF_ERROR).half())
            codes = ((rest - chunk.float()) / step + 7.5).ceil()
        return codes.clamp(0, 15).to(torch.uint8), chunk

    def decode(self, codes: Tensor, chunk: Tensor) -> Tensor:
        """Scales [rows] of one chunk."""
        return torch.exp2(self.row_logs + chunk.float() + self.step.float() * (codes.float() - 7.5))


def _alive(scales: Tensor) -> Tensor:
    """Where a scale is one, and not that of zeros; all of them if there is nothing but zeros."""
    return scales.clamp_min(FLOOR) >= DEAD * scales.max().clamp_min(FLOOR)


def _snap(rest: Tensor, step: float) -> Tensor:
    return ((rest / step + 7.5).round().clamp(0, 15) - 7.5) * step


def encode_offset(offset: Tensor, levels: int) -> Tensor:
    """Offset in units of the scale -> int8, in 256ths of the levels' range."""
    return (offset * (256 / levels)).round().clamp(-128, 127).to(torch.int8)


def decode_offset(packed: Tensor, levels: int) -> Tensor:
    return packed.float() * (levels / 256)
