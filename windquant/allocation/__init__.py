"""Allocators: what makes a plan from a bank and a budget.

Each one is a file with `allocate(bank, target_bits, seed) -> int[U]`, listed here. Those that measure plans are beside
them: `ppo` takes a policy that decides chunk by chunk (`windquant.allocation.ppo`), `layer` one that decides layer by
layer, and `evolution` knows nothing but its measurements.
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
ALLOCATORS = ("ppo", *BASELINES, "layer", "evolution")
