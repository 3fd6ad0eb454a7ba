"""The loss model: what the bank predicts, corrected by what was measured.

The bank says that a plan costs sum_u error[u, a_u]; at 2 bits that is wrong, in a way that a few dozen measurements can
teach. The model

    log measured = offset + power L + bend L^2,    L = log sum_u error[u, a_u] exp(phi_u w + v_a)

multiplies the errors along a few directions (`features.corrections`: kind of linear, depth, saliency) and per action,
and saturates as a whole (errors overlap), at one budget more than at another: that is what makes plans of all budgets
teach the same multipliers. With priors w ~ N(0, 1), v ~ N(0, 0.2^2), power ~ N(0.8, 0.2^2), bend ~ N(0, 0.1^2) the
parameters are the most probable ones given all measurements (Levenberg-Marquardt, a few milliseconds), and their
posterior (Laplace) tells what is still unknown. Without measurements the errors are the bank's.

This is how a reward that comes once in thousands of decisions gets its credit: the end of an episode refits the model,
and the model's corrected errors are what the single decisions are paid for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from windquant.allocation.budget import Choice, prices, take
from windquant.allocation.features import corrections
from windquant.bank import Bank

ACTION_SPREAD = 0.2  # prior standard deviation of the logarithm of an action's multiplier
OFFSET_SPREAD = 2.0
POWER, POWER_SPREAD = 0.8, 0.2
BEND_SPREAD = 0.1
NOISE = 0.02  # relative, of what the directions cannot explain, and its smallest value: see docs/decisions.md
Vector = NDArray[np.float64]
FLOOR = 0.02  # gaps below this share of the predicted one say nothing more: the logarithm stays finite


@dataclass
class LossModel:
    """Weights are [d + A]: the directions' w, then the actions' v. `believed` are those before any measurement."""

    bank: Bank
    believed: Vector | None = None  # [d + A]; None: zeros, the bank's own errors
    names: list[str] = field(init=False)  # [d] of the directions
    phi: NDArray[np.float64] = field(init=False)  # [U, d]
    plans: list[Choice] = field(default_factory=list)  # measured ones
    losses: list[float] = field(default_factory=list)  # their measured loss gaps, nats per token

    def __post_init__(self) -> None:
        self.names, self.phi = corrections(self.bank)
        self.errors = prices(self.bank)
        self.size = self.phi.shape[1] + len(self.bank.actions)
        scale = np.r_[np.ones(self.phi.shape[1]), np.full(len(self.bank.actions), ACTION_SPREAD)]
        believed = np.zeros(self.size) if self.believed is None else self.believed
        self._prior_mean = np.r_[believed, 0.0, POWER, 0.0]
        self._prior_spread = np.r_[scale, OFFSET_SPREAD, POWER_SPREAD, BEND_SPREAD]
        self._theta = self._prior_mean.copy()
        self._precision = np.diag(self._prior_spread**-2)

    @property
    def weights(self) -> NDArray[np.float64]:
        """[d + A] the most probable weights."""
        return self._theta[: self.size].copy()

    def sample(self, random: np.random.Generator) -> NDArray[np.float64]:
        """[d + A] weights from the posterior: one hypothesis that the measurements so far do not exclude."""
        root = np.linalg.cholesky(self._precision)
        return (self._theta + np.linalg.solve(root.T, random.standard_normal(len(self._theta))))[: self.size]

    def multipliers(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., U, A] factors on the bank's errors under `weights` [..., d + A]."""
        split = self.phi.shape[1]
        return np.exp((weights[..., :split] @ self.phi.T)[..., None] + weights[..., None, split:])

    def predict(self, choice: Choice) -> float:
        """Expected measured loss gap of a plan [U], nats per token; 0 for one without errors."""
        total = take(self.errors * self.multipliers(self._theta[: self.size]), choice).sum()
        if total == 0:
            return 0.0
        offset, power, bend = self._theta[self.size :]
        return float(np.exp(offset + power * np.log(total) + bend * np.log(total) ** 2))

    def add(self, choice: Choice, loss: float) -> None:
        """Learn from one measurement. A loss that is not finite, or of a plan without errors, is kept but not learned
        from.
        """
        self.plans.append(np.array(choice))
        self.losses.append(float(loss))
        self._fit()

    def _fit(self) -> None:
        losses, plans = np.array(self.losses), np.array(self.plans)
        error = np.stack([take(self.errors, plan) for plan in plans])  # [n, U]
        good = np.isfinite(losses) & (error.sum(axis=1) > 0)
        if not (losses[good] > 0).any():
            return  # nothing to learn from: the loss does not rise at all
        plans, error = plans[good], error[good]
        logs = np.log(np.maximum(losses[good], FLOOR * error.sum(axis=1)))
        split, count = self.phi.shape[1], len(self.bank.actions)

        def residual(theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            """[n] what is not explained, and its negative Jacobian [n, d + A + 3]."""
            part = error * np.exp(self.phi @ theta[:split] + theta[split : self.size][plans])
            total = part.sum(axis=1)
            by_action = np.stack([(part * (plans == action)).sum(axis=1) for action in range(count)], axis=1)
            log = np.log(total)
            offset, power, bend = theta[self.size :]
            steepness = (power + 2 * bend * log) / total
            slope = steepness[:, None] * np.concatenate([part @ self.phi, by_action], axis=1)
            explained = offset + power * log + bend * log**2
            return logs - explained, np.column_stack([slope, np.ones_like(log), log, log**2])

        noise = NOISE
        for _ in range(2):  # once with the smallest noise, once with the one that this leaves
            self._theta, self._precision, rest = most_probable(
                residual, self._theta, self._prior_mean, self._prior_spread, noise
            )
            noise = max(NOISE, float(np.sqrt((rest**2).mean())))


def most_probable(
    residual: Callable[[Vector], tuple[Vector, Vector]], start: Vector, mean: Vector, spread: Vector, noise: float
) -> tuple[Vector, Vector, Vector]:
    """Minimize |residual|^2 / noise^2 + |(theta - mean) / spread|^2 by Levenberg-Marquardt from `start` [p].

    `residual(theta)` gives the residuals [n] and their negative Jacobian [n, p]. Returns theta [p], the posterior's
    precision there [p, p] (Gauss-Newton) and the residuals [n].
    """
    theta, damping = start, 1e-3
    rest, slope = residual(theta)

    def cost(theta: Vector, rest: Vector) -> float:
        return float(rest @ rest / noise**2 + (((theta - mean) / spread) ** 2).sum())

    best = cost(theta, rest)
    for _ in range(100):
        precision = slope.T @ slope / noise**2 + np.diag(spread**-2)
        downhill = slope.T @ rest / noise**2 - (theta - mean) / spread**2
        step = np.linalg.solve(precision + damping * np.diag(np.diag(precision)), downhill)
        new_rest, new_slope = residual(theta + step)
        new = cost(theta + step, new_rest)
        if not new < best:  # also where it is not finite
            damping *= 5
            if damping > 1e6:
                break
            continue
        done = best - new < 1e-6 * best
        theta, rest, slope, best, damping = theta + step, new_rest, new_slope, new, max(damping / 5, 1e-9)
        if done:
            break
    return theta, slope.T @ slope / noise**2 + np.diag(spread**-2), rest
