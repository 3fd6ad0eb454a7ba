"""Layer by layer: the bank in which every linear is one unit, for a policy that decides once a linear.

This is how mixed precision is usually allocated (one width per layer, by reinforcement learning since HAQ,
arXiv 1811.08886), and so the baseline that says what deciding chunk by chunk is worth.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from windquant.allocation.budget import Choice
from windquant.bank import Bank


def merged(bank: Bank) -> Bank:
    """The bank whose units are the linears. An action is available where it is for all chunks of a linear."""
    count = len(bank.linears)

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[L, ...] sums over the units [U, ...] of every linear."""
        result = np.zeros((count, *values.shape[1:]))
        np.add.at(result, bank.linear, values)
        return result

    width = np.bincount(bank.linear, bank.width, count)
    return dataclasses.replace(
        bank,
        linear=np.arange(count, dtype=np.int32),
        position=np.zeros(count, np.int32),
        width=width.astype(np.int32),
        energy=total(bank.energy * bank.width) / width,
        errors=total(bank.errors),
        bytes=total(bank.bytes.astype(np.float64)).astype(np.int64),  # exact: far below 2^53
    )


def spread(bank: Bank, choice: Choice) -> Choice:
    """[U] the units' actions of a choice [L] by linear."""
    return choice[bank.linear]
