"""Random: a feasible plan by chance, the floor of every comparison.

Everything starts at its cheapest action; units in random order then take their next width with probability 1/2, round
after round, until no upgrade fits any more.
"""

import numpy as np

from windquant.allocation.budget import Choice, cheapest, ladder, limit, take
from windquant.bank import Bank


def allocate(bank: Bank, target_bits: float, seed: int = 0) -> Choice:
    """[U] the plan, the same for the same seed. Raises WindquantError if the target cannot be met."""
    budget = limit(bank, target_bits)
    random = np.random.default_rng(seed)
    step, choice = ladder(bank), cheapest(bank)
    left = budget - int(take(bank.bytes, choice).sum())
    while True:
        following = take(step, choice)
        extra = take(bank.bytes, following) - take(bank.bytes, choice)
        possible = np.flatnonzero((following >= 0) & (extra <= left))
        if len(possible) == 0:
            return choice
        for unit in random.permutation(possible):
            if random.random() < 0.5 and extra[unit] <= left:
                choice[unit] = following[unit]
                left -= int(extra[unit])
