"""The allocation as a decision problem: masks, prices, rewards, observations."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from tests.allocation.conftest import make_bank
from windquant.allocation import lagrangian
from windquant.allocation.budget import cheapest, fill, limit, take
from windquant.allocation.environment import AllocationEnv, AllocationVecEnv
from windquant.allocation.features import geometry
from windquant.allocation.loss_model import LossModel
from windquant.allocation.network import actor, deterministic
from windquant.allocation.policy import AllocationPolicy
from windquant.allocation.walk import Brief, Walk, plain_brief
from windquant.bank import Bank


def start(bank: Bank, targets: list[float]) -> Walk:
    walk = Walk(bank, LossModel(bank))
    walk.begin(plain_brief(walk.model, targets))
    return walk


def vector_env(bank: Bank, targets: list[float]) -> AllocationVecEnv:
    model = LossModel(bank)
    return AllocationVecEnv(
        Walk(bank, model),
        len(targets),
        lambda: plain_brief(model, targets),
        lambda brief, choice: np.zeros(len(choice)),
    )


def break_some(bank: Bank, seed: int) -> Bank:
    """Some actions are not available, but never all of a unit."""
    random = np.random.default_rng(seed)
    broken = random.random(bank.errors.shape) < 0.3
    broken[:, random.integers(bank.errors.shape[1])] = False
    return dataclasses.replace(bank, errors=np.where(broken, np.nan, bank.errors))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), above=st.floats(0, 3), broken=st.booleans(), greedy=st.booleans())
def test_masks_are_exact_and_no_walk_exceeds_its_budget(
    tiny_bank: Bank, seed: int, above: float, broken: bool, greedy: bool
) -> None:
    bank = break_some(tiny_bank, seed) if broken else tiny_bank
    random = np.random.default_rng(seed)
    target = bank.effective_bits(cheapest(bank)) + 1e-9 + above
    walk = start(bank, [target, target + 0.5])
    least = take(bank.bytes, cheapest(bank))
    over = False
    while not over:
        u, mask = walk.unit, walk.mask()
        for e in range(2):
            spent = take(bank.bytes[:u], walk.choice[e, :u]).sum() if u else 0
            budget = bank.budget(walk.brief.targets[e])
            for action in range(len(bank.actions)):
                possible = spent + bank.bytes[u, action] + least[u + 1 :].sum() <= budget
                assert mask[e, action] == (possible and np.isfinite(bank.errors[u, action]))
        assert mask.any(axis=1).all()
        assert np.isfinite(walk.observe()).all()
        weights = np.where(mask, np.arange(mask.shape[1]) ** 9 + 1 if greedy else 1, 0)
        reward, over = walk.step(np.array([random.choice(len(row), p=row / row.sum()) for row in weights]))
        assert np.isfinite(reward).all()
        assert (reward <= 1e-6).all()
    for e in range(2):
        assert bank.effective_bits(walk.choice[e]) <= walk.brief.targets[e]


def test_an_invalid_action_becomes_the_cheapest(tiny_bank: Bank) -> None:
    target = tiny_bank.lowest_bits() + 1e-9
    walk = start(tiny_bank, [target])
    over = False
    while not over:
        assert walk.mask()[0].tolist() == [True] + [False] * 6
        _, over = walk.step(np.array([6]))
    np.testing.assert_array_equal(walk.choice[0], cheapest(tiny_bank))


def test_observations_are_finite_for_odd_banks(make_bank: Callable[..., Bank]) -> None:
    bank = make_bank(layers=1, hidden=16, inner=16, key=16, chunk=64)  # one unit per linear, one layer
    bank = dataclasses.replace(bank, energy=np.zeros_like(bank.energy), errors=np.where(bank.errors > 0, 1e-12, 0.0))
    walk = start(bank, [4.0, 15.0])
    over = False
    while not over:
        observation = walk.observe()
        assert observation.shape == (2, walk.layout.size)
        assert np.isfinite(observation).all()
        assert abs(observation).max() <= 50
        _, over = walk.step(np.array([3, 6]))


def test_the_best_action_at_the_price_costs_nothing(small_bank: Bank) -> None:
    walk = start(small_bank, [2.0])
    for _ in range(20):
        price = np.exp(walk.log_price()) * walk.base
        reduced = small_bank.errors[walk.unit] + price[0] * small_bank.bytes[walk.unit]
        regret = (reduced - reduced.min()) / (price[0] * walk.bit.mean())
        action = walk.unit % 3
        reward, _ = walk.step(np.array([action]))
        assert reward[0] == pytest.approx(-regret[action], rel=1e-3, abs=1e-5)


def test_the_price_rises_after_waste_and_falls_after_thrift(small_bank: Bank) -> None:
    walk = start(small_bank, [2.0, 2.0])
    before = walk.log_price()
    for _ in range(10):
        walk.step(np.array([0, 4]))
    after = walk.log_price()
    assert after[0] < before[0] < after[1]


def untrained(bank: Bank, targets: list[float], offset: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """The plans of the policy's best actions before any training."""
    env = vector_env(bank, targets)
    ppo = MaskablePPO(AllocationPolicy, env, n_steps=8, batch_size=8, policy_kwargs={"layout": env.walk.layout}, seed=0)
    brief = plain_brief(env.walk.model, targets)
    env.walk.begin(brief if offset is None else Brief(brief.targets, offset, offset))
    return deterministic(actor(ppo.policy.state_dict(), env.walk.layout, 64, True), env.walk)


