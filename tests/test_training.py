"""The training loop: its best state, its training checkpoints and its schedule."""

import math
from pathlib import Path

import pytest
import torch

from windquant import training
from windquant.tuning import Tuning, schedule


def test_a_damaged_training_checkpoint_starts_over(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"\xff" * 100)
    value = torch.nn.Parameter(torch.ones(2))
    found = training.Training(Tuning(10, 0.1, 0.1, 1), {}, {"a": value}, tmp_path)
    assert (found.curve, found.lowest) == ([], math.inf)
    assert value.tolist() == [1, 1]


def test_an_interrupted_training_knows_its_best_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    monkeypatch.setattr(training, "RECENT", 2)
    losses = [3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.4, 1.4, 1.3, 1.3]

    def trained(folder: Path, *until: int) -> training.Training:
        folder.mkdir()
        for steps in until:
            value = torch.nn.Parameter(torch.ones(2))
            found = training.Training(Tuning(10, 0.1, 0.1, 1), {}, {"a": value}, folder)
            while len(found.curve) < steps:
                found.begin()
                value.grad = value.detach().clone()
                found.step(losses[len(found.curve)])
        return found

    whole, parts = trained(tmp_path / "whole", 10), trained(tmp_path / "parts", 9, 10)
    for one in (whole, parts):
        assert one.curve == losses
        assert one.lowest == 1.0
        assert not one.diverges(1.5)
        assert one.diverges(1.8)
        assert one.diverges(math.nan)
        last = one.parameters["norm:a"].clone()
        one.restore_best()
        assert (one.parameters["norm:a"] > last).all(), "the state before the fifth step"
    assert torch.equal(whole.parameters["norm:a"], parts.parameters["norm:a"])


def test_schedule_warms_up_and_falls_to_zero() -> None:
    rates = [schedule(index, 100, 5) for index in range(100)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[0] == pytest.approx(0.2)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert max(rates) > 0.99
    assert schedule(0, 1, 0) == 1


def test_parameters_that_nothing_reaches_do_not_stop_a_resumption(tmp_path: Path) -> None:
    """The norms of a tower for pictures, say."""

    def training_of(steps: int) -> training.Training:
        used, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        found = training.Training(Tuning(40, 0.1, 0.1, 1), {}, {"used": used, "idle": idle}, tmp_path)
        while len(found.curve) < steps:
            found.begin()
            used.grad = torch.ones(2)
            found.step(1.0)
        return found

    first, resumed = training_of(training.SAVE_EVERY), training_of(0)
    assert len(resumed.curve) == training.SAVE_EVERY
    for name, value in first.parameters.items():
        assert torch.equal(resumed.parameters[name], value)
    assert (first.parameters["norm:idle"] == 1).all()
