"""Allocation: choose one action for every unit, so that the plan meets a target of effective bits.

    python -m windquant.allocation --bank BANK --search SEARCH.safetensors --target-bits 2.25 --output PLAN.json
    python -m windquant.allocation --bank BANK --search OTHER.safetensors --transfer --output PLAN.json
    python -m windquant.allocation --bank BANK --allocator lagrangian --target-bits 2.0 --output PLAN.json

The allocators `ppo` and `layer` take a policy that `windquant.search` has made, and `ppo`, where --model, --calibration
and --statistics are given too, confirms its plan as a really quantized model. `evolution` measures plans and needs
these three. The others need the bank only.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from windquant import step
from windquant.allocation import BASELINES, lagrangian
from windquant.allocation.budget import Choice, limit
from windquant.allocation.settings import Settings
from windquant.bank import Bank
from windquant.errors import WindquantError
from windquant.plan import Plan
from windquant.progress import Progress
from windquant.step import Task

if TYPE_CHECKING:
    from windquant.measure import LossMeter

MODEL = ("model", "calibration", "statistics")  # inputs of whatever measures


def run(task: Task, settings: Settings) -> None:
    """Write the plan; note its shares, bits and losses."""
    bank = Bank.load(task.inputs["bank"])
    limit(bank, settings.target_bits)  # raises before anything else is read
    document: dict[str, Any] = {}
    if settings.allocator in ("ppo", "layer"):
        choice, document = learned(task, settings, bank)
    elif settings.allocator == "evolution":
        choice, document = evolved(task, settings, bank)
    else:
        choice = BASELINES[settings.allocator](bank, settings.target_bits, task.seed)
    plan = bank.plan(
        choice,
        allocator=settings.allocator,
        target_bits=settings.target_bits,
        seed=task.seed,
        fallback=document.pop("fallback", False),
        search=document,
    )
    plan.save(task.output)
    task.artifact(task.output)
    task.metrics({"effective_bits": plan.effective_bits, "predicted_loss": plan.predicted_loss})
    task.note("shares", bank.shares(choice))
    for name in ("chosen", "reason", "confirmed", "evaluations"):
        if name in document:
            task.note(name, document[name])
    task.note("effective_bits", plan.effective_bits)
    task.note("predicted_loss", plan.predicted_loss)
    task.note("fallback", plan.fallback)


def learned(task: Task, settings: Settings, bank: Bank) -> tuple[Choice, dict[str, Any]]:
    """The plan of a policy, and what its search saw.

    With `confirm` it is taken only where nothing speaks against it: else the Lagrangian one is.
    """
    from windquant.allocation.learned import Learned  # torch takes seconds

    path = task.inputs.get("search")
    if path is None:
        raise WindquantError(
            f"allocator {settings.allocator} takes a policy: give --search (python -m windquant.search)"
        )
    found = Learned.load(path)
    try:
        found.check(bank, "layer" if settings.allocator == "layer" else "chunk", settings.transfer)
    except WindquantError as error:
        raise WindquantError(f"{path}: {error}") from error
    baseline = lagrangian.allocate(bank, settings.target_bits)
    confirm = settings.confirm and settings.allocator == "ppo"
    measured = confirm and not settings.transfer  # what was measured on another model says nothing about this one
    reason = found.doubt(settings.target_bits) if measured else found.reason or found.outside(settings.target_bits)
    document = found.search | {"chosen": "lagrangian"}
    if reason:
        return baseline, document | {"reason": reason, "fallback": found.exploded(settings.target_bits)}
    choice = found.plan(bank, settings.target_bits)
    if np.array_equal(choice, baseline):
        return baseline, document | {"reason": "the policy's plan is the Lagrangian one"}
    if confirm and all(name in task.inputs for name in MODEL):
        plans = [
            bank.plan(some, allocator=name, target_bits=settings.target_bits, seed=0)
            for name, some in (("lagrangian", baseline), ("ppo", choice))
        ]
        standard, own = confirmed(task, plans, settings.reward_tokens)
        document["confirmed"] = {"lagrangian": standard, "learned": own}
        if not own < standard:
            return baseline, document | {"reason": "the learned plan was not better once it was really quantized"}
    return choice, document | {"chosen": "policy"}


def confirmed(task: Task, plans: list[Plan], tokens: int) -> list[float]:
    """Divergences of plans that are really quantized, on reward text behind the `tokens` that the search has seen."""
    from windquant import confirmation

    model, texts, statistics = (task.inputs[name] for name in MODEL)
    progress: Progress[None] = task.progress(total=sum(len(plan.actions) for plan in plans), label="confirming")
    with progress:
        return confirmation.divergences(model, texts, statistics, plans, tokens, progress.update)


def evolved(task: Task, settings: Settings, bank: Bank) -> tuple[Choice, dict[str, Any]]:
    """The best measured plan of an evolution strategy."""
    from windquant.allocation import evolution

    measuring = meter(task, settings, bank)
    progress: Progress[None] = task.progress(total=settings.evaluations, label="measured plans")
    with progress:

        def measure(choice: Choice) -> float:
            loss = measuring.loss_gap(choice)
            progress.update(1)
            return loss

        trials = evolution.search(bank, settings.target_bits, task.seed, settings, measure, task.cache)
    best = min(trials, key=lambda trial: trial.loss)
    pairs = [[t.source, *(round(v, 6) for v in (t.predicted, t.corrected, t.loss, t.target))] for t in trials]
    return best.choice, {"chosen": best.source, "evaluations": len(trials), "pairs": pairs}


def meter(task: Task, settings: Settings, bank: Bank) -> "LossMeter":
    """What measures plans; raises WindquantError if the inputs for it are missing."""
    missing = [name for name in MODEL if name not in task.inputs]
    if missing:
        raise WindquantError(f"allocator {settings.allocator} measures plans: give --{' and --'.join(missing)} too")
    from windquant.measure import LossMeter

    model, texts, statistics = (task.inputs[name] for name in MODEL)
    return LossMeter(model, texts, statistics, bank, tokens=settings.reward_tokens)


if __name__ == "__main__":
    step.main("allocation", run, Settings, inputs=("model?", "calibration?", "statistics?", "bank", "search?"))
