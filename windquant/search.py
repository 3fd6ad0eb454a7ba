"""Search: a policy that makes the plan for every budget of a range, learned from measured plans.

    python -m windquant.search --model DIR --calibration DIR --statistics FILE --bank BANK --output SEARCH.safetensors

What is measured is the loss of the model under a plan (`measure.py`), and measurements are what a search costs: they
are counted in its notes. `python -m windquant.allocation --search SEARCH.safetensors` makes plans from the policy.
`--start OTHER.safetensors` begins with what a search on another model has learned.
"""

import dataclasses

from windquant import step
from windquant.allocation import layers
from windquant.allocation.budget import Choice
from windquant.allocation.settings import SearchSettings as Settings
from windquant.bank import Bank
from windquant.errors import WindquantError
from windquant.progress import Progress
from windquant.step import Task


def run(task: Task, settings: Settings) -> None:
    from windquant.allocation import ppo  # stable-baselines3 takes seconds
    from windquant.allocation.learned import Learned
    from windquant.measure import LossMeter

    bank = Bank.load(task.inputs["bank"])
    start = Learned.load(task.inputs["start"]) if "start" in task.inputs else None
    if start:
        start.check(bank, settings.per, transfer=True)
        if (start.hidden, start.warm) != (settings.hidden, settings.warm_start):
            raise WindquantError(
                f"--start: its network has search.hidden {start.hidden} and search.warm_start {start.warm}; "
                "give the search the same"
            )
    model, texts, statistics = (task.inputs[name] for name in ("model", "calibration", "statistics"))
    meter = LossMeter(model, texts, statistics, bank, tokens=settings.reward_tokens)
    by_layer = settings.per == "layer"
    progress: Progress[None] = task.progress(total=settings.evaluations, label="measured plans")
    with progress:

        def measure(choice: Choice) -> float:
            loss = meter.loss_gap(layers.spread(bank, choice) if by_layer else choice)
            progress.update(1)
            return loss

        subject = layers.merged(bank) if by_layer else bank
        found = ppo.search(subject, task.seed, settings, measure, task.cache, task.metrics, start)
    dataclasses.replace(found, bank=bank.sha256).save(task.output)
    task.artifact(task.output)
    for name in ("evaluations", "episodes"):
        task.metric(name, found.search[name])
    for name in ("evaluations", "episodes", "checks"):
        task.note(name, found.search[name])
    task.note("targets", found.targets)
    task.note("reason", found.reason)


if __name__ == "__main__":
    step.main("search", run, Settings, inputs=("model", "calibration", "statistics", "bank", "start?"))
