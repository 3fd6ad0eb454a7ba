"""Measure what a plan really costs: the loss of a stand-in for the quantized model on the reward split.

Quantizing a model anew for every candidate would take a minute each. The error of a good quantizer looks like the
test channel of rate-distortion theory instead: with relative error q a chunk c of row r becomes

    w' = (1 - q) w + sqrt(q (1 - q)) rms_rc n,      n ~ N(0, 1), drawn once for all plans

where q is the bank's error of the action relative to losing the chunk. Every plan meets the same noise, once as drawn
and once with the opposite sign: what the loss changes along the noise cancels, and its curvature, which is what a plan
is about, remains. A search that takes the best of many plans is misled by what the stand-in has wrong, so its winner is
compared with the Lagrangian plan as really quantized models (confirmation.py).

A plan is one walk through the decoder layers, with both signs of the noise in it. Where model and noise do not fit into
memory, every walk reads the layers from the files and draws their noise again: the same numbers, in a layer's memory.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from windquant import calibration, compute, decoder, memory, models, streaming
from windquant.bank import Bank
from windquant.errors import WindquantError
from windquant.feedback import column_order
from windquant.flow import Flow
from windquant.statistics import Statistics
from windquant.units import protected_count

T = TypeVar("T")
BATCH = 8  # windows at a time; fewer once a GPU has had no room for them
SIGNS = (1, -1)


class LossMeter:
    """Measures plans on the original model and one draw of noise, in memory whole or layer by layer."""

    def __init__(
        self,
        model: Path,
        calibration_set: Path,
        statistics: Path,
        bank: Bank,
        tokens: int = 2048,
        seed: int = 0,
        whole: bool | None = None,
    ) -> None:
        """tokens: of the reward split, which plans are measured on.

        whole: whether model and noise stay in memory; None: where they fit (memory.py). The losses are the same.
        """
        dtype = torch.bfloat16 if compute.native_bfloat16() else torch.float32
        self.bank = bank
        if whole is None:
            whole = memory.fits(memory.SEARCH * dtype.itemsize * streaming.open_source(model).parameters)
        if whole:
            self.model = compute.move(models.load(model, dtype))
        else:
            self.model = streaming.load(model, dtype_name=str(dtype).removeprefix("torch."))
        self.device = decoder.device_of(self.model)
        texts = calibration.load(calibration_set)
        self.statistics = Statistics.load(statistics)
        self.statistics.check(streaming.open_source(model))
        if bank.linears != self.statistics.linears:
            raise WindquantError("--bank: it is not of these statistics; make it again from them")
        self.ids = texts.measured_and_unseen(tokens)[0].to(self.device)
        self.noise = Noise(seed, self.device, whole)
        self.unit_of = [self._units(index) for index in range(len(bank.linears))]
        self.batch = BATCH
        self.prepared = False

    def _fitting(self, measure: Callable[[], T]) -> T:
        """`measure()`, with as many windows at a time as there is room for."""

        def measured(batch: int) -> T:
            self.batch = batch
            return measure()

        return compute.with_smaller_batches(self.batch, measured)

    def prepare(self) -> None:
        """What losses are compared with; a search that goes on and finds its measurements recorded does without."""
        if not self.prepared:
            self._fitting(self._prepare)
        self.prepared = True

    @torch.no_grad()
    def _prepare(self) -> None:
        """The original's loss, every action's relative error, and the noise of every linear, in one walk."""
        self.relative = np.empty_like(self.bank.errors)  # [U, A], in [0, 1]
        flow = self._flow()
        for place, layer in streaming.walk(self.model):
            flow.through(layer, place)
            for index, parameter in self.parameters(place):
                weight = parameter.detach()
                linear = self.bank.linears[index]
                energy = self.statistics.energy[linear.group].to(self.device)
                fisher = self.statistics.fisher[linear.name].to(self.device)
                for unit, columns in units(self.unit_of[index]):
                    lost = 0.5 * (fisher @ weight[:, columns].float().square() @ energy[columns]).item()
                    self.relative[unit] = np.clip(self.bank.errors[unit] / max(lost, 1e-30), 0, 1)
                self.noise.of(index, weight, self.unit_of[index])
        self.original = self._loss(flow)

    def _units(self, index: int) -> Tensor:
        """The unit of every column of a linear, -1 for protected ones: int64 [columns]."""
        linear, cut = self.bank.linears[index], self.bank.units
        protected = protected_count(linear.columns, cut.protected)
        order = column_order(self.statistics.energy[linear.group], cut.order, cut.chunk, protected)
        own = np.flatnonzero(self.bank.linear == index)
        unit_of = torch.full((linear.columns,), -1)
        unit_of[order[protected:]] = torch.from_numpy(np.repeat(own, self.bank.width[own]))
        return unit_of.to(self.device)

    def parameters(self, layer: int) -> list[tuple[int, nn.Parameter]]:
        """The linears of a decoder layer that is lent: place in the bank, and weight."""
        linears = enumerate(self.bank.linears)
        return [(i, self.model.get_parameter(f"{entry.name}.weight")) for i, entry in linears if entry.layer == layer]

    def loss_gap(self, choice: NDArray[np.int64]) -> float:
        """Loss of the plan `choice` [U] above the original's, nats per token; inf where it is not finite."""
        self.prepare()
        chosen = self.relative[np.arange(len(choice)), choice]
        relative = torch.from_numpy(np.append(chosen, 0.0)).float().to(self.device)  # the last: protected, index -1
        gap = self._fitting(lambda: self._stand_in_loss(relative)) - self.original
        return gap if np.isfinite(gap) else float("inf")

    @torch.no_grad()
    def _stand_in_loss(self, relative: Tensor) -> float:
        flows = [self._flow() for _ in SIGNS]
        for place, layer in streaming.walk(self.model):
            for flow, _ in zip(flows, self.stand_ins(place, relative), strict=True):
                flow.through(layer, place)
        return sum(self._loss(flow) for flow in flows) / len(SIGNS)

    def stand_ins(self, layer: int, relative: Tensor) -> Iterator[int]:
        """Put the stand-in's weights into a layer, for one sign after the other, and at last the original ones.

        relative: float32 [U + 1], the errors of a plan's actions; the last is that of protected columns.
        """
        parts = []
        for index, parameter in self.parameters(layer):
            weight, unit_of = parameter.detach(), self.unit_of[index]
            q = relative[unit_of]
            keep, shake = (1 - q).to(weight.dtype), (q * (1 - q)).sqrt().to(weight.dtype)
            parts.append((parameter, weight, self.noise.of(index, weight, unit_of), keep, shake))
        try:
            for sign in SIGNS:
                for parameter, weight, noise, keep, shake in parts:
                    parameter.data = (weight * keep).addcmul_(noise, sign * shake)
                yield sign
        finally:
            for parameter, weight, *_ in parts:
                parameter.data = weight

    def _flow(self) -> Flow:
        return Flow(self.model, self.ids, self.batch, Path(tempfile.gettempdir()), nullcontext)

    def _loss(self, flow: Flow) -> float:
        """Mean loss of the hidden states behind the last layer, nats per token."""
        total = 0.0
        for part, hidden in zip(self.ids.split(self.batch), flow.batches(), strict=True):
            logits = decoder.head(self.model, part, hidden)[:, :-1]
            for some, targets in zip(logits, part[:, 1:], strict=True):
                total += F.cross_entropy(some.float(), targets, reduction="sum").item()
        return total / self.ids[:, 1:].numel()


class Noise:
    """A standard normal number for every weight, times the root mean square of its row and chunk.

    Drawn once for the linears in their order, and kept or, from the generator's state at each, drawn again.
    """

    def __init__(self, seed: int, device: torch.device, keep: bool) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.keep = keep
        self.kept: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}

    def of(self, index: int, weight: Tensor, unit_of: Tensor) -> Tensor:
        """Of linear `index`, in the type of its weight [rows, columns]; for the first time in the linears' order."""
        if index in self.kept:
            return self.kept[index]
        self.generator.set_state(self.states.setdefault(index, self.generator.get_state()))
        noise = torch.randn(weight.shape, generator=self.generator, device=weight.device)
        for _, columns in units(unit_of):
            noise[:, columns] *= weight[:, columns].float().square().mean(1, keepdim=True).sqrt()
        noise = noise.to(weight.dtype)
        if self.keep:
            self.kept[index] = noise
        return noise


def units(unit_of: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The units among the columns of a linear, and the columns of each."""
    for unit in unit_of.unique().tolist():
        if unit >= 0:
            yield unit, (unit_of == unit).nonzero().flatten()
