"""Greedy by sensitivity: the paper's deterministic heuristic.

Everything starts at its cheapest action; then, until the budget is spent, the unit whose *next* width takes away the
most predicted loss per byte gets it. Looks one step ahead only: unlike the Lagrangian plan it never jumps over a width
that is a bad buy, and it never takes back.
"""

from heapq import heapify, heappop, heappush

from windquant.allocation.budget import Choice, cheapest, fill, ladder, limit, prices
from windquant.bank import Bank


def allocate(bank: Bank, target_bits: float, seed: int = 0) -> Choice:
    """[U] the plan; `seed` is not used. Raises WindquantError if the target cannot be met."""
    budget = limit(bank, target_bits)
    errors, size, step = prices(bank).tolist(), bank.bytes.tolist(), ladder(bank).tolist()
    choice = cheapest(bank)
    left = budget - sum(size[u][a] for u, a in enumerate(choice))

    def sensitivity(unit: int, action: int) -> float:
        """Loss per byte of the step from `action` to the next one, negative for the heap."""
        following = step[unit][action]
        return -(errors[unit][action] - errors[unit][following]) / (size[unit][following] - size[unit][action])

    heap = [(sensitivity(u, a), u) for u, a in enumerate(choice.tolist()) if step[u][a] >= 0]
    heapify(heap)
    while heap:
        _, unit = heappop(heap)
        action = int(choice[unit])
        following = step[unit][action]
        extra = size[unit][following] - size[unit][action]
        if extra > left:
            continue  # the budget never grows again: this unit is done
        choice[unit], left = following, left - extra
        if step[unit][following] >= 0:
            heappush(heap, (sensitivity(unit, following), unit))
    return fill(bank, choice, budget)
