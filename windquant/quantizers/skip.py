"""Skip: the unit keeps its original precision, two bytes a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from windquant.quantizers.base import Coded, Fit
from windquant.storage import Pattern


@dataclass(frozen=True)
class Skip:
    """Codes are the two bytes of each weight, so that a column has twice as many codes as rows."""

    dtype: torch.dtype = torch.float16  # of the original weights
    name: str = "skip"
    bits: float = 16
    pattern: Pattern = (8, 8)
    rotated: bool = False
    has_scale: bool = False
    has_offset: bool = False
    covers: bool = False

    def fit(self, chunk: Tensor, energy: Tensor) -> Fit:
        return Fit(torch.ones(len(chunk)))

    def encode(self, columns: Tensor, fit: Fit, importance: Tensor, feedback: Tensor) -> Coded:
        # A clone has the strides of its shape; `contiguous` may leave others along a dimension of one.
        kept = columns.to(self.dtype).clone(memory_format=torch.contiguous_format)
        return Coded(kept.view(torch.uint8), kept.float(), torch.zeros_like(columns))

    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        return codes.contiguous().view(self.dtype).float()

    def unscaled(self, packed: Tensor, rows: int) -> Tensor:
        codes = packed.clone(memory_format=torch.contiguous_format)  # they may begin at an odd byte
        return codes.view(self.dtype).T.float()

    def error(self, chunk: Tensor, energy: Tensor) -> Tensor:
        return torch.zeros(len(chunk))
