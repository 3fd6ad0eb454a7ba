"""Recover block by block, where original and quantized model do not fit into memory together.

For every decoder layer, on the inputs that the recovered layers before it hand on: one log-gain per row and chunk of
each linear and the layer's norms are trained by Adam to lower

    |q(x) - o(y)|^2 / |o(y)|^2        q: the quantized layer, o: the original one

with x the hidden states of the quantized model so far and y those of the original one (as in EfficientQAT's block-wise
phase, arXiv 2407.11062). Both models are streamed (streaming.py), so a pass takes the memory of two layers, the hidden
states of the training windows twice, and the moments of one layer's gains. Codes stay as they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from windquant import compute, decoder, streaming
from windquant.flow import Flow
from windquant.packed import Layout


@dataclass(frozen=True)
class Schedule:
    """How every block is trained."""

    epochs: int = 2  # passes over the windows
    gain_rate: float = 3e-3  # learning rate of the log-gains
    norm_rate: float = 1e-3  # learning rate of the norms
    batch: int = 4  # windows of a step


def distill(
    original: nn.Module,
    quantized: nn.Module,
    layouts: Mapping[str, Layout],
    orders: Callable[[str], Tensor],
    stored_gain: Callable[[str, Tensor], Tensor],
    windows: Tensor,
    schedule: Schedule,
    scratch: Path,
    update: Callable[[int], object],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-gains [rows, chunks] by linear and norm weights by parameter name, both float32 on the CPU.

    original, quantized: models of `streaming.load`, or in memory; they are left as they are. orders: the column order
    of a linear, int64 [columns] (`Packed.order`). stored_gain: what the checkpoint can store of a linear's log-gains;
    the next layer's inputs come from it. windows: token ids [n, length]. scratch: folder for hidden states.
    """
    prefix, _ = decoder.decoder_layers(quantized)
    exact = Flow(original, windows, schedule.batch, scratch)
    flow = Flow(quantized, windows, schedule.batch, scratch)
    gains: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for (index, teacher), (_, student) in zip(streaming.walk(original), streaming.walk(quantized), strict=True):
        exact.through(teacher, index)
        block = Block(student, f"{prefix}.{index}.", layouts, orders)
        train(block, index, flow, exact, schedule)
        for name, gain in block.gains.items():
            gain.data.copy_(stored_gain(name, gain.detach().cpu()))
            gains[name] = gain.detach().cpu()
        norms |= {name: norm.detach().float().cpu() for name, norm in block.norms.items()}
        flow.through(block, index)
        update(1)
    return gains, norms


class Block(nn.Module):
    """A quantized decoder layer whose weights are w_rc exp(gain_r,chunk(c)), and whose norms can be trained."""

    def __init__(
        self, layer: nn.Module, prefix: str, layouts: Mapping[str, Layout], orders: Callable[[str], Tensor]
    ) -> None:
        super().__init__()
        self.inner = [layer]  # in a list: not a part whose parameters are this module's
        self.prefix = prefix
        self.gains: dict[str, nn.Parameter] = {}
        self.chunk_of: dict[str, Tensor] = {}  # by linear: which gain a column has
        self.norms: dict[str, nn.Parameter] = {}
        self.weights = {f"{prefix}{name}": value for name, value in layer.named_parameters()}
        for name in self.weights:
            layout = layouts.get(name.removesuffix(".weight"))
            if layout is not None and name.endswith(".weight"):
                linear = name.removesuffix(".weight")
                device = self.weights[name].device
                self.gains[linear] = nn.Parameter(torch.zeros(layout.linear.rows, len(layout.widths), device=device))
                self.chunk_of[linear] = columns_of(layout, orders(linear)).to(device)
        for path, module in layer.named_modules():
            if "norm" in type(module).__name__.lower():
                for key, value in module.named_parameters(path, recurse=False):
                    self.norms[f"{prefix}{key}"] = nn.Parameter(value.detach().float().clone())

    def parameters_of_layer(self) -> dict[str, Tensor]:
        """The layer's parameters by their names inside the layer, with gains and trained norms."""
        result: dict[str, Tensor] = {name.removeprefix(self.prefix): norm for name, norm in self.norms.items()}
        for linear, gain in self.gains.items():
            # index 0, a column of zeros, is for protected columns and skipped chunks, which have no scale
            padded = torch.cat([gain.new_zeros(len(gain), 1), gain], 1)
            weight = self.weights[f"{linear}.weight"]
            factor = padded.exp().index_select(1, self.chunk_of[linear]).to(weight.dtype)
            result[f"{linear.removeprefix(self.prefix)}.weight"] = weight * factor
        return result

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        found: Tensor = functional_call(self.inner[0], self.parameters_of_layer(), args, kwargs)
        return found


def columns_of(layout: Layout, order: Tensor) -> Tensor:
    """For every column 1 + its chunk, or 0 where no scale can be tuned: int64 [columns]."""
    chunks = [chunk + 1 if entry.has_scale else 0 for chunk, entry in enumerate(layout.actions)]
    labels = torch.tensor([0, *chunks]).repeat_interleave(torch.tensor([layout.protected, *layout.widths]))
    result = torch.empty_like(order)
    result[order] = labels
    return result


def train(block: Block, index: int, flow: Flow, exact: Flow, schedule: Schedule) -> None:
    """Train the block's gains and norms on all windows; what does not lower the error on them is dropped."""
    groups = [
        {"params": list(block.gains.values()), "lr": schedule.gain_rate},
        {"params": list(block.norms.values()), "lr": schedule.norm_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    trained = [value for group in groups for value in group["params"]]
    start = [value.detach().clone() for value in trained]
    with torch.no_grad():
        before = sum(float(error) for error in errors(block, index, flow, exact))
    steps = schedule.epochs * len(flow.calls)
    done = 0
    for _ in range(schedule.epochs):
        for error in errors(block, index, flow, exact):
            for group, rate in zip(optimizer.param_groups, (schedule.gain_rate, schedule.norm_rate), strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done / steps))
            optimizer.zero_grad()
            torch.autograd.backward(error)
            optimizer.step()
            done += 1
    with torch.no_grad():
        after = sum(float(error) for error in errors(block, index, flow, exact))
        if not after < before:  # diverged, or nothing to gain: also where it is not a number
            for value, first in zip(trained, start, strict=True):
                value.copy_(first)


def errors(block: Block, index: int, flow: Flow, exact: Flow) -> Iterator[Tensor]:
    """The relative squared error of the block on every batch of windows."""
    for calls, x, target in zip(flow.calls, flow.batches(), exact.batches(), strict=True):
        with compute.autocast():
            out = decoder.run_layer(block, x, calls[index])
        yield (out.float() - target.float()).square().sum() / target.float().square().sum()
