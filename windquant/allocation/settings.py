"""What a user can set of the allocation; separate from the search, whose imports cost seconds."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SearchSettings:
    """Of the learned allocator; the others need none."""

    episodes: int = 200  # plans that the policy makes while it learns
    evaluations: int = 32  # plans whose loss is measured on the reward split, the Lagrangian plan included
    curriculum: tuple[float, ...] = (3.0, 2.5)  # targets before the real one; those below it are left out
    epochs: int = 3  # passes of PPO over every rollout
    learning_rate: float = 5e-4  # of PPO
    n_envs: int = 16  # episodes at a time
    hidden: int = 64  # width of the policy's and the critic's two layers


@dataclass(frozen=True)
class Settings(SearchSettings):
    """Of the step."""

    target_bits: float = 2.0  # upper bound on the effective bits
    allocator: Literal["ppo", "uniform", "greedy", "lagrangian", "random"] = "ppo"  # what makes the plan
    reward_tokens: int = 1024  # tokens of the reward split that a measured loss is taken on
