"""Measured plans: each one costs seconds, so none is measured twice, not even after a kill."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from windquant.allocation.budget import Choice
from windquant.allocation.loss_model import LossModel
from windquant.allocation.settings import MeasureSettings
from windquant.bank import Bank

Measure = Callable[[Choice], float]
END = "."  # of a whole line of the record


@dataclass(frozen=True)
class Trial:
    """One measured plan."""

    choice: Choice
    target: float  # bits
    loss: float  # nats per token, inf where it is not finite
    source: str  # lagrangian, sampled, deterministic or evolution
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

    def known(self, choice: Choice) -> Trial | None:
        """The trial of a plan [U] that was measured before."""
        return next((trial for trial in self.done if np.array_equal(choice, trial.choice)), None)

    def run(self, choice: Choice, target: float, source: str) -> Trial:
        """Measure a plan [U] that was made for `target` bits, unless it was measured before."""
        if trial := self.known(choice):
            return trial
        predicted, corrected = self.model.bank.predicted_loss(choice), self.model.predict(choice)
        self.add(Trial(choice, target, self._loss(choice), source, predicted, corrected))
        return self.done[-1]

    def _loss(self, choice: Choice) -> float:
        name = hashlib.sha256(choice.astype("<i8").tobytes()).hexdigest()
        if self.record and self.record.exists():
            for words in map(str.split, self.record.open()):
                if (words[:2], words[3:]) == ([self.key, name], [END]):
                    return float(words[2])
        measured = float(self.measure(choice))
        measured = measured if np.isfinite(measured) else np.inf
        if self.record:
            with self.record.open("a") as file:
                # the first newline ends a line that a kill cut off, perhaps inside its number
                file.write(f"\n{self.key} {name} {measured!r} {END}\n")
        return measured


def identity(bank: Bank, seed: int, settings: MeasureSettings) -> str:
    """What a search depends on, as a digest."""
    return hashlib.sha256(json.dumps([bank.sha256, seed, asdict(settings)]).encode()).hexdigest()
