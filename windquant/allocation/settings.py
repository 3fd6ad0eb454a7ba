"""Allocation: one action for every unit, so that the plan meets a target of effective bits.

These are the settings of the search and of the plan, apart from both because their imports cost seconds.
"""

from dataclasses import dataclass
from typing import Literal

from windquant.errors import WindquantError


@dataclass(frozen=True)
class MeasureSettings:
    """Of whatever measures plans on the model."""

    evaluations: int = 16  # plans whose loss is measured on the reward split; 0: predicted losses alone pay
    reward_tokens: int = 2048  # tokens of the reward split that a measured loss is taken on

    def __post_init__(self) -> None:
        if self.evaluations < 0:
            raise WindquantError(f"search.evaluations: {self.evaluations} is too few; give at least 0")
        if self.reward_tokens < 2:
            raise WindquantError(f"search.reward_tokens: {self.reward_tokens} is too few; give at least 2")


@dataclass(frozen=True)
class SearchSettings(MeasureSettings):
    """Of the search for a policy."""

    targets: tuple[float, ...] = (1.5, 4.0)  # bits that the policy is made for: from, to; or a single budget
    curriculum: tuple[float, ...] = (3.0, 2.5)  # lowest targets of the first episodes
    episodes: int = 128  # plans that the policy makes while it learns
    epochs: int = 3  # passes of PPO over every rollout
    learning_rate: float = 5e-4  # of PPO
    n_envs: int = 16  # episodes at a time
    hidden: int = 64  # width of the policy's and the critic's two layers
    warm_start: bool = True  # the policy starts as the Lagrangian plan, not as a network that knows nothing
    per: Literal["chunk", "layer"] = "chunk"  # what one decision is about

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, lowest in (("episodes", 1), ("epochs", 1), ("n_envs", 2), ("hidden", 1)):
            if (value := getattr(self, name)) < lowest:
                raise WindquantError(f"search.{name}: {value} is too few; give at least {lowest}")
        if not self.learning_rate > 0:
            raise WindquantError(f"search.learning_rate: {self.learning_rate:g} must be above 0")
        targets = self.targets
        if len(targets) not in (1, 2) or not all(0 < bits <= 16 for bits in targets) or targets[0] > targets[-1]:
            shown = ", ".join(f"{bits:g}" for bits in targets) or "nothing"
            raise WindquantError(f"search.targets: {shown} is no range; give two targets, from and to, or one")


@dataclass(frozen=True)
class Settings(MeasureSettings):
    """Of the plan."""

    target_bits: float = 2.0  # upper bound on the effective bits
    allocator: Literal["ppo", "uniform", "greedy", "lagrangian", "random", "layer", "evolution"] = (
        "ppo"  # what makes the plan
    )
    transfer: bool = False  # take a policy that was made with another bank, if it can read this one's units
    confirm: bool = True  # the learned plan is taken only where it beats the Lagrangian one, both really quantized

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_bits <= 16:
            raise WindquantError(f"target_bits: {self.target_bits:g} is impossible; give up to 16 bits per weight")
