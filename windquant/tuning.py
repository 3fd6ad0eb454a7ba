"""How recovery trains gains and norms: the optimizer, its rates, and the order of the text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
