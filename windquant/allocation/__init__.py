"""Allocators: what makes a plan from a bank and a budget.

Each one is a file with `allocate(bank, target_bits, seed) -> int[U]`, listed here. The learned one, `ppo`, also needs a
way to measure plans and is in `windquant.allocation.ppo`.
"""

from collections.abc import Callable

from windquant.allocation import greedy, lagrangian, randomized, uniform
from windquant.allocation.budget import Choice
from windquant.bank import Bank

BASELINES: dict[str, Callable[[Bank, float, int], Choice]] = {
    "uniform": uniform.allocate,
    "greedy": greedy.allocate,
    "lagrangian": lagrangian.allocate,
    "random": randomized.allocate,
}
ALLOCATORS = ("ppo", *BASELINES)
