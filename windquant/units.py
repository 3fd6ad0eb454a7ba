"""Geometry of the decision units: which columns of which linear form a chunk, and what they are called.

A *unit* (column chunk) is `chunk` consecutive input channels, in column order, of one linear weight, all output
rows. Protected columns are taken out first; the last chunk of a weight may be narrower.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One quantized linear weight of shape [rows, columns] inside a decoder layer."""

    name: str  # dotted module name, e.g. "model.layers.3.self_attn.q_proj"
    kind: str  # last part of the name, e.g. "q_proj"
    layer: int  # index of its decoder layer
    group: str  # name shared by the linears that read the same input; they share one column order
    rows: int  # output features
    columns: int  # input features

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def protected_count(columns: int, fraction: float) -> int:
    """Number of protected columns: the fraction, rounded to the nearest whole column."""
    return min(columns, round(columns * fraction))


def chunk_widths(columns: int, protected: int, chunk: int) -> list[int]:
    """Widths of a weight's chunks in column order; only the last one may be narrower than `chunk`."""
    rest = columns - protected
    full, last = divmod(rest, chunk)
    return [chunk] * full + ([last] if last else [])
