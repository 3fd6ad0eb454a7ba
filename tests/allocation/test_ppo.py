"""The search: it learns, it keeps its promises, it is repeatable, it goes on after a kill."""

import dataclasses
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO

from windquant.allocation import lagrangian, ppo
from windquant.allocation.budget import Choice, fill, limit
from windquant.allocation.environment import AllocationVecEnv
from windquant.allocation.loss_model import LossModel
from windquant.allocation.policy import AllocationPolicy
from windquant.allocation.ppo import Found, Search, deterministic, search, spread
from windquant.allocation.settings import SearchSettings, Settings
from windquant.allocation.walk import Brief, Walk
from windquant.bank import Bank
from windquant.errors import WindquantError

QUICK = SearchSettings(episodes=16, evaluations=10, n_envs=4)
Measure = Callable[[Choice], float]


def same(left: Found, right: Found) -> bool:
    return (left.choice == right.choice).all() and left.search == right.search and left.fallback == right.fallback


def test_ppo_learns_where_the_errors_are_wrong(make_bank: Callable[..., Bank]) -> None:
    """The rewards are counted in errors that the policy is not told; the best plan for them is known."""
    bank = make_bank(layers=6)
    model = LossModel(bank)
    weights = np.random.default_rng(3).normal(0, 1, (1, model.size))
    weights[:, -len(bank.actions) :] *= 0.2
    corrected = dataclasses.replace(bank, errors=bank.errors * model.multipliers(weights)[0])
    best = corrected.predicted_loss(lagrangian.allocate(corrected, 2.0))
    start = corrected.predicted_loss(lagrangian.allocate(bank, 2.0)) / best - 1
    assert start > 0.05

    def brief(count: int) -> Brief:
        return Brief(np.full(count, 2.0), weights.repeat(count, axis=0), np.zeros((count, model.size)))

    env = AllocationVecEnv(Walk(bank, model), 16, lambda: brief(16), lambda brief, choice: np.zeros(len(choice)))
    with ppo.threads(1):
        learner = MaskablePPO(
            AllocationPolicy, env, learning_rate=5e-4, n_steps=64, batch_size=256, n_epochs=3, gamma=1.0,
            gae_lambda=ppo.GAE_LAMBDA, policy_kwargs={"layout": env.walk.layout}, seed=0, device="cpu",
        )  # fmt: skip
        learner.learn(60 * 64 * 16)
        walk = Walk(bank, model)
        walk.begin(brief(1))
        plan = fill(bank, deterministic(learner.policy, walk)[0], limit(bank, 2.0))
    assert corrected.predicted_loss(plan) / best - 1 < 0.35 * start


def test_the_learned_plan_beats_the_lagrangian(
    make_bank: Callable[..., Bank], hidden_loss: Callable[..., Measure]
) -> None:
    """Most of what the best plan for the true errors would gain, in 24 measurements."""
    bank = make_bank(layers=6)
    measure = hidden_loss(bank, seed=0, noise=0.1)
    found = search(bank, 2.0, 0, SearchSettings(episodes=96, evaluations=24), measure)
    best = measure(lagrangian.allocate(dataclasses.replace(bank, errors=measure.true), 2.0))
    first, loss = found.search["lagrangian_loss"], found.search["loss"]
    assert found.search["chosen"] == "deterministic"
    assert first - loss > 0.5 * (first - best)
    assert measure(found.choice) == loss
    curve = found.search["curve"]
    assert np.mean([point["reward"] for point in curve[-8:]]) > np.mean([point["reward"] for point in curve[8:24]])
    assert np.mean([point["explained_variance"] for point in curve[-8:]]) > 0.2
    assert [target for target, _ in groupby(point["target"] for point in curve)] == [3.0, 2.5, 2.0]


