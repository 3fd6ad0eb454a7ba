"""What both ways of recovery share: how gains and norms are trained, and how far a model is from the original."""

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from windquant import compute, decoder, streaming
from windquant.flow import Flow

BATCH = 4  # windows at a time where a divergence is measured


@dataclass(frozen=True)
class Tuning:
    """Adam on log-gains and norms, one window a step."""

    steps: int
    gain_rate: float
    norm_rate: float
    warmup: int  # steps

    def optimizer(self, gains: Iterable[nn.Parameter], norms: Iterable[nn.Parameter]) -> torch.optim.Adam:
        groups = [{"params": list(gains), "lr": self.gain_rate}, {"params": list(norms), "lr": self.norm_rate}]
        return torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99))

    def set_rates(self, index: int, optimizer: torch.optim.Adam) -> None:
        """For step `index`."""
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("full", group["lr"]) * schedule(index, self.steps, self.warmup)


def schedule(index: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine to zero."""
    return min(1.0, (index + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * index / steps))


def norms_of(module: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """The weights of all norms by parameter name."""
    return {
        f"{prefix}{name}.{key}": value
        for name, child in module.named_modules()
        if "norm" in type(child).__name__.lower()
        for key, value in child.named_parameters(recurse=False)
    }


def drawn(windows: Tensor, steps: int, seed: int) -> Tensor:
    """The windows [n, length] in the order in which `steps` take them, one each; the last is followed by the first."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[: max(steps, 1)]]


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits [..., vocabulary], mean over the positions, nats."""
    return F.kl_div(
        F.log_softmax(student.float().flatten(0, -2), -1),
        F.log_softmax(teacher.float().flatten(0, -2), -1),
        log_target=True,
        reduction="batchmean",
    )


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module, ids: Tensor) -> float:
    """Mean KL divergence of the student from the teacher on ids [n, length], layer by layer."""
    scratch = Path(tempfile.gettempdir())
    found, exact = (Flow(model, ids, BATCH, scratch) for model in (student, teacher))
    for (index, layer), (_, original) in zip(streaming.walk(student), streaming.walk(teacher), strict=True):
        found.through(layer, index)
        exact.through(original, index)
    return divergence_of(student, found, teacher, exact, ids)


@torch.no_grad()
def divergence_of(student: nn.Module, found: Flow, teacher: nn.Module, exact: Flow, ids: Tensor) -> float:
    """The same from the hidden states behind the last layers, in equal batches."""
    total = 0.0
    for part, mine, theirs in zip(ids.split(found.batch), found.batches(), exact.batches(), strict=True):
        part = part.to(mine.device)
        with compute.autocast():
            logits = decoder.head(student, part, mine), decoder.head(teacher, part, theirs)
        for pair in zip(*logits, strict=True):  # a window at a time: a vocabulary is large
            total += kl_divergence(*pair).item()
    return total / len(ids)
