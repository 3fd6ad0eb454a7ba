"""Allocation: one action for every unit, so that the plan meets a target of effective bits.

These are the settings of the search and of the plan, apart from both because their imports cost seconds.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from windquant.errors import WindquantError
from windquant.settings import Bits, Count, Length, Limit, Natural

Range = Annotated[tuple[Bits, ...], Limit("minItems", 1), Limit("maxItems", 2)]


@dataclass(frozen=True)
class MeasureSettings:
    """Of whatever measures plans on the model."""

    evaluations: Natural = 16  # plans whose loss is measured on the reward split; 0: predicted losses alone pay
    reward_tokens: Length = 2048  # tokens of the reward split that a measured loss is taken on


@dataclass(frozen=True)
class SearchSettings(MeasureSettings):
    """Of the search for a policy."""

    targets: Range = (1.5, 4.0)  # bits that the policy is made for: from, to; or a single budget
    curriculum: tuple[Bits, ...] = (3.0, 2.5)  # lowest targets of the first episodes
    episodes: Count = 128  # plans that the policy makes while it learns
    epochs: Count = 3  # passes of PPO over every rollout
    learning_rate: Annotated[float, Limit("exclusiveMinimum", 0)] = 5e-4  # of PPO
    n_envs: Annotated[int, Limit("minimum", 2)] = 16  # episodes at a time
    hidden: Count = 64  # width of the policy's and the critic's two layers
    warm_start: bool = True  # the policy starts as the Lagrangian plan, not as a network that knows nothing
    per: Literal["chunk", "layer"] = "chunk"  # what one decision is about

    def __post_init__(self) -> None:
        if self.targets[0] > self.targets[-1]:
            shown = ", ".join(f"{bits:g}" for bits in self.targets)
            raise WindquantError(f"search.targets: {shown} is no range; give two targets, from and to, or one")


@dataclass(frozen=True)
class Settings(MeasureSettings):
    """Of the plan."""

    target_bits: Bits = 2.0  # upper bound on the effective bits
    allocator: Literal["ppo", "uniform", "greedy", "lagrangian", "random", "layer", "evolution"] = (
        "ppo"  # what makes the plan
    )
    transfer: bool = False  # take a policy that was made with another bank, if it can read this one's units
    confirm: bool = True  # the learned plan is taken only where it beats the Lagrangian one, both really quantized
