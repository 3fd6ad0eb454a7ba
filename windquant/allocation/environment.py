"""The allocation as a sequential decision problem: one step per unit in model order, under one budget.

`Walk` is the problem itself, in numpy, for many episodes at once: all of them are at the same unit, so what depends on
the unit only is computed once. `AllocationVecEnv` shows it to stable-baselines3, `AllocationEnv` to Gymnasium.

**Prices.** The budget that is left determines a price (nats per byte): the one at which the Lagrangian plan of the rest of
the units would just use it up. It is looked up in a table, so a walk that spent too much so far sees higher prices and
comes back. In units of that price an error is worth x bits and an action costs y bits, whatever the model's size; the
Lagrangian plan is argmin x + y.

**Reward.** Minus the predicted loss increase, shaped by the potential -(dual bound of what is left) (Ng, Harada, Russell
1999), which changes no optimal policy: a step's reward becomes minus its regret, the reduced cost of the action above
that of the best one, zero for the best. It is paid in errors as an episode's *hypothesis* about the loss model corrects
them. At the end unused bytes cost their price, and a measured episode pays what the measurement was worse than the model.

**Mask.** Actions after which the cheapest actions of the rest no longer fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from windquant.allocation.budget import Choice, cheapest, limit, prices, take
from windquant.allocation.features import REACH, geometry, unit_features
from windquant.allocation.lagrangian import solve
from windquant.allocation.loss_model import LossModel
from windquant.bank import Bank

PRICE_STEPS = np.exp2(np.arange(-16, 17) / 4)  # [K] the price table: 1/16 to 16 times the price at the start
DYNAMIC = 7  # observations that depend on the walk (see `Walk.observe`)


@dataclass(frozen=True)
class Brief:
    """What E episodes are about. Weights are the loss model's [d + A]."""

    targets: NDArray[np.float64]  # [E] bits
    hypothesis: NDArray[np.float64]  # [E, d + A] the loss model that the episode's rewards are counted in
    offset: NDArray[np.float64]  # [E, d + A] part of it that the policy is told; the rest it has to learn


@dataclass(frozen=True)
class Layout:
    """Where an observation [F + DYNAMIC + 2 A] holds what."""

    unit: int  # F features of the unit
    actions: int  # A

    @property
    def size(self) -> int:
        return self.unit + DYNAMIC + 2 * self.actions

    @property
    def errors(self) -> slice:
        """Logarithm of each action's error in bits at the current price, cut to +-REACH."""
        return slice(self.size - 2 * self.actions, self.size - self.actions)

    @property
    def costs(self) -> slice:
        """Cost of each action, bits per weight."""
        return slice(self.size - self.actions, self.size)


