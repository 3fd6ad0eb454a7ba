"""The loss model learns from measurements where the bank's errors are wrong."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from windquant.allocation import lagrangian
from windquant.allocation.features import corrections, unit_features
from windquant.allocation.loss_model import LossModel
from windquant.allocation.trials import Trials
from windquant.bank import Bank


@pytest.fixture(scope="module")
def bank(make_bank: Callable[..., Bank]) -> Bank:
    return make_bank(layers=8)


def plan(model: LossModel, weights: np.ndarray) -> np.ndarray:
    corrected = dataclasses.replace(model.bank, errors=model.bank.errors * model.multipliers(weights))
    return lagrangian.allocate(corrected, 2.0)


def test_without_measurements_the_errors_are_the_banks(bank: Bank) -> None:
    model = LossModel(bank)
    np.testing.assert_array_equal(model.multipliers(model.weights), 1)
    several = model.multipliers(np.zeros((3, model.size)))
    assert several.shape == (3, *bank.errors.shape)


def test_measurements_teach_the_hidden_multipliers(bank: Bank) -> None:
    """Of a loss that the model can express, 40 measurements leave a good plan and a good forecast."""
    truth = np.random.default_rng(1).normal(0, 0.8, LossModel(bank).size) * 1.0
    truth[-len(bank.actions) :] *= 0.2
    model, random = LossModel(bank), np.random.default_rng(0)
    true_errors = bank.errors * model.multipliers(truth)

    def measure(choice: np.ndarray) -> float:
        return 1.3 * float(true_errors[np.arange(len(choice)), choice].sum()) ** 0.7

    first = measure(lagrangian.allocate(bank, 2.0))
    model.add(lagrangian.allocate(bank, 2.0), first)
    for _ in range(39):
        choice = plan(model, model.sample(random))
        model.add(choice, measure(choice))
    best = measure(lagrangian.allocate(dataclasses.replace(bank, errors=true_errors), 2.0))
    found = plan(model, model.weights)
    assert measure(found) - best < 0.1 * (first - best)
    assert model.predict(found) == pytest.approx(measure(found), rel=0.01)


def test_the_posterior_narrows(bank: Bank, hidden_loss: Callable[..., Callable[[np.ndarray], float]]) -> None:
    model, random, measure = LossModel(bank), np.random.default_rng(0), hidden_loss(bank)
    before = np.std([model.sample(random) for _ in range(200)], axis=0)
    for _ in range(10):
        choice = plan(model, model.sample(random))
        model.add(choice, measure(choice))
    after = np.std([model.sample(random) for _ in range(200)], axis=0)
    assert (after < 1.3 * before).all()
    assert after.mean() < 0.9 * before.mean()


@pytest.mark.parametrize("losses", [[np.inf], [np.nan, 1.0], [0.0, 0.1], [-0.1, 0.2], [1.0, -0.1, np.inf, 0.9]])
def test_odd_losses_do_no_harm(bank: Bank, losses: list[float]) -> None:
    model = LossModel(bank)
    random = np.random.default_rng(0)
    for loss in losses:
        model.add(random.integers(0, 4, len(bank.linear)), loss)
    assert np.isfinite(model.weights).all()
    assert np.isfinite(model.sample(random)).all()


def test_features_are_finite_and_of_order_one(bank: Bank, make_bank: Callable[..., Bank]) -> None:
    single = make_bank(layers=1, hidden=16, inner=16, key=16, chunk=64)
    for some in (bank, single):
        names, phi = corrections(some)
        assert phi.shape == (len(some.linear), len(names))
        features, seen = unit_features(some)
        assert len(features) == len(set(features)) == seen.shape[1]
        for values in (phi, seen):
            assert np.isfinite(values).all()
            assert abs(values).max() <= 3


def test_a_plan_without_errors_is_predicted_to_lose_nothing_and_teaches_nothing(bank: Bank) -> None:
    free = dataclasses.replace(bank, errors=np.where(bank.errors == bank.errors.min(1, keepdims=True), 0, bank.errors))
    best, cheap = free.errors.argmin(1), lagrangian.allocate(free, 2.0)
    model, other = LossModel(free), LossModel(free)
    assert model.predict(best) == 0
    for each in (model, other):
        each.add(cheap, 0.7)
    model.add(best, 1e-4)
    np.testing.assert_allclose(model.weights, other.weights, rtol=1e-3)  # but for where the solver stops
    assert np.isfinite(model.predict(cheap))


def test_no_plan_is_measured_twice_unless_its_record_was_cut_off(bank: Bank, tmp_path: Path) -> None:
    record, choice, asked = tmp_path / "record", lagrangian.allocate(bank, 2.0), []

    def measure(choice: np.ndarray) -> float:
        asked.append(choice)
        return 1.71875

    def loss() -> float:
        return Trials(LossModel(bank), measure, 4, record, "mine").run(choice, 2.0, "lagrangian").loss

    assert loss() == loss() == 1.71875
    assert len(asked) == 1
    for end in ("1", "1.7", "1.71875"):  # where a full disk, or the power, ended the line
        record.write_text(record.read_text().rpartition("1.71875")[0] + end)
        assert loss() == 1.71875
    assert len(asked) == 4
    assert loss() == 1.71875
    assert len(asked) == 4
