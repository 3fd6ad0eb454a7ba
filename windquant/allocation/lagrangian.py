"""Lagrangian: the best plan for the additive loss model, as a multiple-choice knapsack.

For a price lambda (nats per byte) every unit takes argmin_a error + lambda bytes, a vertex of its lower convex hull.
Bisection finds the smallest price whose plan fits; `fill` spends the rest. By weak duality the plan is within
lambda x (bytes that the bisection left) of the optimum: with thousands of units, next to nothing.
"""

import numpy as np
from numpy.typing import NDArray

from windquant.allocation.budget import Choice, cheapest, fill, limit, prices, take
from windquant.bank import Bank


def allocate(bank: Bank, target_bits: float, seed: int = 0) -> Choice:
    """[U] the plan; `seed` is not used. Raises WindquantError if the target cannot be met."""
    budget = limit(bank, target_bits)
    choice, _ = solve(prices(bank), bank.bytes, budget, cheapest(bank))
    return fill(bank, choice, budget)


def solve(errors: NDArray[np.float64], size: NDArray[np.int64], budget: int, lowest: Choice) -> tuple[Choice, float]:
    """The plan [U] of the smallest price that fits into `budget` bytes, and that price (nats per byte).

    `errors` [U, A] in nats (inf: not available), `size` [U, A] in bytes, `lowest` [U] the cheapest plan (it fits).
    """

    def plan(price: float) -> Choice:
        return (errors + price * size).argmin(axis=1)  # ties go to the first, that is, cheapest action

    def fits(choice: Choice) -> bool:
        return bool(take(size, choice).sum() <= budget)

    if fits(choice := plan(0.0)):
        return choice, 0.0
    low, high = 0.0, ceiling(errors, size, lowest)
    best = lowest
    while high - low > 1e-12 * high:
        middle = (low * high) ** 0.5 if low > 1e-3 * high else (low + high) / 2
        choice = plan(middle)
        if fits(choice):
            best, high = choice, middle
        else:
            low = middle
        if high < 1e-300:  # every error is zero
            break
    return best, high


def ceiling(errors: NDArray[np.float64], size: NDArray[np.int64], lowest: Choice) -> float:
    """A price (nats per byte) at which no unit pays for more than its cheapest action [U]."""
    extra = size - take(size, lowest)[:, None]
    gain = take(errors, lowest)[:, None] - errors
    ratio = np.where((extra > 0) & (gain > 0), gain, 0.0) / np.maximum(extra, 1)
    return float(ratio.max()) * 2 + 1e-290
