"""Measured plans: each one costs seconds, so none is measured twice, not even after a kill."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from windquant.allocation.budget import Choice
from windquant.allocation.loss_model import LossModel

Measure = Callable[[Choice], float]


@dataclass(frozen=True)
class Trial:
    """One measured plan."""

    choice: Choice
    loss: float  # nats per token, inf where it is not finite
    source: str  # lagrangian, sampled or deterministic
    predicted: float  # by the bank
    corrected: float  # by the loss model as it was before the measurement


class Trials:
    """At most `allowed` plans, in the order of their measurement; `model` learns from every one.

    `record` is a file of all measurements, `key` says in it whose they are.
    """

    def __init__(self, model: LossModel, measure: Measure, allowed: int, record: Path | None, key: str) -> None:
        self.model, self.measure, self.allowed = model, measure, allowed
        self.record, self.key = record, key
        self.done: list[Trial] = []

    @property
    def left(self) -> int:
        return self.allowed - len(self.done)

    def add(self, trial: Trial) -> None:
        self.done.append(trial)
        self.model.add(trial.choice, trial.loss)

    def run(self, choice: Choice, source: str) -> Trial | None:
        """Measure a plan [U]; None if it was measured before."""
        if any(np.array_equal(choice, trial.choice) for trial in self.done):
            return None
        predicted, corrected = self.model.bank.predicted_loss(choice), self.model.predict(choice)
        self.add(Trial(choice, self._loss(choice), source, predicted, corrected))
        return self.done[-1]

    def _loss(self, choice: Choice) -> float:
        name = hashlib.sha256(choice.astype("<i8").tobytes()).hexdigest()
        if self.record and self.record.exists():
            for key, plan, loss in (words for line in self.record.open() if len(words := line.split()) == 3):
                if (key, plan) == (self.key, name):
                    return float(loss)
        measured = float(self.measure(choice))
        measured = measured if np.isfinite(measured) else np.inf
        if self.record:
            with self.record.open("a") as file:
                file.write(f"\n{self.key} {name} {measured!r}\n")  # the first newline ends a line that a kill cut off
        return measured
