"""Allocation: one action for every unit, so that the plan meets a target of effective bits.

These are the step's settings, apart from the search because its imports cost seconds.
"""

from dataclasses import dataclass
from typing import Literal

from windquant.errors import WindquantError


@dataclass(frozen=True)
class SearchSettings:
    """Of the learned allocator; the others need none."""

    episodes: int = 128  # plans that the policy makes while it learns
    evaluations: int = 16  # plans whose loss is measured on the reward split, the Lagrangian plan included
    curriculum: tuple[float, ...] = (3.0, 2.5)  # targets before the real one; those below it are left out
    epochs: int = 3  # passes of PPO over every rollout
    learning_rate: float = 5e-4  # of PPO
    n_envs: int = 16  # episodes at a time
    hidden: int = 64  # width of the policy's and the critic's two layers

    def __post_init__(self) -> None:
        for name, lowest in (("episodes", 1), ("evaluations", 0), ("epochs", 1), ("n_envs", 2), ("hidden", 1)):
            if (value := getattr(self, name)) < lowest:
                raise WindquantError(f"search.{name}: {value} is too few; give at least {lowest}")
        if not self.learning_rate > 0:
            raise WindquantError(f"search.learning_rate: {self.learning_rate:g} must be above 0")


@dataclass(frozen=True)
class Settings(SearchSettings):
    """Of the step."""

    target_bits: float = 2.0  # upper bound on the effective bits
    allocator: Literal["ppo", "uniform", "greedy", "lagrangian", "random"] = "ppo"  # what makes the plan
    reward_tokens: int = 2048  # tokens of the reward split that a measured loss is taken on

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_bits <= 16:
            raise WindquantError(f"target_bits: {self.target_bits:g} is impossible; give up to 16 bits per weight")
        if self.reward_tokens < 2:
            raise WindquantError(f"search.reward_tokens: {self.reward_tokens} is too few; give at least 2")
