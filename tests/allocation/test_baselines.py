"""The allocators that only read the bank, and the budget that all share."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from windquant.allocation import ALLOCATORS, BASELINES, greedy, lagrangian, randomized, uniform
from windquant.allocation.budget import cheapest, fill, ladder, limit, prices, take
from windquant.bank import Bank
from windquant.errors import WindquantError
from windquant.naming import SEEDLESS
from windquant.units import Linear


def random_bank(seed: int, units: int, actions: int = 4, broken: bool = False) -> Bank:
    """A bank of one linear per unit with arbitrary costs and errors; `broken` makes some actions unavailable."""
    random = np.random.default_rng(seed)
    size = np.sort(random.integers(10, 200, (units, actions)), axis=1)
    errors = np.sort(random.exponential(1, (units, actions)), axis=1)[:, ::-1] * random.exponential(1, (units, 1))
    if broken:
        errors = np.where(random.random(errors.shape) < 0.3, random.choice([np.nan, np.inf], errors.shape), errors)
        errors[~np.isfinite(errors).any(axis=1), -1] = 0.1
    numbers = np.arange(units, dtype=np.int32)
    return Bank(
        model="random",
        actions=[f"scalar-{bits}" for bits in range(1, actions + 1)],
        linears=[Linear(f"layers.{u // 3}.{'abc'[u % 3]}", "abc"[u % 3], u // 3, f"{u}", 16, 8) for u in range(units)],
        linear=numbers,
        position=np.zeros(units, dtype=np.int32),
        width=np.full(units, 8, dtype=np.int32),
        energy=random.exponential(1, units),
        errors=errors,
        bytes=size.astype(np.int64),
        fixed_bytes=int(random.integers(0, 50)),
    )


def exact(bank: Bank, budget: int) -> float:
    """The smallest predicted loss within `budget` bytes, by dynamic programming over bytes."""
    best = np.zeros(budget + 1)
    for errors, size in zip(prices(bank), bank.bytes, strict=True):
        following = np.full(budget + 1, np.inf)
        for error, cost in zip(errors, size, strict=True):
            if cost <= budget and np.isfinite(error):
                following[cost:] = np.minimum(following[cost:], best[: budget + 1 - cost] + error)
        best = following
    return float(best[-1])


def between(bank: Bank, share: float) -> float:
    """A target between the lowest and the highest bits of the bank."""
    highest = 8 * (bank.bytes.max(axis=1).sum() + bank.fixed_bytes) / bank.weights
    lowest = bank.effective_bits(cheapest(bank)) + 1e-9
    return float(lowest + share * max(0.0, highest - lowest))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    units=st.integers(1, 30),
    share=st.floats(0, 1.2),
    broken=st.booleans(),
    name=st.sampled_from(sorted(BASELINES)),
)
def test_no_plan_exceeds_its_target_or_leaves_what_it_could_use(
    seed: int, units: int, share: float, broken: bool, name: str
) -> None:
    bank = random_bank(seed, units, broken=broken)
    target = between(bank, share)
    choice = BASELINES[name](bank, target, seed)
    left = limit(bank, target) - int(take(bank.bytes, choice).sum())
    assert choice.shape == (units,)
    assert bank.effective_bits(choice) <= target
    errors = prices(bank)
    assert np.isfinite(take(errors, choice)).all()
    extra = bank.bytes - take(bank.bytes, choice)[:, None]
    useful = (errors < take(errors, choice)[:, None]) & (extra > 0)
    assert not (useful & (extra <= left)).any()
    np.testing.assert_array_equal(choice, BASELINES[name](bank, target, seed))


@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("target", [1.5, 2.0, 2.7, 4.0])
def test_within_two_hundredths_below_the_target(make_bank: Callable[..., Bank], name: str, target: float) -> None:
    bank = make_bank(layers=4)
    choice = BASELINES[name](bank, target, 0)
    assert target - 0.02 <= bank.effective_bits(choice) <= target


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), units=st.integers(1, 12), share=st.floats(0, 1))
def test_lagrangian_is_within_its_bound_of_the_exact_optimum(seed: int, units: int, share: float) -> None:
    bank = random_bank(seed, units)
    budget = limit(bank, between(bank, share))
    best = exact(bank, budget)
    plan, price = lagrangian.solve(prices(bank), bank.bytes, budget, cheapest(bank))
    bound = price * (budget - take(bank.bytes, plan).sum())  # weak duality
    assert best - 1e-9 <= bank.predicted_loss(plan) <= best + bound + 1e-9
    assert bank.predicted_loss(fill(bank, plan, budget)) <= bank.predicted_loss(plan) + 1e-12


def test_lagrangian_is_near_the_exact_optimum_of_many_units() -> None:
    gaps = []
    for seed in range(5):
        bank = random_bank(seed, 100)
        target = between(bank, 0.4)
        best = exact(bank, limit(bank, target))
        gaps.append(bank.predicted_loss(lagrangian.allocate(bank, target)) / best - 1)
    assert max(gaps) < 0.01


def test_order_of_the_baselines(make_bank: Callable[..., Bank]) -> None:
    bank = make_bank(layers=8)
    loss = {name: bank.predicted_loss(allocate(bank, 2.0, 0)) for name, allocate in BASELINES.items()}
    assert loss["lagrangian"] <= loss["greedy"] * 1.001 < loss["uniform"] < loss["random"]
    assert set(ALLOCATORS) == {"ppo", "layer", "evolution", *BASELINES}


def test_uniform_is_one_action_and_upgrades_in_model_order(small_bank: Bank) -> None:
    choice = uniform.allocate(small_bank, 2.5)
    low = choice.min()
    assert set(choice) <= {low, low + 1}
    everywhere = np.full(len(choice), low)
    assert small_bank.effective_bits(everywhere) <= 2.5 < small_bank.effective_bits(everywhere + 1)
    raised = np.flatnonzero(choice > low)
    skipped = np.flatnonzero(choice[: raised[-1]] == low)
    left = limit(small_bank, 2.5) - take(small_bank.bytes, choice).sum()
    assert all(small_bank.bytes[u, low + 1] - small_bank.bytes[u, low] > left for u in skipped)
    assert raised[0] == 0


def test_uniform_takes_the_next_cheaper_action_where_one_is_missing(small_bank: Bank) -> None:
    errors = small_bank.errors.copy()
    errors[3, 2] = np.nan
    bank = dataclasses.replace(small_bank, errors=errors)
    np.testing.assert_array_equal(uniform.everywhere(bank, 2), np.where(np.arange(len(errors)) == 3, 1, 2))


def test_greedy_never_jumps_over_a_bad_width() -> None:
    """Unit 0's middle width is worth nothing, so greedy never goes that way; the Lagrangian plan jumps over it."""
    bank = dataclasses.replace(
        random_bank(0, 2, actions=3),
        errors=np.array([[10.0, 9.99, 0.0], [1.0, 0.5, 0.4]]),
        bytes=np.array([[10, 20, 30], [10, 20, 30]]),
        fixed_bytes=0,
    )
    target = 8 * 40 / bank.weights
    np.testing.assert_array_equal(lagrangian.allocate(bank, target), [2, 0])
    np.testing.assert_array_equal(greedy.allocate(bank, target), [0, 2])


