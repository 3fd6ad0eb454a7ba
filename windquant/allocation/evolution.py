"""Evolution: a blind search over multipliers of the predicted errors, paid by measured losses alone.

A plan is the Lagrangian one for errors multiplied by exp(phi w), phi the plain directions of `features.corrections`. An
evolution strategy with weighted recombination (Hansen and Ostermeier 2001, the mean's part of it) looks for the best w:

    w_k = mean + sigma z_k,  z_k ~ N(0, 1),  mean <- mean + sigma sum_k weight_k z_k   over the better half,

and sigma shrinks with every generation. It has no model of what it measures, so it says what the policy's loss model
is worth at the same number of measurements.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from windquant.allocation import lagrangian
from windquant.allocation.budget import Choice, cheapest, fill, limit, prices
from windquant.allocation.loss_model import LossModel
from windquant.allocation.settings import MeasureSettings
from windquant.allocation.trials import Measure, Trial, Trials, identity
from windquant.bank import Bank

SIGMA, SHRINK = 0.6, 0.9  # of the first generation; of every further one
BROAD = ("depth", "depth squared", "first layer", "last layer", "first chunk", "rank")  # and the kinds of linear


def search(
    bank: Bank, target_bits: float, seed: int, settings: MeasureSettings, measure: Measure, cache: Path | None = None
) -> Sequence[Trial]:
    """All measured plans, the Lagrangian one first; the best of them is the plan.

    `measure(choice [U])` is called at most `settings.evaluations` times, but at least once. Raises WindquantError if
    the target cannot be met. Same seed, same plans.
    """
    budget, errors, least = limit(bank, target_bits), prices(bank), cheapest(bank)
    model = LossModel(bank)
    broad = [i for i, name in enumerate(model.names) if name in BROAD or name.startswith("kind ")]
    phi = model.phi[:, broad]
    random = np.random.default_rng(seed)
    record = cache / "measured.txt" if cache else None
    key = identity(bank, seed, settings)
    trials = Trials(model, measure, settings.evaluations, record, key)

    def plan(weights: NDArray[np.float64]) -> Choice:
        choice, _ = lagrangian.solve(errors * np.exp(phi @ weights)[:, None], bank.bytes, budget, least)
        return fill(bank, choice, budget)

    trials.run(lagrangian.allocate(bank, target_bits), target_bits, "lagrangian")
    size = 4 + int(3 * np.log(len(broad)))  # of a generation
    share = np.log(size / 2 + 0.5) - np.log(np.arange(1, size // 2 + 1))
    share /= share.sum()
    mean, sigma = np.zeros(len(broad)), SIGMA
    before = 0
    while trials.left > 0 and len(trials.done) > before:  # a generation of known plans ends it
        before = len(trials.done)
        steps = random.standard_normal((min(size, trials.left), len(broad)))
        losses = [trials.run(plan(mean + sigma * step), target_bits, "evolution").loss for step in steps]
        best = np.argsort(losses)[: len(share)]
        mean = mean + sigma * share[: len(best)] @ steps[best]
        sigma *= SHRINK
    return trials.done
