"""What every treatment is: the interface between widths and bytes.

All tensors are float32 on the CPU unless said otherwise. A chunk is [rows, width] in column order, already rotated
where the treatment asks for it; `columns` is its transpose, [width, rows], because codes run down the rows.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from windquant.storage import Pattern


@dataclass(frozen=True)
class Fit:
    """Parameters of one chunk, one value per row."""

    scale: Tensor  # [rows] > 0
    offset: Tensor | None = None  # [rows], in units of the scale


@dataclass(frozen=True)
class Coded:
    """One quantized chunk."""

    codes: Tensor  # uint8 [width, rows]
    decoded: Tensor  # [width, rows], the weights that the codes stand for
    errors: Tensor  # [width, rows], (w - q) / U_ii: what the columns behind the chunk are corrected by


class Treatment(Protocol):
    """How a width is reached. One instance per action; the registry is `windquant.quantizers.actions`."""

    @property
    def name(self) -> str:
        """Of the action, e.g. "trellis-2"."""

    @property
    def bits(self) -> float:
        """Nominal bits a weight."""

    @property
    def pattern(self) -> Pattern:
        """Of the codes in storage."""

    @property
    def rotated(self) -> bool:
        """Whether the chunk is rotated before it is fitted."""

    @property
    def has_scale(self) -> bool:
        """Whether every row has a scale."""

    @property
    def has_offset(self) -> bool:
        """Whether every row has an offset."""

    @property
    def covers(self) -> bool:
        """Whether the scale is that of the largest weight, which a smaller one would cut off."""

    def fit(self, chunk: Tensor, energy: Tensor) -> Fit:
        """Scale and offset of every row that minimize the error weighted by the channels' energy [width]."""

    def encode(self, columns: Tensor, fit: Fit, importance: Tensor, feedback: Tensor) -> Coded:
        """Quantize with error feedback inside the chunk.

        columns [width, rows] is overwritten; importance [rows] weighs each row's squared error; feedback is the upper
        triangular U [width, width] of the chunk, H^-1 = U^T U.
        """

    def decode(self, codes: Tensor, fit: Fit) -> Tensor:
        """Codes uint8 [width, rows] -> weights [width, rows]: (level + offset) scale."""

    def unscaled(self, packed: Tensor, rows: int) -> Tensor:
        """Packed codes uint8 [columns, bytes], on any device -> float32 [rows, columns], before offset and scale."""

    def error(self, chunk: Tensor, energy: Tensor) -> Tensor:
        """Expected squared error of every row [rows], weighted by the channels' energy [width]."""