def test_random_follows_its_seed(small_bank: Bank) -> None:
    plans = [randomized.allocate(small_bank, 2.0, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert (plans[0] != plans[2]).any()


@pytest.mark.parametrize("name", SEEDLESS)
def test_what_draws_nothing_has_one_plan_for_all_seeds(small_bank: Bank, name: str) -> None:
    np.testing.assert_array_equal(*(BASELINES[name](small_bank, 2.0, seed) for seed in (0, 7)))


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_target_below_the_metadata_names_the_lowest_one(small_bank: Bank, name: str) -> None:
    with pytest.raises(WindquantError, match="lowest possible target is") as error:
        BASELINES[name](small_bank, 0.5, 0)
    lowest = float(str(error.value).split("lowest possible target is ")[1].split(";")[0])
    assert lowest == small_bank.lowest_bits()
    np.testing.assert_array_equal(BASELINES[name](small_bank, small_bank.lowest_bits(), 0), cheapest(small_bank))
    assert small_bank.effective_bits(BASELINES[name](small_bank, lowest, 0)) <= lowest


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_more_than_enough_takes_the_best_of_everything(small_bank: Bank, name: str) -> None:
    choice = BASELINES[name](small_bank, 30.0, 0)
    assert small_bank.predicted_loss(choice) == 0


def test_a_unit_without_any_action_is_named(small_bank: Bank) -> None:
    errors = small_bank.errors.copy()
    errors[5] = np.nan
    with pytest.raises(WindquantError, match=r"model\.layers\.0\..*chunk \d+"):
        lagrangian.allocate(dataclasses.replace(small_bank, errors=errors), 2.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), units=st.integers(1, 12), share=st.floats(0, 1))
def test_fill_takes_the_best_upgrade_again_and_again(seed: int, units: int, share: float) -> None:
    bank = random_bank(seed, units)
    budget = limit(bank, between(bank, share))
    np.testing.assert_array_equal(fill(bank, cheapest(bank), budget), plain_fill(bank, cheapest(bank), budget))


def plain_fill(bank: Bank, choice: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """The definition of `fill`, in quadratic time."""
    choice = choice.copy()
    while True:
        extra = bank.bytes - take(bank.bytes, choice)[:, None]
        gain = take(bank.errors, choice)[:, None] - bank.errors
        fits = (extra > 0) & (gain > 0) & (extra <= budget - take(bank.bytes, choice).sum())
        if not fits.any():
            return choice
        ratio = np.where(fits, gain, 0) / np.where(fits, extra, 1)
        unit, action = np.unravel_index(ratio.argmax(), ratio.shape)
        choice[unit] = action


def test_ladder_leaves_out_what_is_dearer_and_no_better(small_bank: Bank) -> None:
    errors = small_bank.errors.copy()
    errors[0, 2] = errors[0, 1] * 1.01
    errors[1, 1] = np.inf
    steps = ladder(dataclasses.replace(small_bank, errors=errors))
    assert steps[0].tolist() == [1, 3, 3, 4, 5, 6, -1]
    assert steps[1, 0] == 2
