"""The allocation as a sequential decision problem: one step per unit in model order, under one budget.

Many episodes at once, in numpy: all of them are at the same unit, so what depends on the unit only is computed once.

**Prices.** The budget that is left determines a price (nats per byte): the one at which the Lagrangian plan of the rest
of the units would just use it up. It is looked up in a table, so a walk that spent too much so far sees higher prices
and comes back. At that price an error is worth x bits and an action costs y bits, whatever the model's size; the
Lagrangian plan is argmin x + y.

**Reward.** Minus the predicted loss increase, shaped by the potential -(dual bound of what is left), which changes no
optimal policy (Ng, Harada, Russell 1999). What comes out is minus the action's regret, its x + y above the smallest one
(exactly up to the price's change within one step). It is paid in errors as the episode's *hypothesis* about the loss
model corrects them. At the end unused bytes cost their price.

**Mask.** Actions after which the cheapest actions of the rest would no longer fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from windquant.allocation.budget import cheapest, limit, prices, take
from windquant.allocation.features import REACH, geometry, unit_features
from windquant.allocation.lagrangian import ceiling, solve
from windquant.allocation.loss_model import LossModel
from windquant.bank import Bank

PRICE_STEPS = np.exp2(np.arange(-16, 17) / 4)  # [K] the price table: 1/16 to 16 times the price at the start
DYNAMIC = 7  # observations that depend on the walk (see `Walk.observe`)


@dataclass(frozen=True)
class Brief:
    """What E episodes are about. Weights are the loss model's [d + A]."""

    targets: NDArray[np.float64]  # [E] bits
    hypothesis: NDArray[np.float64]  # [E, d + A] the loss model that the episode's rewards are counted in
    offset: NDArray[np.float64]  # [E, d + A] part of it that the policy is told; the rest it has to learn


@dataclass(frozen=True)
class Layout:
    """Where an observation [F + DYNAMIC + 2 A] holds what."""

    unit: int  # F features of the unit
    actions: int  # A

    @property
    def size(self) -> int:
        return self.unit + DYNAMIC + 2 * self.actions

    @property
    def errors(self) -> slice:
        """Logarithm of each action's error in bits at the current price, cut to +-REACH."""
        return slice(self.size - 2 * self.actions, self.size - self.actions)

    @property
    def costs(self) -> slice:
        """Cost of each action, bits per weight."""
        return slice(self.size - self.actions, self.size)


