"""The evolution strategy: within its measurements and its budget, repeatable, and better than where it starts."""

from collections.abc import Callable

import numpy as np

from windquant.allocation import evolution, lagrangian
from windquant.allocation.budget import Choice
from windquant.allocation.settings import MeasureSettings
from windquant.bank import Bank

Measure = Callable[[Choice], float]


def test_evolution_improves_on_the_lagrangian_plan(
    make_bank: Callable[..., Bank], hidden_loss: Callable[..., Measure]
) -> None:
    bank = make_bank(layers=6)
    measure = hidden_loss(bank, seed=0, noise=0.1)
    trials = evolution.search(bank, 2.0, 0, MeasureSettings(evaluations=60), measure)
    assert measure.calls == len(trials) == 60
    np.testing.assert_array_equal(trials[0].choice, lagrangian.allocate(bank, 2.0))
    assert all(1.98 < bank.effective_bits(trial.choice) <= 2.0 for trial in trials)
    losses = [trial.loss for trial in trials]
    assert min(losses) < 0.97 * losses[0]
    assert np.mean(losses[-20:]) < np.mean(losses[1:21]), "generations get better"


def test_same_seed_same_plans(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    first, second, other = (
        [trial.loss for trial in evolution.search(small_bank, 2.2, seed, MeasureSettings(12), hidden_loss(small_bank))]
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_it_ends_where_there_is_one_plan_only(small_bank: Bank) -> None:
    lowest = small_bank.lowest_bits()
    assert len(evolution.search(small_bank, lowest, 0, MeasureSettings(30), lambda choice: 1.0)) == 1


def test_losses_that_are_not_finite_do_no_harm(small_bank: Bank) -> None:
    baseline = lagrangian.allocate(small_bank, 2.2)
    trials = evolution.search(
        small_bank, 2.2, 0, MeasureSettings(14), lambda choice: 1.0 if (choice == baseline).all() else np.nan
    )
    assert min(trials, key=lambda trial: trial.loss).source == "lagrangian"
