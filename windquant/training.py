"""A tuning on its way: parameters, Adam's moments, the curve, and the best state so far; it survives a kill."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from windquant import atomic, tensor_file
from windquant.tuning import Tuning

SAVE_EVERY = 20  # steps between two training checkpoints
RECENT = 20  # steps whose mean divergence tells how the tuning goes
DIVERGED = 1.5  # times the lowest such mean: the tuning diverges


class Training:
    """Goes on from the last training checkpoint in `folder`, if one is there."""

    def __init__(
        self, tuning: Tuning, gains: Mapping[str, nn.Parameter], norms: Mapping[str, nn.Parameter], folder: Path
    ) -> None:
        """gains, norms: by name; they are changed in place."""
        self.tuning, self.file = tuning, folder / "state.safetensors"
        self.parameters = {f"gain:{name}": value for name, value in gains.items()}
        self.parameters |= {f"norm:{name}": value for name, value in norms.items()}
        self.optimizer = tuning.optimizer(gains.values(), norms.values())
        self.curve: list[float] = []  # divergence of every finished step's window, before that step, in nats per token
        self.lowest = math.inf  # mean of RECENT steps in a row
        self.best = self._copies()  # the state at the beginning of these
        self._resume()
        self.latest = self._copies()

    def begin(self) -> None:
        """Rates and gradients for the next step."""
        self.tuning.set_rates(len(self.curve), self.optimizer)
        self.optimizer.zero_grad()

    def diverges(self, loss: float) -> bool:
        """Whether the tuning should not go on after this divergence."""
        return not math.isfinite(loss) or _recent([*self.curve, loss]) > DIVERGED * self.lowest

    def step(self, loss: float) -> None:
        """Follow the gradients of a divergence."""
        self.optimizer.step()
        self.curve.append(loss)
        if len(self.curve) % RECENT == 0:
            if (recent := _recent(self.curve)) < self.lowest:
                self.best, self.lowest = self.latest, recent
            self.latest = self._copies()
        if len(self.curve) % SAVE_EVERY == 0:
            self._save()

    def restore_best(self) -> None:
        for name, value in self.parameters.items():
            value.data.copy_(self.best[name])

    def _copies(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def _save(self) -> None:
        tensors = {f"value:{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"best:{name}": value for name, value in self.best.items()}
        for name, value in self.parameters.items():
            tensors |= {f"{key}:{name}": entry for key, entry in self.optimizer.state[value].items()}
        with atomic.output(self.file) as path:
            tensor_file.save(path, tensors, "progress", {"curve": self.curve, "lowest": self.lowest})

    def _resume(self) -> None:
        try:
            tensors, progress = tensor_file.load(self.file, "progress")
        except tensor_file.UNREADABLE:  # none, or damaged on the disk: start over
            return
        self.curve, self.lowest = progress["curve"], progress["lowest"]
        for name, value in self.parameters.items():
            value.data.copy_(tensors[f"value:{name}"])
            self.best[name].copy_(tensors[f"best:{name}"])
            if f"step:{name}" in tensors:  # no text reaches the norms of a tower for pictures
                moments = {key: tensors[f"{key}:{name}"].to(value.device) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[value] = {"step": tensors[f"step:{name}"], **moments}  # Adam counts on the CPU


def _recent(curve: list[float]) -> float:
    """Mean divergence of the latest steps."""
    latest = curve[-RECENT:]
    return sum(latest) / len(latest)
