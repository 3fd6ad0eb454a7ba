"""The walk through the units for stable-baselines3 (`AllocationVecEnv`) and for Gymnasium (`AllocationEnv`)."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from windquant.allocation.budget import Choice
from windquant.allocation.loss_model import LossModel
from windquant.allocation.walk import Brief, Walk, plain_brief
from windquant.bank import Bank


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

    def reset(self) -> NDArray[np.float32]:
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

    def restore(self, state: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
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


class AllocationEnv(gymnasium.Env[NDArray[Any], np.int64]):
    """One episode at a time, for Gymnasium: the same problem with the bank's own errors.

    `measure(choice [U])`, where given, is the loss gap in nats that the end of an episode pays.
    """

    def __init__(self, bank: Bank, target_bits: float, measure: Callable[[Choice], float] | None = None) -> None:
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


def _spaces(walk: Walk) -> tuple[spaces.Box, spaces.Discrete]:
    return spaces.Box(-50, 50, (walk.layout.size,), np.float32), spaces.Discrete(walk.actions)
