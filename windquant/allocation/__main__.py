"""Allocation: choose one action for every unit, so that the plan meets a target of effective bits.

    python -m windquant.allocation --bank BANK --allocator lagrangian --target-bits 2.0 --output PLAN.json
    python -m windquant.allocation --model DIR --calibration DIR --statistics FILE --bank BANK --output PLAN.json

The allocator `ppo` measures plans on the model, so it needs all four inputs; the others need the bank only.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from windquant import step
from windquant.allocation import BASELINES, lagrangian
from windquant.allocation.budget import Choice
from windquant.allocation.settings import Settings
from windquant.bank import Bank
from windquant.errors import WindquantError
from windquant.plan import Plan
from windquant.progress import Progress
from windquant.step import Task

if TYPE_CHECKING:
    from windquant.allocation.ppo import Found
    from windquant.measure import LossMeter


def run(task: Task, settings: Settings) -> None:
    """Write the plan; note its shares, bits and losses."""
    bank = Bank.load(task.inputs["bank"])
    if settings.allocator == "ppo":
        plan = learned(task, settings, bank)
    else:
        choice = BASELINES[settings.allocator](bank, settings.target_bits, task.seed)
        plan = bank.plan(choice, allocator=settings.allocator, target_bits=settings.target_bits, seed=task.seed)
        task.note("shares", bank.shares(choice))
    plan.save(task.output)
    task.artifact(task.output)
    task.metrics({"effective_bits": plan.effective_bits, "predicted_loss": plan.predicted_loss})
    task.note("effective_bits", plan.effective_bits)
    task.note("predicted_loss", plan.predicted_loss)
    task.note("fallback", plan.fallback)


def learned(task: Task, settings: Settings, bank: Bank) -> Plan:
    """The plan of the PPO search."""
    missing = [name for name in ("model", "calibration", "statistics") if name not in task.inputs]
    if missing:
        raise WindquantError(f"allocator ppo measures plans on the model: give --{' and --'.join(missing)} too")
    from windquant.allocation.ppo import search  # stable-baselines3 takes seconds
    from windquant.measure import LossMeter

    model, texts, statistics = (task.inputs[name] for name in ("model", "calibration", "statistics"))
    meter = LossMeter(model, texts, statistics, bank, tokens=settings.reward_tokens)
    progress: Progress[None] = task.progress(total=settings.evaluations, label="measured plans")
    with progress:

        def measure(choice: Choice) -> float:
            loss = meter.loss_gap(choice)
            progress.update(1)
            return loss

        found = search(bank, settings.target_bits, task.seed, settings, measure, task.cache, task.metrics)
    choice, document = confirmed(task, bank, settings.target_bits, meter, found)
    task.note("shares", bank.shares(choice))
    task.note("chosen", document["chosen"])
    for name in ("lagrangian_loss", "loss", "evaluations"):
        if name in document:
            task.note(name, document[name])
            task.metric(name, document[name])
    return bank.plan(
        choice,
        allocator="ppo",
        target_bits=settings.target_bits,
        seed=task.seed,
        fallback=found.fallback,
        search=document,
    )


def confirmed(
    task: Task, bank: Bank, target_bits: float, meter: "LossMeter", found: "Found"
) -> tuple[Choice, dict[str, Any]]:
    """The search's plan if it beats the Lagrangian one once both are really quantized, on other text; else that one."""
    baseline = lagrangian.allocate(bank, target_bits)
    if np.array_equal(found.choice, baseline):
        return baseline, found.search
    rivals = (("lagrangian", baseline), ("ppo", found.choice))
    plans = [bank.plan(choice, allocator=name, target_bits=target_bits, seed=0) for name, choice in rivals]
    progress: Progress[None] = task.progress(total=len(plans) * len(bank.linears), label="confirming")
    with progress:
        standard, learned = meter.confirm(plans, progress.update)
    document = found.search | {"confirmed": {"lagrangian": standard, "learned": learned}}
    if learned < standard:
        return found.choice, document
    reason = "the learned plan was not better once it was really quantized"
    return baseline, document | {"chosen": "lagrangian", "reason": reason}


if __name__ == "__main__":
    step.main("allocation", run, Settings, inputs=("model?", "calibration?", "statistics?", "bank"))