@pytest.mark.parametrize("bits", [1.6, 2.0, 2.5, 3.0, 4.0])
def test_the_untrained_policy_is_the_lagrangian_plan(make_bank: Callable[..., Bank], bits: float) -> None:
    bank = make_bank(layers=6)
    plan = fill(bank, untrained(bank, [bits])[0], limit(bank, bits))
    best = lagrangian.allocate(bank, bits)
    assert (plan == best).mean() > 0.97
    assert bank.predicted_loss(plan) <= 1.005 * bank.predicted_loss(best)
    assert bits - 0.02 < bank.effective_bits(plan) <= bits


def test_one_policy_serves_several_targets_at_once(small_bank: Bank) -> None:
    targets = [2.25, 2.5, 3.0]
    for plan, bits in zip(untrained(small_bank, targets), targets, strict=True):
        best = small_bank.predicted_loss(lagrangian.allocate(small_bank, bits))
        assert small_bank.predicted_loss(fill(small_bank, plan, limit(small_bank, bits))) <= 1.05 * best


def test_a_told_hypothesis_is_the_lagrangian_plan_of_its_errors(make_bank: Callable[..., Bank]) -> None:
    bank = make_bank(layers=6)
    model = LossModel(bank)
    weights = np.random.default_rng(0).normal(0, 1, (1, model.size))
    corrected = dataclasses.replace(bank, errors=bank.errors * model.multipliers(weights)[0])
    plan = fill(bank, untrained(bank, [2.0], weights)[0], limit(bank, 2.0))
    best = corrected.predicted_loss(lagrangian.allocate(corrected, 2.0))
    assert corrected.predicted_loss(plan) < 1.01 * best
    assert corrected.predicted_loss(lagrangian.allocate(bank, 2.0)) > 1.02 * best


def test_gymnasium_accepts_the_environment(tiny_bank: Bank) -> None:
    check_env(AllocationEnv(tiny_bank, 3.0), skip_render_check=True)


def test_both_environments_agree(tiny_bank: Bank) -> None:
    single, several = AllocationEnv(tiny_bank, 3.0), vector_env(tiny_bank, [3.0, 3.0])
    one, _ = single.reset(seed=0)
    many = several.reset()
    random = np.random.default_rng(0)
    for _ in range(len(tiny_bank.linear)):
        np.testing.assert_array_equal(many, [one, one])
        mask = single.action_masks()
        np.testing.assert_array_equal(get_action_masks(several), [mask, mask])
        action = random.choice(np.flatnonzero(mask))
        one, reward, over, truncated, _ = single.step(action)
        many, rewards, dones, infos = several.step(np.array([action, action]))
        assert rewards == pytest.approx([reward, reward])
        assert dones.tolist() == [over, over]
        assert not truncated
        if over:
            np.testing.assert_array_equal(infos[1]["terminal_observation"], one)
            assert infos[0]["episode"]["l"] == len(tiny_bank.linear)
            break
    assert over
    np.testing.assert_array_equal(many, several.reset())  # the next episode had begun


def test_a_measured_episode_pays_what_was_not_foreseen(tiny_bank: Bank) -> None:
    rewards = []
    for extra in (None, 0.5):
        measure = None if extra is None else (lambda choice: tiny_bank.predicted_loss(choice) + 0.5)
        env = AllocationEnv(tiny_bank, 3.0, measure)
        env.reset()
        over, total = False, 0.0
        while not over:
            _, reward, over, _, _ = env.step(np.int64(0))
            total += reward
        rewards.append(total)
    assert rewards[0] - rewards[1] == pytest.approx(0.5 / env.walk.account[0])


def test_stable_baselines_finds_the_masks(tiny_bank: Bank) -> None:
    assert is_masking_supported(vector_env(tiny_bank, [3.0, 3.5]))


def test_an_episode_goes_on_from_its_state(tiny_bank: Bank) -> None:
    first, second = (vector_env(tiny_bank, [3.0, 3.5]) for _ in range(2))
    first.reset()
    random = np.random.default_rng(0)
    for _ in range(5):
        first.step(random.integers(0, 3, 2))
    state = {name: value.copy() for name, value in first.state().items()}
    np.testing.assert_array_equal(second.restore(state), first.walk.observe())
    for _ in range(len(tiny_bank.linear) - 5):
        action = random.integers(0, 3, 2)
        left, right = first.step(action), second.step(action)
        np.testing.assert_array_equal(left[0], right[0])
        np.testing.assert_array_equal(left[1], right[1])
    np.testing.assert_array_equal(first.returns, second.returns)


def test_the_mask_holds_in_the_policy(small_bank: Bank) -> None:
    env = vector_env(small_bank, [small_bank.lowest_bits() + 1e-9] * 2)
    ppo = MaskablePPO(AllocationPolicy, env, n_steps=8, batch_size=8, policy_kwargs={"layout": env.walk.layout}, seed=0)
    observation = torch.as_tensor(env.reset())
    probability = ppo.policy.get_distribution(observation, env.action_masks()).distribution.probs
    np.testing.assert_allclose(probability.detach().numpy(), [[1, 0, 0, 0, 0, 0, 0]] * 2, atol=1e-6)


def test_two_linears_of_one_kind_in_a_layer_are_told_apart() -> None:
    """As in StarCoder, whose layers have attn.c_proj and mlp.c_proj."""
    bank = make_bank(layers=3, hidden=32, inner=64, key=16, chunk=12)
    linears = []
    for linear in bank.linears:
        block, _, kind = linear.name.rpartition(".")
        alike = "c_proj" if kind in ("o_proj", "down_proj") else kind
        linears.append(dataclasses.replace(linear, kind=alike, name=f"{block}.{alike}"))
    found, plain = geometry(dataclasses.replace(bank, linears=linears)), geometry(bank)
    assert np.array_equal(found.above, plain.above)
    assert len(found.kinds) == len(plain.kinds) - 1
