"""What all allocators share: the budget, the actions that can be used, and the last bytes of a plan."""

from heapq import heapify, heappop, heappush
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from windquant.bank import Bank
from windquant.errors import WindquantError

Choice = NDArray[np.int64]  # [U] index of one action per unit
T = TypeVar("T", bound=np.generic)


def prices(bank: Bank) -> NDArray[np.float64]:
    """[U, A] predicted loss increases in nats per token, inf where an action is not available (its fit failed).

    Raises WindquantError if a unit is left without any action.
    """
    errors = np.where(np.isfinite(bank.errors), bank.errors, np.inf)
    dead = np.flatnonzero(~np.isfinite(errors).any(axis=1))
    if len(dead):
        name = bank.linears[bank.linear[dead[0]]].name
        raise WindquantError(
            f"bank: no action of {name}, chunk {bank.position[dead[0]]}, has a finite error; "
            "check the weights and the statistics for NaN, then build the bank again"
        )
    return errors


def cheapest(bank: Bank) -> Choice:
    """[U] the available action with the fewest bytes; among equals the one with the smaller error."""
    errors = prices(bank)
    size = np.where(np.isfinite(errors), bank.bytes, np.iinfo(np.int64).max)
    tied = size == size.min(axis=1, keepdims=True)
    return np.where(tied, errors, np.inf).argmin(axis=1)


def highest(bank: Bank) -> float:
    """The target from which on every unit can have its best action."""
    return float(np.ceil(bank.effective_bits(prices(bank).argmin(axis=1)) * 1e4) / 1e4)


def limit(bank: Bank, target_bits: float) -> int:
    """Bytes that the units may take under the target; raises WindquantError if not even the cheapest plan fits."""
    budget = bank.budget(target_bits)
    if take(bank.bytes, cheapest(bank)).sum() > budget:
        raise WindquantError(
            f"target_bits {target_bits:g} is below what this bank allows: with scales, orders and protected columns "
            f"the lowest possible target is {bank.lowest_bits():.4f}; "
            "ask for more bits, larger chunks or less protection"
        )
    return budget


def take(table: NDArray[T], choice: Choice) -> NDArray[T]:
    """[U] the entries of `table` [U, A] that `choice` [U] points to."""
    return table[np.arange(len(choice)), choice]


def ladder(bank: Bank) -> Choice:
    """[U, A] the next action on every unit's ladder, -1 at its top.

    The ladder holds the actions that cost more bytes and have a smaller error than the one before; from an action that
    is not on it (another one is smaller *and* better) the next step is the first rung that is better.
    """
    errors = prices(bank)
    result = np.full(errors.shape, -1, dtype=np.int64)
    for current in range(errors.shape[1]):
        better = errors < errors[:, current, None]
        dearer = bank.bytes > bank.bytes[:, current, None]
        size = np.where(better & dearer, bank.bytes, np.iinfo(np.int64).max)
        tied = size == size.min(axis=1, keepdims=True)
        step = np.where(tied, errors, np.inf).argmin(axis=1)
        result[:, current] = np.where((better & dearer).any(axis=1), step, -1)
    return result


def fill(bank: Bank, choice: Choice, budget: int) -> Choice:
    """Spend what `choice` [U] leaves of `budget` (bytes).

    Again and again the upgrade with the most gain per byte of all that fit; it may jump over actions. Deterministic:
    ties go to the earlier unit. O(U A log U).
    """
    errors = prices(bank)
    choice = np.array(choice, dtype=np.int64)
    left = budget - int(take(bank.bytes, choice).sum())

    def best(units: NDArray[np.int64]) -> tuple[NDArray[np.float64], Choice]:
        """For each of `units`: gain per byte of its best upgrade that still fits (0: none), and its action."""
        now = choice[units]
        extra = bank.bytes[units] - bank.bytes[units, now][:, None]
        gain = errors[units, now][:, None] - errors[units]
        fits = (extra > 0) & (extra <= left) & (gain > 0)
        ratio = np.where(fits, gain, 0.0) / np.where(fits, extra, 1)
        action = ratio.argmax(axis=1)
        return take(ratio, action), action

    ratio, action = best(np.arange(len(choice)))
    heap = [(-r, u, a) for u, (r, a) in enumerate(zip(ratio.tolist(), action.tolist(), strict=True)) if r > 0]
    heapify(heap)
    while heap:
        _, unit, wanted = heappop(heap)
        extra = int(bank.bytes[unit, wanted] - bank.bytes[unit, choice[unit]])
        if extra <= left:
            choice[unit], left = wanted, left - extra
        ratio, action = best(np.array([unit]))
        if ratio[0] > 0:
            heappush(heap, (-float(ratio[0]), unit, int(action[0])))
    return choice