def test_promises(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    measured: list[Choice] = []
    hidden = hidden_loss(small_bank)

    def measure(choice: Choice) -> float:
        assert torch.get_num_threads() == before  # the measurement has all threads
        measured.append(choice.copy())
        return hidden(choice)

    before = torch.get_num_threads()
    reports: list[dict[str, float]] = []
    found = search(small_bank, 2.2, 0, QUICK, measure, report=lambda values, update: reports.append(values))
    assert torch.get_num_threads() == before
    assert found.search["evaluations"] == len(measured) <= QUICK.evaluations
    assert len({plan.tobytes() for plan in measured}) == len(measured)
    np.testing.assert_array_equal(measured[0], lagrangian.allocate(small_bank, 2.2))
    losses = [pair[3] for pair in found.search["pairs"]]
    assert found.search["loss"] == pytest.approx(min(losses), abs=1e-6)
    assert all(2.18 < small_bank.effective_bits(plan) <= 2.2 for plan in measured)
    assert reports == found.search["curve"]
    assert {"reward", "negative_entropy", "value_loss", "explained_variance"} <= reports[-1].keys()
    assert not found.fallback
    small_bank.plan(found.choice, allocator="ppo", target_bits=2.2, seed=0, search=found.search).save(Path("/dev/null"))


def test_same_seed_same_plan(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    first, second = (search(small_bank, 2.2, 7, QUICK, hidden_loss(small_bank)) for _ in range(2))
    other = search(small_bank, 2.2, 8, QUICK, hidden_loss(small_bank))
    assert same(first, second)
    assert not same(first, other)


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", [1, 2, 6, 9])
def test_a_search_killed_while_measuring_ends_with_the_same_plan(
    small_bank: Bank, hidden_loss: Callable[..., Measure], tmp_path: Path, undisturbed: Found, moment: int
) -> None:
    measure = hidden_loss(small_bank)

    def mortal(choice: Choice) -> float:
        if measure.calls == moment - 1:
            raise Killed
        return measure(choice)

    with pytest.raises(Killed):
        search(small_bank, 2.2, 0, QUICK, mortal, tmp_path)
    assert same(search(small_bank, 2.2, 0, QUICK, measure, tmp_path), undisturbed)
    assert measure.calls == undisturbed.search["evaluations"]  # nothing is measured twice


@pytest.mark.parametrize("moment", [0, 1, 13])
def test_a_search_killed_while_training_goes_on_from_its_last_update(
    small_bank: Bank, hidden_loss: Callable[..., Measure], tmp_path: Path, undisturbed: Found, moment: int
) -> None:
    def mortal(values: dict[str, float], update: int) -> None:
        if update == moment:
            raise Killed

    updates: list[int] = []
    with pytest.raises(Killed):
        search(small_bank, 2.2, 0, QUICK, hidden_loss(small_bank), tmp_path, mortal)
    again = search(
        small_bank, 2.2, 0, QUICK, hidden_loss(small_bank), tmp_path, lambda values, update: updates.append(update)
    )
    assert same(again, undisturbed)
    assert updates[0] == moment  # the update that was cut off is the first that is done again
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".txt"}


@pytest.fixture(scope="module")
def undisturbed(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> Found:
    return search(small_bank, 2.2, 0, QUICK, hidden_loss(small_bank))


def test_a_damaged_or_foreign_state_is_not_used(
    small_bank: Bank, hidden_loss: Callable[..., Measure], tmp_path: Path, undisturbed: Found
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    search(small_bank, 2.4, 0, QUICK, hidden_loss(small_bank), foreign)
    assert same(search(small_bank, 2.2, 0, QUICK, hidden_loss(small_bank), foreign), undisturbed)
    damaged = tmp_path / "damaged"
    shutil.copytree(foreign, damaged)
    state = damaged / "search.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with (damaged / "measured.txt").open("a") as file:
        file.write("\nhalf a line")
    assert same(search(small_bank, 2.2, 0, QUICK, hidden_loss(small_bank), damaged), undisturbed)


def test_the_lagrangian_plan_is_kept_where_nothing_is_better(small_bank: Bank) -> None:
    baseline = lagrangian.allocate(small_bank, 2.2)
    found = search(small_bank, 2.2, 0, QUICK, lambda choice: 1.0 + 0.1 * float((choice != baseline).any()))
    np.testing.assert_array_equal(found.choice, baseline)
    assert found.search["chosen"] == "lagrangian"
    assert not found.fallback


def test_fallback_where_every_learned_plan_explodes(small_bank: Bank) -> None:
    baseline = lagrangian.allocate(small_bank, 2.2)
    found = search(small_bank, 2.2, 0, QUICK, lambda choice: np.inf if (choice != baseline).any() else 1.0)
    np.testing.assert_array_equal(found.choice, baseline)
    assert found.fallback
    assert "not finite" in found.search["reason"]


def test_a_learned_plan_wins_where_the_lagrangian_explodes(small_bank: Bank) -> None:
    baseline = lagrangian.allocate(small_bank, 2.2)
    found = search(small_bank, 2.2, 0, QUICK, lambda choice: 1.0 if (choice != baseline).any() else np.nan)
    assert (found.choice != baseline).any()
    assert not found.fallback


def never(choice: Choice) -> float:
    raise AssertionError("must not be measured")


@pytest.mark.parametrize(("bits", "evaluations"), [(2.2, 0), (2.2, 1), (30.0, 10)])
def test_no_search_where_there_is_nothing_to_learn(small_bank: Bank, bits: float, evaluations: int) -> None:
    found = search(small_bank, bits, 0, SearchSettings(evaluations=evaluations), never)
    np.testing.assert_array_equal(found.choice, lagrangian.allocate(small_bank, bits))
    assert found.search["chosen"] == "lagrangian"


def test_a_target_below_the_metadata_names_the_lowest_one(small_bank: Bank) -> None:
    with pytest.raises(WindquantError, match="lowest possible target"):
        search(small_bank, 0.3, 0, QUICK, never)


def test_the_curriculum_comes_down_to_the_target(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    seen: list[list[float]] = []

    class Watched(Search):
        def brief(self) -> Brief:
            brief = super().brief()
            seen.append(brief.targets.tolist())
            return brief

    options = SearchSettings(episodes=32, n_envs=4, evaluations=8)
    Watched(small_bank, 2.2, 0, options, hidden_loss(small_bank), None, None).run()
    assert [targets[-1] for targets in seen[:8]] == [3.0] * 2 + [2.5] * 2 + [2.2] * 4
    measured = spread(round(ppo.TRAINING_SHARE * 7), 8)
    assert all(targets[:count] == [2.2] * count for targets, count in zip(seen, measured, strict=False))
    assert Search(small_bank, 2.7, 0, options, never, None, None).stages == [3.0]
    assert Search(small_bank, 4.0, 0, options, never, None, None).stages == []


def test_measurements_are_spread_over_the_walks() -> None:
    assert spread(0, 3) == [0, 0, 0]
    for total, places in [(21, 13), (5, 13), (40, 4)]:
        counts = spread(total, places)
        assert sum(counts) == total
        assert len(counts) == places
        assert sum(counts[: places // 2]) >= sum(counts[-(places // 2) :])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"episodes": 0}, "search.episodes"),
        ({"n_envs": 1}, "search.n_envs"),
        ({"evaluations": -1}, "search.evaluations"),
        ({"learning_rate": 0.0}, "search.learning_rate"),
        ({"target_bits": 17.0}, "target_bits"),
        ({"target_bits": float("nan")}, "target_bits"),
        ({"reward_tokens": 1}, "search.reward_tokens"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, float], key: str) -> None:
    with pytest.raises(WindquantError, match=key):
        Settings(**changes)
