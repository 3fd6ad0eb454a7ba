"""The gains of a quantized linear: a factor exp(gain) per row and chunk, trained, then rounded into the scales' codes.

A scale is stored as four bits beside what rows and chunks share (scales.py); a gain that is a multiple of a code's step
moves the code and nothing else, so a checkpoint with other gains takes the same bytes.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from windquant.checkpoint.linear import PackedLinear
from windquant.packed import Layout
from windquant.scales import SCALE_BITS
from windquant.storage import pack, unpack


class _Scaled(torch.autograd.Function):
    """weight [rows, slots, chunk] * exp(gain [rows, slots]); keeps no more than the product for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor) -> Tensor:
        scaled = weight * gain.exp().to(weight.dtype)[..., None]
        ctx.save_for_backward(scaled)
        return scaled.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (scaled,) = ctx.saved_tensors
        # d weight exp(g) / d g = weight exp(g)
        return None, (gradients[0].view_as(scaled) * scaled).sum(-1, dtype=torch.float32)


class _Slotted(torch.autograd.Function):
    """x [..., columns] -> [..., slots * chunk]; the gradient goes the way back without adding anything up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        if len(slots) > x.shape[-1]:  # places that no column takes read a zero
            x = F.pad(x, (0, 1))
        return _columns(x, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _columns(gradients[0], ctx.saved_tensors[0]), None, None


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """x[..., columns]; for BF16 on a CPU, index_select takes almost three times as long as gather."""
    return x.gather(-1, columns.expand(*x.shape[:-1], -1))


class GainLinear(nn.Module):
    """A decoded linear with one trainable log-gain per row and chunk.

    Columns stand in slots of `chunk` columns, in column order, so that gains and their gradients need no gather; the
    protected columns take slots of their own, whose gain stays zero, as that of skipped chunks does, and what is left
    of a slot holds zeros.
    """

    rounding = False  # whether to compute with the gains as they will be stored

    def __init__(
        self,
        layout: Layout,
        tensors: Mapping[str, Tensor],
        order: Tensor,
        weight: Tensor,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> None:
        """tensors: as stored; order: int64 [columns]; weight: decoded, [rows, columns]; dtype: to compute in."""
        super().__init__()
        rows, columns, chunk = layout.linear.rows, layout.linear.columns, layout.format.chunk
        self.in_features, self.out_features = columns, rows
        parts = list(order.cpu().split([layout.protected, *layout.widths]))
        parts = [*parts[0].split(chunk), *parts[1:]] if layout.protected else parts[1:]
        slots = torch.stack([F.pad(part, (0, chunk - len(part)), value=columns) for part in parts])
        weight = F.pad(weight.float(), (0, 1))[:, slots].to(dtype)
        self.fixed = len(slots) - len(layout.widths)  # slots of protected columns
        self.register_buffer("weight", weight)
        self.register_buffer("slots", slots.flatten().to(weight.device))  # column at each place; `columns` is empty
        self.register_buffer("place", slots.flatten().argsort()[:columns].to(weight.device))  # of each column
        self.bias = bias
        scaled = torch.tensor([entry.has_scale for entry in layout.actions])
        self.register_buffer("scaled", scaled.float().to(weight.device))  # skipped chunks have no scale to tune
        codes = torch.zeros(rows, len(layout.widths))
        codes[:, _scaled(layout)] = _scale_codes(layout, tensors).T.cpu()
        self.register_buffer("codes", codes.to(weight.device))  # of the scales, [rows, chunks]
        self.register_buffer("step", _code_step(tensors).to(weight.device))
        self.gain = nn.Parameter(torch.zeros_like(codes, device=weight.device))

    @classmethod
    def of(cls, packed: PackedLinear, dtype: torch.dtype) -> "GainLinear":
        order = packed.get_buffer("column_order")
        return cls(packed.layout, packed.tensors, order, packed.weight, packed.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        gain: Tensor = self.gain
        if self.rounding:
            codes, step_size = self.get_buffer("codes"), self.get_buffer("step")
            stored = (_moved(codes, gain, step_size) - codes) * step_size
            gain = gain + (stored - gain).detach()  # straight through
        gain = F.pad(gain * self.get_buffer("scaled"), (self.fixed, 0))
        slotted = _Slotted.apply(x, self.slots, self.place)
        return F.linear(slotted, _Scaled.apply(self.weight, gain), self.bias)


def regain(layout: Layout, tensors: Mapping[str, Tensor], gain: Tensor) -> dict[str, Tensor]:
    """The stored tensors with log-gains [rows, chunks] rounded into the scales' codes."""
    result = dict(tensors)
    moved = _moved(_scale_codes(layout, tensors), gain[:, _scaled(layout)].T, _code_step(tensors)).to(torch.uint8)
    result["scales"] = pack(moved, (SCALE_BITS, SCALE_BITS)) if len(moved) else tensors["scales"]
    return result


def stored_gain(layout: Layout, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    """The log-gains [rows, chunks] that the codes of `after` make on `before`."""
    gain = torch.zeros(layout.linear.rows, len(layout.widths))
    change = _scale_codes(layout, after) - _scale_codes(layout, before)
    gain[:, _scaled(layout)] = change.T * _code_step(after)
    return gain


def _moved(codes: Tensor, gain: Tensor, step_size: Tensor) -> Tensor:
    """The codes of scales that are exp(gain) times as large."""
    return (codes + gain / step_size).round().clamp(0, 2**SCALE_BITS - 1)


def _code_step(tensors: Mapping[str, Tensor]) -> Tensor:
    """Log-gain of one step of the scales' codes."""
    return tensors["scale_grid"][1].float() * math.log(2)


def _scaled(layout: Layout) -> list[int]:
    """The chunks that have scales, in storage order."""
    return [chunk for chunk in layout.storage_order if layout.actions[chunk].has_scale]


def _scale_codes(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """float32 [chunks with scales, rows], in storage order."""
    return unpack(tensors["scales"], layout.linear.rows, (SCALE_BITS, SCALE_BITS)).float()
