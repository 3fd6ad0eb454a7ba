"""Measure what a plan really costs: the loss of a stand-in for the quantized model on the reward split.

Quantizing a model anew for every candidate would take a minute each. The error of a good quantizer looks like the
test channel of rate-distortion theory instead: with relative error q a chunk c of row r becomes

    w' = (1 - q) w + sqrt(q (1 - q)) rms_rc n,      n ~ N(0, 1), drawn once for all plans

where q is the bank's error of the action relative to losing the chunk. Every plan meets the same noise, once as drawn
and once with the opposite sign: what the loss changes along the noise cancels, and its curvature, which is what a plan
is about, remains. A search that takes the best of many plans is misled by what the stand-in has wrong, so its winner is
confirmed on other text, and as a really quantized model.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from windquant import calibration, compute, models
from windquant.bank import Bank
from windquant.feedback import column_order
from windquant.plan import Plan
from windquant.quantize import layouts_of, quantize_model
from windquant.statistics import Statistics
from windquant.units import protected_count

CONFIRM_SAMPLES = 16  # calibration samples for quantizing a plan that is to be confirmed


class LossMeter:
    """Holds the original weights and one draw of noise; about 4 bytes per weight beside the model."""

    def __init__(
        self, model: Path, calibration_set: Path, statistics: Path, bank: Bank, tokens: int = 2048, seed: int = 0
    ) -> None:
        """`tokens` of the reward split are for `loss_gap`, the rest for `confirm`."""
        dtype = torch.bfloat16 if compute.native_bfloat16() else torch.float32
        self.bank, self.folder = bank, model
        self.model = compute.move(models.load(model, dtype))
        texts = calibration.load(calibration_set)
        self.samples = texts.calibration[:CONFIRM_SAMPLES].long()
        self.statistics = Statistics.load(statistics)
        reward = texts.reward.long().to(compute.device())
        windows = min(max(1, tokens // reward.shape[1]), len(reward))
        self.ids, self.other = reward[:windows], reward[windows:] if windows < len(reward) else reward
        self.seed = seed
        self._prepare()
        self.original, self.other_original = self._loss(self.model, self.ids), self._loss(self.model, self.other)

    def _prepare(self) -> None:
        statistics = self.statistics
        units = self.bank.units
        self.relative = np.empty_like(self.bank.errors)  # [U, A], in [0, 1]
        # by linear: its parameter, the original weight, noise of the same size, the unit of every column
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        generator = torch.Generator().manual_seed(self.seed)
        for index, linear in enumerate(self.bank.linears):
            parameter = self.model.get_parameter(f"{linear.name}.weight")
            weight = parameter.detach().float().cpu()
            energy = statistics.energy[linear.group]
            protected = protected_count(linear.columns, units.protected)
            order = column_order(energy, units.order, units.chunk, protected)
            place = protected
            noise = torch.randn(weight.shape, generator=generator)
            unit_of = torch.full((linear.columns,), -1)
            for unit in np.flatnonzero(self.bank.linear == index):
                columns = order[place : place + self.bank.width[unit]]
                place += len(columns)
                unit_of[columns] = int(unit)
                noise[:, columns] *= weight[:, columns].square().mean(1, keepdim=True).sqrt()
                lost = 0.5 * (statistics.fisher[linear.name] @ weight[:, columns].square() @ energy[columns]).item()
                self.relative[unit] = np.clip(self.bank.errors[unit] / max(lost, 1e-30), 0, 1)
            device, dtype = parameter.device, parameter.dtype
            self.parts.append((parameter, parameter.detach().clone(), noise.to(device, dtype), unit_of.to(device)))

    @torch.no_grad()
    def loss_gap(self, choice: NDArray[np.int64]) -> float:
        """Loss of the plan `choice` [U] above the original's, nats per token; inf where it is not finite."""
        chosen = self.relative[np.arange(len(choice)), choice]
        relative = torch.from_numpy(np.append(chosen, 0.0)).float()  # the last one: protected columns, index -1
        losses = []
        for sign in (1, -1):
            for parameter, weight, noise, unit_of in self.parts:
                q = relative.to(unit_of.device)[unit_of]
                keep, shake = (1 - q).to(weight.dtype), (q * (1 - q)).sqrt().to(weight.dtype)
                torch.addcmul(weight * keep, noise, sign * shake, out=parameter)
            losses.append(self._loss(self.model, self.ids))
        gap = sum(losses) / 2 - self.original
        return gap if np.isfinite(gap) else float("inf")

    def confirm(self, plans: list[Plan], update: Callable[[int], object]) -> list[float]:
        """Loss gaps of plans on the text that `loss_gap` never sees, after really quantizing the model.

        `update(1)` is called after every linear of every plan.
        """
        gaps = []
        for plan in plans:
            model = compute.move(models.load(self.folder))
            layouts = layouts_of(plan, self.statistics.linears)
            quantize_model(model, layouts, plan.units.order, self.statistics, self.samples, CONFIRM_SAMPLES, update)
            with compute.autocast():
                gaps.append(self._loss(model, self.other) - self.other_original)
        return gaps

    @staticmethod
    @torch.no_grad()
    def _loss(model: nn.Module, ids: Tensor) -> float:
        total = 0.0
        for part in ids.split(8):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1]
            for some, targets in zip(logits, part[:, 1:], strict=True):
                total += F.cross_entropy(some.float(), targets, reduction="sum").item()
        return total / ids[:, 1:].numel()