class Walk:
    """E episodes in lockstep over the U units of a bank."""

    def __init__(self, bank: Bank, model: LossModel) -> None:
        self.bank, self.model = bank, model
        self.units, self.actions = bank.errors.shape
        self.errors = prices(bank)
        self.available = np.isfinite(self.errors)
        self.lowest = cheapest(bank)
        self.size = bank.bytes.astype(np.float64)  # exact: far below 2^53
        least = take(self.size, self.lowest)
        self.rest = np.append(np.cumsum(least[::-1])[::-1], 0.0)  # [U + 1] bytes of the cheapest plan from a unit on
        self.bit = bank.unit_weights / 8  # [U] bytes of one bit per weight
        self.bits = (self.size / self.bit[:, None]).astype(np.float32)  # [U, A]
        self.features = unit_features(bank)
        self.above = geometry(bank).above
        self.starts = np.append(True, bank.linear[1:] != bank.linear[:-1])  # [U] first chunk of a linear
        self.weights_left = np.append(np.cumsum(bank.unit_weights[::-1])[::-1], 1).astype(np.float64)
        self.layout = Layout(self.features.shape[1], self.actions)
        self.log_errors = np.log(np.maximum(self.errors, 1e-300))
        self.unit = 0

    def begin(self, brief: Brief) -> None:
        """Start E episodes. Raises WindquantError if one of the targets cannot be met."""
        count = len(brief.targets)
        self.brief = brief
        self.unit = 0
        self.choice = np.zeros((count, self.units), dtype=np.int64)
        self.spent_bits = np.zeros((count, self.units), dtype=np.float32)  # bits per weight of the choices so far
        self.left = np.array([limit(self.bank, target) for target in brief.targets], dtype=np.float64)
        self.linear_bits = np.zeros(count, dtype=np.float32)  # mean bits in this linear so far
        errors = self.errors * self.model.multipliers(brief.hypothesis)  # [E, U, A]
        told = self.log_errors + np.log(self.model.multipliers(brief.offset))
        self.told = (told - np.log(self.bit)[:, None]).astype(np.float32)
        self.base = np.array(
            [
                max(solve(errors[e], self.bank.bytes, int(self.left[e]), self.lowest)[1], 1e-290)
                for e in range(count)
            ]
        )  # [E] price at the start, nats per byte
        self.account = self.base * self.bit.mean()  # [E] nats that one bit of an average unit costs at that price
        self.paid = (np.log(np.maximum(errors, 1e-300)) - np.log(self.bit)[:, None]).astype(np.float32)
        # Bytes of the Lagrangian plan of the units from u on, per price: [U + 1, E, K], falling along K.
        table = np.zeros((self.units + 1, count, len(PRICE_STEPS)), dtype=np.float32)
        for k, step in enumerate(PRICE_STEPS):
            plan = (errors + (step * self.base)[:, None, None] * self.size).argmin(axis=2)
            table[:-1, :, k] = self.size[np.arange(self.units), plan].T
        self.table = np.cumsum(table[::-1], axis=0, dtype=np.float32)[::-1]

    def mask(self) -> NDArray[np.bool_]:
        """[E, A] available actions after which the rest still fits. Never empty."""
        fits = self.size[self.unit] + self.rest[self.unit + 1] <= self.left[:, None]
        return self.available[self.unit] & fits

    def log_price(self) -> NDArray[np.float64]:
        """[E] logarithm of the price at which what is left would just be used up, over the price at the start."""
        row = self.table[self.unit]
        count = row.shape[1]
        right = np.clip((row > self.left[:, None]).sum(axis=1), 1, count - 1)
        episode = np.arange(len(row))
        upper, lower = row[episode, right - 1], row[episode, right]
        share = np.clip((upper - self.left) / np.maximum(upper - lower, 1.0), 0.0, 1.0)
        return (right - 1 + share) * (np.log(2) / 4) + np.log(PRICE_STEPS[0])

    def observe(self) -> NDArray[np.float32]:
        """[E, layout.size] the observations."""
        u, count = self.unit, len(self.left)
        result = np.empty((count, self.layout.size), dtype=np.float32)
        price = self.log_price()
        f = self.layout.unit
        result[:, :f] = self.features[u]
        result[:, f] = price
        result[:, f + 1] = 8 * self.left / self.weights_left[u]  # bits per weight that are left
        result[:, f + 2] = 1 - u / self.units  # work left
        result[:, f + 3] = self.brief.targets
        result[:, f + 4] = self.spent_bits[:, u - 1] if u else 0.0
        result[:, f + 5] = 0.0 if self.starts[u] else self.linear_bits
        result[:, f + 6] = self.spent_bits[:, self.above[u]] if self.above[u] >= 0 else 0.0
        log_price = (np.log(self.base) + price).astype(np.float32)
        result[:, self.layout.errors] = np.clip(self.told[:, u] - log_price[:, None], -REACH, REACH)
        result[:, self.layout.costs] = self.bits[u]
        return np.clip(result, -50, 50, out=result)

    def step(self, action: NDArray[np.int64]) -> tuple[NDArray[np.float32], bool]:
        """Take `action` [E]; returns the rewards [E] and whether the walk is over.

        An action that the mask forbids is replaced by the cheapest one, so that no walk can exceed its budget.
        """
        u, episode = self.unit, np.arange(len(action))
        mask = self.mask()
        action = np.where(mask[episode, action], action, self.lowest[u])
        logs = self.paid[:, u] - (np.log(self.base) + self.log_price())[:, None]
        reduced = np.where(mask, np.exp(np.minimum(logs, REACH)) + self.bits[u], np.inf)  # [E, A] bits
        reward = (reduced.min(axis=1) - reduced[episode, action]) * (self.bit[u] / self.bit.mean())
        self.choice[:, u] = action
        self.left = self.left - self.size[u, action]
        bits = self.bits[u, action]
        self.spent_bits[:, u] = bits
        place = self.bank.position[u]
        self.linear_bits = bits if self.starts[u] else self.linear_bits + (bits - self.linear_bits) / (place + 1)
        self.unit += 1
        over = self.unit == self.units
        if over:
            reward = reward - self.left * self.base / self.account  # unused bytes at their price
        return reward.astype(np.float32), over


