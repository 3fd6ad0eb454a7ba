"""Uniform: the same action for every unit, as far as that goes.

All units take the dearest action that fits everywhere. One action everywhere hits a budget by accident only, so the
rest upgrades units to the next action in model order, one after another: all allocators are compared at equal bits.
"""

import numpy as np

from windquant.allocation.budget import Choice, cheapest, fill, ladder, limit, prices, take
from windquant.bank import Bank


def allocate(bank: Bank, target_bits: float, seed: int = 0) -> Choice:
    """[U] the plan; `seed` is not used. Raises WindquantError if the target cannot be met."""
    budget = limit(bank, target_bits)
    choice = cheapest(bank)
    for action in range(len(bank.actions)):
        if take(bank.bytes, candidate := everywhere(bank, action)).sum() <= budget:
            choice = candidate
    left = budget - int(take(bank.bytes, choice).sum())
    upgrade = take(ladder(bank), choice)
    extra = take(bank.bytes, upgrade) - take(bank.bytes, choice)
    for unit in np.flatnonzero(upgrade >= 0):
        if extra[unit] <= left:
            choice[unit] = upgrade[unit]
            left -= int(extra[unit])
    return fill(bank, choice, budget)


def everywhere(bank: Bank, action: int) -> Choice:
    """[U] `action`, or where it is not available the next cheaper one, or else the cheapest."""
    usable = np.isfinite(prices(bank))[:, : action + 1]
    last = action - usable[:, ::-1].argmax(axis=1)
    return np.where(usable.any(axis=1), last, cheapest(bank))
