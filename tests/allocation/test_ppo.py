"""The search: it learns, for every budget at once, it keeps its promises, it is repeatable, it goes on after a kill."""

import dataclasses
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO

from windquant import compute
from windquant.allocation import lagrangian, ppo
from windquant.allocation.budget import Choice, fill, highest, limit
from windquant.allocation.environment import AllocationVecEnv
from windquant.allocation.learned import Learned
from windquant.allocation.loss_model import LossModel
from windquant.allocation.network import actor, deterministic
from windquant.allocation.policy import AllocationPolicy
from windquant.allocation.ppo import Search, anchors, search, spread
from windquant.allocation.settings import SearchSettings, Settings
from windquant.allocation.walk import Brief, Walk
from windquant.bank import Bank
from windquant.errors import WindquantError
from windquant.settings import from_mapping

QUICK = SearchSettings(episodes=16, evaluations=10, n_envs=4, targets=(2.0, 3.0))
Measure = Callable[[Choice], float]


def same(left: Learned, right: Learned) -> bool:
    tensors = all(torch.equal(value, right.tensors[name]) for name, value in left.tensors.items())
    return tensors and left.search == right.search and bool((left.weights == right.weights).all())


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
    with compute.threads(1):
        learner = MaskablePPO(
            AllocationPolicy, env, learning_rate=5e-4, n_steps=64, batch_size=256, n_epochs=3, gamma=1.0,
            gae_lambda=ppo.GAE_LAMBDA, policy_kwargs={"layout": env.walk.layout}, seed=0, device="cpu",
        )  # fmt: skip
        learner.learn(60 * 64 * 16)
        walk = Walk(bank, model)
        walk.begin(brief(1))
        network = actor(learner.policy.state_dict(), walk.layout, 64, True)
        plan = fill(bank, deterministic(network, walk)[0], limit(bank, 2.0))
    assert corrected.predicted_loss(plan) / best - 1 < 0.35 * start


@pytest.fixture(scope="module")
def one_for_all(make_bank: Callable[..., Bank], hidden_loss: Callable[..., Measure]) -> tuple[Bank, Measure, Learned]:
    bank = make_bank(layers=6)
    measure = hidden_loss(bank, seed=0, noise=0.1)
    return bank, measure, search(bank, 0, SearchSettings(episodes=128, evaluations=32), measure)


@pytest.mark.parametrize("bits", [1.75, 2.0, 2.5, 3.0])
def test_one_policy_beats_the_lagrangian_plan_at_every_budget(
    one_for_all: tuple[Bank, Measure, Learned], bits: float
) -> None:
    """Most of what the best plan for the true errors would gain, in 32 measurements for all budgets together."""
    bank, measure, found = one_for_all
    plan = found.plan(bank, bits)
    assert bits - 0.02 < bank.effective_bits(plan) <= bits
    first = measure(lagrangian.allocate(bank, bits))
    best = measure(lagrangian.allocate(dataclasses.replace(bank, errors=measure.true), bits))
    assert first - measure(plan) > 0.5 * (first - best)
    assert found.doubt(bits) == ""


def test_what_was_learned_transfers_to_another_model(
    one_for_all: tuple[Bank, Measure, Learned], make_bank: Callable[..., Bank], hidden_loss: Callable[..., Measure]
) -> None:
    """Errors that are wrong in the same directions: better than the Lagrangian plan without any measurement, and
    better still after a few; the same few do less for a search that starts from nothing."""
    _, _, found = one_for_all
    bank = make_bank(layers=4, seed=1)
    measure = hidden_loss(bank, seed=0, noise=0.1)
    with pytest.raises(WindquantError, match="another bank"):
        found.check(bank)
    found.check(bank, transfer=True)
    options = SearchSettings(episodes=32, evaluations=6, targets=(2.0,))
    tuned = search(bank, 0, options, measure, start=found)
    alone = search(bank, 0, options, measure)
    first = measure(lagrangian.allocate(bank, 2.0))
    zero_shot, after, fresh = (measure(policy.plan(bank, 2.0)) for policy in (found, tuned, alone))
    assert zero_shot < 0.99 * first
    assert after < min(fresh, 1.01 * zero_shot)