class Walk:
    """E episodes in lockstep over the U units of a bank."""

    def __init__(self, bank: Bank, model: LossModel) -> None:
        self.bank, self.model = bank, model
        self.units, self.actions = bank.errors.shape
        self.errors = prices(bank)
        self.available = np.isfinite(self.errors)
        self.lowest = cheapest(bank)
        self.size = bank.bytes.astype(np.float64)  # exact: far below 2^53
        least = take(self.size, self.lowest)
        self.rest = np.append(np.cumsum(least[::-1])[::-1], 0.0)  # [U + 1] bytes of the cheapest plan from a unit on
        self.bit = bank.unit_weights / 8  # [U] bytes of one bit per weight
        self.bits = (self.size / self.bit[:, None]).astype(np.float32)  # [U, A]
        _, self.features = unit_features(bank)
        self.above = geometry(bank).above
        self.starts = np.append(True, bank.linear[1:] != bank.linear[:-1])  # [U] first chunk of a linear
        self.weights_left = np.append(np.cumsum(bank.unit_weights[::-1])[::-1], 1).astype(np.float64)
        self.layout = Layout(self.features.shape[1], self.actions)
        self.log_errors = np.log(np.maximum(self.errors, 1e-300))
        self.unit = 0

    def begin(self, brief: Brief) -> None:
        """Start E episodes. Raises WindquantError if one of the targets cannot be met."""
        count = len(brief.targets)
        self.brief = brief
        self.unit = 0
        self.choice = np.zeros((count, self.units), dtype=np.int64)
        self.spent_bits = np.zeros((count, self.units), dtype=np.float32)  # bits per weight of the choices so far
        self.left = np.array([limit(self.bank, target) for target in brief.targets], dtype=np.float64)
        self.linear_bits = np.zeros(count, dtype=np.float32)  # mean bits in this linear so far
        errors = self.errors * self.model.multipliers(brief.hypothesis)  # [E, U, A]
        told = self.log_errors + np.log(self.model.multipliers(brief.offset))
        self.told = (told - np.log(self.bit)[:, None]).astype(np.float32)
        self.base = np.array(
            [self._price(errors[e], self.left[e]) for e in range(count)]
        )  # [E] nats per byte, at first
        self.account = self.base * self.bit.mean()  # [E] nats that one bit of an average unit costs at that price
        self.paid = (np.log(np.maximum(errors, 1e-300)) - np.log(self.bit)[:, None]).astype(np.float32)
        # Bytes of the Lagrangian plan of the units from u on, per price: [U + 1, E, K], falling along K.
        table = np.zeros((self.units + 1, count, len(PRICE_STEPS)), dtype=np.float32)
        for k, step in enumerate(PRICE_STEPS):
            plan = (errors + (step * self.base)[:, None, None] * self.size).argmin(axis=2)
            table[:-1, :, k] = self.size[np.arange(self.units), plan].T
        self.table = np.cumsum(table[::-1], axis=0, dtype=np.float32)[::-1]

    def _price(self, errors: NDArray[np.float64], budget: float) -> float:
        """The Lagrangian price of all units, nats per byte; positive even where bytes are worth nothing any more."""
        _, price = solve(errors, self.bank.bytes, int(budget), self.lowest)
        return max(price, 1e-6 * ceiling(errors, self.bank.bytes, self.lowest))

    def mask(self) -> NDArray[np.bool_]:
        """[E, A] available actions after which the rest still fits. Never empty."""
        fits = self.size[self.unit] + self.rest[self.unit + 1] <= self.left[:, None]
        return self.available[self.unit] & fits

    def log_price(self) -> NDArray[np.float64]:
        """[E] logarithm of the price at which what is left would just be used up, over the price at the start."""
        row = self.table[self.unit]
        count = row.shape[1]
        right = np.clip((row > self.left[:, None]).sum(axis=1), 1, count - 1)
        episode = np.arange(len(row))
        upper, lower = row[episode, right - 1], row[episode, right]
        share = np.clip((upper - self.left) / np.maximum(upper - lower, 1.0), 0.0, 1.0)
        return (right - 1 + share) * (np.log(2) / 4) + np.log(PRICE_STEPS[0])

    def observe(self) -> NDArray[np.float32]:
        """[E, layout.size] the observations."""
        u, count = self.unit, len(self.left)
        result = np.empty((count, self.layout.size), dtype=np.float32)
        price = self.log_price()
        f = self.layout.unit
        result[:, :f] = self.features[u]
        result[:, f] = price
        result[:, f + 1] = 8 * self.left / self.weights_left[u]  # bits per weight that are left
        result[:, f + 2] = 1 - u / self.units  # work left
        result[:, f + 3] = self.brief.targets
        result[:, f + 4] = self.spent_bits[:, u - 1] if u else 0.0
        result[:, f + 5] = 0.0 if self.starts[u] else self.linear_bits
        result[:, f + 6] = self.spent_bits[:, self.above[u]] if self.above[u] >= 0 else 0.0
        log_price = (np.log(self.base) + price).astype(np.float32)
        result[:, self.layout.errors] = np.clip(self.told[:, u] - log_price[:, None], -REACH, REACH)
        result[:, self.layout.costs] = self.bits[u]
        return np.clip(result, -50, 50, out=result)

    def step(self, action: NDArray[np.int64]) -> tuple[NDArray[np.float32], bool]:
        """Take `action` [E]; returns the rewards [E] and whether the walk is over.

        An action that the mask forbids is replaced by the cheapest one, so that no walk can exceed its budget.
        """
        u, episode = self.unit, np.arange(len(action))
        mask = self.mask()
        action = np.where(mask[episode, action], action, self.lowest[u])
        logs = self.paid[:, u] - (np.log(self.base) + self.log_price())[:, None]
        reduced = np.where(mask, np.exp(np.minimum(logs, REACH)) + self.bits[u], np.inf)  # [E, A] bits
        reward = (reduced.min(axis=1) - reduced[episode, action]) * (self.bit[u] / self.bit.mean())
        self.choice[:, u] = action
        self.left = self.left - self.size[u, action]
        bits = self.bits[u, action]
        self.spent_bits[:, u] = bits
        place = self.bank.position[u]
        self.linear_bits = bits if self.starts[u] else self.linear_bits + (bits - self.linear_bits) / (place + 1)
        self.unit += 1
        over = self.unit == self.units
        if over:
            reward = reward - self.left / self.bit.mean()  # unused bytes at the price
        return reward.astype(np.float32), over


def plain_brief(model: LossModel, targets: Sequence[float]) -> Brief:
    """Episodes with the bank's own errors."""
    none = np.zeros((len(targets), model.size))
    return Brief(np.array(targets, dtype=np.float64), none, none)