class AllocationVecEnv(VecEnv):
    """`Walk` for stable-baselines3; `action_masks` makes it fit for MaskablePPO.

    `brief()` says what the next episodes are about; `finish(brief, choice [E, U])` hears how they ended and returns
    additional rewards [E], in nats of the additive loss model.
    """

    def __init__(
        self,
        walk: Walk,
        count: int,
        brief: Callable[[], Brief],
        finish: Callable[[Brief, NDArray[np.int64]], NDArray[np.float64]],
    ) -> None:
        self.walk, self.brief, self.finish = walk, brief, finish
        self.returns = np.zeros(count)
        self.render_mode = None
        super().__init__(count, *_spaces(walk))

    def reset(self) -> VecEnvObs:
        self.walk.begin(self.brief())
        self.returns[:] = 0
        return self.walk.observe()

    def action_masks(self) -> NDArray[np.bool_]:
        return self.walk.mask()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self.chosen = actions

    def step_wait(self) -> VecEnvStepReturn:
        last = self.walk.unit == self.walk.units - 1
        before = self.walk.observe() if last else None
        reward, over = self.walk.step(self.chosen)
        if over:
            reward = reward + self.finish(self.walk.brief, self.walk.choice) / self.walk.account
        self.returns += reward
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if before is None:
            observation = self.walk.observe()
        else:  # there is no unit after the last one: its own observation stands for the terminal one
            for e, info in enumerate(infos):
                info["terminal_observation"] = before[e]
                info["episode"] = {"r": float(self.returns[e]), "l": self.walk.units, "t": 0.0}
            observation = self.reset()
        return observation, reward.astype(np.float32), np.full(self.num_envs, over), infos

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that `restore` needs to go on in the middle of an episode."""
        walk = self.walk
        return {
            "targets": walk.brief.targets,
            "hypothesis": walk.brief.hypothesis,
            "offset": walk.brief.offset,
            "unit": np.array([walk.unit]),
            "choice": walk.choice,
            "spent_bits": walk.spent_bits,
            "left": walk.left,
            "linear_bits": walk.linear_bits,
            "returns": self.returns,
        }

    def restore(self, state: dict[str, NDArray[Any]]) -> VecEnvObs:
        """Go on where `state` was taken; returns the observation."""
        walk = self.walk
        walk.begin(Brief(state["targets"], state["hypothesis"], state["offset"]))
        walk.unit = int(state["unit"][0])
        walk.choice, walk.spent_bits = state["choice"].copy(), state["spent_bits"].copy()
        walk.left, walk.linear_bits = state["left"].copy(), state["linear_bits"].copy()
        self.returns = state["returns"].copy()
        return walk.observe()

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        result = getattr(self, method_name)(*method_args, **method_kwargs)
        return [result[e] for e in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


class AllocationEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    """One episode at a time, for Gymnasium: the same problem with the bank's own errors.

    `measure(choice [U])`, where given, is the loss gap in nats that the end of an episode pays.
    """

    def __init__(
        self, bank: Bank, target_bits: float, measure: Callable[[Choice], float] | None = None
    ) -> None:
        self.model = LossModel(bank)
        self.walk = Walk(bank, self.model)
        self.target, self.measure = target_bits, measure
        self.observation_space, self.action_space = _spaces(self.walk)
        self.walk.begin(plain_brief(self.model, [target_bits]))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.walk.begin(plain_brief(self.model, [self.target]))
        return self.walk.observe()[0], {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        last = self.walk.observe()[0]
        reward, over = self.walk.step(np.array([action], dtype=np.int64))
        total = float(reward[0])
        if over and self.measure is not None:
            choice = self.walk.choice[0]
            total -= (self.measure(choice) - self.model.bank.predicted_loss(choice)) / float(self.walk.account[0])
        return last if over else self.walk.observe()[0], total, over, False, {}

    def action_masks(self) -> NDArray[np.bool_]:
        return self.walk.mask()[0]


def plain_brief(model: LossModel, targets: Sequence[float]) -> Brief:
    """Episodes with the bank's own errors."""
    none = np.zeros((len(targets), model.size))
    return Brief(np.array(targets, dtype=np.float64), none, none)


def _spaces(walk: Walk) -> tuple[spaces.Box, spaces.Discrete]:
    return spaces.Box(-50, 50, (walk.layout.size,), np.float32), spaces.Discrete(walk.actions)