def test_the_learning_is_visible(one_for_all: tuple[Bank, Measure, Learned]) -> None:
    curve = one_for_all[2].search["curve"]
    assert np.mean([point["reward"] for point in curve[-8:]]) > np.mean([point["reward"] for point in curve[8:24]])
    assert np.mean([point["explained_variance"] for point in curve[-8:]]) > 0.2
    assert [target for target, _ in groupby(point["target"] for point in curve)] == [3.0, 2.5, 1.5]


def test_promises(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    measured: list[Choice] = []
    hidden = hidden_loss(small_bank)

    def measure(choice: Choice) -> float:
        assert torch.get_num_threads() == before  # the measurement has all threads
        measured.append(choice.copy())
        return hidden(choice)

    before = torch.get_num_threads()
    reports: list[dict[str, float]] = []
    found = search(small_bank, 0, QUICK, measure, report=lambda values, update: reports.append(values))
    assert torch.get_num_threads() == before
    assert found.search["evaluations"] == len(measured) <= QUICK.evaluations
    assert len({plan.tobytes() for plan in measured}) == len(measured)
    for plan, bits in zip(measured, np.geomspace(2.0, 3.0, 3), strict=False):
        np.testing.assert_array_equal(plan, lagrangian.allocate(small_bank, bits))
    for plan, (*_, loss, bits) in zip(measured, found.search["pairs"], strict=True):
        assert bits - 0.02 < small_bank.effective_bits(plan) <= bits + 1e-6
        assert hidden(plan) == pytest.approx(loss, abs=1e-6)
    assert [check["target"] for check in found.search["checks"]] == pytest.approx(np.geomspace(2.0, 3.0, 3))
    assert reports == found.search["curve"]
    assert {"reward", "negative_entropy", "value_loss", "explained_variance"} <= reports[-1].keys()


def test_same_seed_same_policy(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    first, second = (search(small_bank, 7, QUICK, hidden_loss(small_bank)) for _ in range(2))
    other = search(small_bank, 8, QUICK, hidden_loss(small_bank))
    assert same(first, second)
    assert not same(first, other)
    np.testing.assert_array_equal(first.plan(small_bank, 2.3), second.plan(small_bank, 2.3))


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", [1, 2, 6, 9])
def test_a_search_killed_while_measuring_ends_with_the_same_policy(
    small_bank: Bank, hidden_loss: Callable[..., Measure], tmp_path: Path, undisturbed: Learned, moment: int
) -> None:
    measure = hidden_loss(small_bank)

    def mortal(choice: Choice) -> float:
        if measure.calls == moment - 1:
            raise Killed
        return measure(choice)

    with pytest.raises(Killed):
        search(small_bank, 0, QUICK, mortal, tmp_path)
    assert same(search(small_bank, 0, QUICK, measure, tmp_path), undisturbed)
    assert measure.calls == undisturbed.search["evaluations"]  # nothing is measured twice


@pytest.mark.parametrize("moment", [0, 1, 13])
def test_a_search_killed_while_training_goes_on_from_its_last_update(
    small_bank: Bank, hidden_loss: Callable[..., Measure], tmp_path: Path, undisturbed: Learned, moment: int
) -> None:
    def mortal(values: dict[str, float], update: int) -> None:
        if update == moment:
            raise Killed

    updates: list[int] = []
    with pytest.raises(Killed):
        search(small_bank, 0, QUICK, hidden_loss(small_bank), tmp_path, mortal)
    again = search(
        small_bank, 0, QUICK, hidden_loss(small_bank), tmp_path, lambda values, update: updates.append(update)
    )
    assert same(again, undisturbed)
    assert updates[0] == moment  # the update that was cut off is the first that is done again
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".txt"}


def test_a_killed_search_without_measurements_goes_on(small_bank: Bank, tmp_path: Path) -> None:
    def mortal(values: dict[str, float], update: int) -> None:
        if update == 2:
            raise Killed

    options = dataclasses.replace(QUICK, evaluations=0)
    with pytest.raises(Killed):
        search(small_bank, 0, options, never, tmp_path, mortal)
    assert same(search(small_bank, 0, options, never, tmp_path), search(small_bank, 0, options, never))


@pytest.fixture(scope="module")
def undisturbed(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> Learned:
    return search(small_bank, 0, QUICK, hidden_loss(small_bank))


def test_a_damaged_or_foreign_state_is_not_used(
    small_bank: Bank, hidden_loss: Callable[..., Measure], tmp_path: Path, undisturbed: Learned
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    search(small_bank, 0, dataclasses.replace(QUICK, targets=(2.4,)), hidden_loss(small_bank), foreign)
    assert same(search(small_bank, 0, QUICK, hidden_loss(small_bank), foreign), undisturbed)
    damaged = tmp_path / "damaged"
    shutil.copytree(foreign, damaged)
    state = damaged / "search.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with (damaged / "measured.txt").open("a") as file:
        file.write("\nhalf a line")
    assert same(search(small_bank, 0, QUICK, hidden_loss(small_bank), damaged), undisturbed)


def test_doubt_where_no_learned_plan_is_better(small_bank: Bank) -> None:
    baselines = [lagrangian.allocate(small_bank, bits) for bits in np.geomspace(2.0, 3.0, 3)]

    def measure(choice: Choice) -> float:
        return 1.0 + 0.1 * float(not any((choice == plan).all() for plan in baselines))

    found = search(small_bank, 0, QUICK, measure)
    assert "did not measure better at 2.449 bits" in found.doubt(2.5)
    assert not found.exploded(2.5)


def test_doubt_where_every_learned_plan_explodes(small_bank: Bank) -> None:
    baselines = [lagrangian.allocate(small_bank, bits) for bits in np.geomspace(2.0, 3.0, 3)]
    found = search(
        small_bank, 0, QUICK, lambda choice: 1.0 if any((choice == plan).all() for plan in baselines) else np.nan
    )
    assert "not finite" in found.doubt(2.2)
    assert found.exploded(2.2)


def test_budgets_outside_of_the_range_are_left_to_the_lagrangian(undisturbed: Learned) -> None:
    assert undisturbed.doubt(3.5) == "the search is for 2 to 3 bits (search.targets)"
    assert undisturbed.doubt(1.9)


def never(choice: Choice) -> float:
    raise AssertionError("must not be measured")


def test_a_minibatch_of_one_decision(make_bank: Callable[..., Bank]) -> None:
    """Ten an update, in batches of three: the last one has no deviation."""
    options = dataclasses.replace(QUICK, episodes=5, n_envs=5, evaluations=0)
    found = search(make_bank(layers=1), 0, options, never)
    assert all(value.isfinite().all() for value in found.tensors.values())


def test_without_measurements_the_predicted_errors_pay(small_bank: Bank) -> None:
    found = search(small_bank, 0, dataclasses.replace(QUICK, evaluations=0), never)
    best = small_bank.predicted_loss(lagrangian.allocate(small_bank, 2.4))
    assert found.doubt(2.4) == ""
    assert small_bank.predicted_loss(found.plan(small_bank, 2.4)) < 1.1 * best


def test_a_cold_start_knows_nothing_of_the_lagrangian_plan(small_bank: Bank) -> None:
    options = dataclasses.replace(QUICK, evaluations=0)
    warm, cold = (search(small_bank, 0, dataclasses.replace(options, warm_start=on), never) for on in (True, False))
    assert cold.search["curve"][0]["reward"] < 3 * warm.search["curve"][0]["reward"] < 0
    assert 2.38 < small_bank.effective_bits(cold.plan(small_bank, 2.4)) <= 2.4


@pytest.mark.parametrize(("targets", "reason"), [((0.2, 0.4), "lowest possible target"), ((15.9, 16.0), "the best")])
def test_no_policy_where_there_is_nothing_to_learn(small_bank: Bank, targets: tuple[float, ...], reason: str) -> None:
    bank = dataclasses.replace(small_bank, bytes=small_bank.bytes // 2) if targets[0] > 1 else small_bank
    found = search(bank, 0, SearchSettings(targets=targets), never)
    assert reason in found.doubt(targets[0])
    assert found.tensors == {}


def test_the_range_ends_where_the_bank_does(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    options = dataclasses.replace(QUICK, targets=(0.5, 16.0), episodes=4, evaluations=3)
    low, high = search(small_bank, 0, options, hidden_loss(small_bank)).targets
    assert (low, high) == (small_bank.lowest_bits(), min(16.0, highest(small_bank)))
    limit(small_bank, low)  # can be met


def test_the_curriculum_comes_down_to_the_range(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    seen: list[list[float]] = []

    class Watched(Search):
        def brief(self) -> Brief:
            brief = super().brief()
            seen.append(brief.targets.tolist())
            return brief

    options = SearchSettings(episodes=32, n_envs=4, evaluations=8, targets=(2.2, 3.2))
    watched = Watched(small_bank, 0, options, hidden_loss(small_bank), None, None)
    watched.run()
    for place, floor in enumerate([3.0] * 2 + [2.5] * 2 + [2.2] * 4):
        measured = watched.schedule[place]
        assert all(2.2 <= target <= 3.2 for target in seen[place][:measured])
        assert all(floor <= target <= 3.2 for target in seen[place][measured:])
    single = SearchSettings(episodes=8, n_envs=4, evaluations=8, targets=(2.7,))
    assert Search(small_bank, 0, single, never, None, None).stages == [3.0]
    assert Search(small_bank, 0, dataclasses.replace(single, targets=(4.0,)), never, None, None).stages == []


def test_a_single_budget_is_a_range_too(small_bank: Bank, hidden_loss: Callable[..., Measure]) -> None:
    found = search(small_bank, 0, dataclasses.replace(QUICK, targets=(2.2,)), hidden_loss(small_bank))
    assert found.targets == (2.2, 2.2)
    assert {pair[-1] for pair in found.search["pairs"]} == {2.2}
    assert 2.18 < small_bank.effective_bits(found.plan(small_bank, 2.2)) <= 2.2


def test_anchors_are_the_ends_and_the_middle() -> None:
    assert anchors((2.0, 2.0), 30) == [2.0]
    assert anchors((1.5, 4.0), 5) == [pytest.approx(6**0.5)]
    assert anchors((1.5, 4.0), 16) == pytest.approx([1.5, 6**0.5, 4.0])


def test_measurements_are_spread_over_the_walks() -> None:
    assert spread(0, 3) == [0, 0, 0]
    for total, places in [(21, 13), (5, 13), (40, 4)]:
        counts = spread(total, places)
        assert sum(counts) == total
        assert len(counts) == places
        assert sum(counts[: places // 2]) >= sum(counts[-(places // 2) :])


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (Settings, "evaluations", -1),
        (Settings, "target_bits", 17.0),
        (Settings, "target_bits", float("nan")),
        (Settings, "reward_tokens", 1),
        (SearchSettings, "episodes", 0),
        (SearchSettings, "n_envs", 1),
        (SearchSettings, "evaluations", -1),
        (SearchSettings, "learning_rate", 0.0),
        (SearchSettings, "targets", ()),
        (SearchSettings, "targets", (3.0, 2.0)),
        (SearchSettings, "targets", (0.0, 2.0)),
        (SearchSettings, "targets", (1.0, 2.0, 3.0)),
    ],
)
def test_impossible_settings_are_named(cls: type, key: str, value: Any) -> None:
    with pytest.raises(WindquantError, match=f"search.{key}: "):
        from_mapping(cls, {key: value}, "search")
