"""Perplexity against effective bits over several results of one model, as a picture of its own.

python -m windquant.report.pareto_picture --results results/M_2.0bits.json results/M_3.0bits.json --output M.pareto.svg
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from windquant.errors import WindquantError
from windquant.report import gather, model_charts
from windquant.report.svg import standalone

if TYPE_CHECKING:
    from windquant.task import Task

PAPER = 640.0  # width of the picture


@dataclass(frozen=True)
class Settings:
    pass


def run(task: "Task", settings: Settings) -> None:
    found = gather.experiments(task.files["results"])
    models = sorted({e.result["model"] for e in found})
    if len(models) != 1:
        raise WindquantError(f"--results: one picture is of one model, these are of {', '.join(models)}")
    figure = model_charts.perplexity(models[0], found, [])[0]  # of the first text
    task.output.write_text(standalone(figure.svg, PAPER), encoding="utf-8")


if __name__ == "__main__":
    from windquant import step

    step.main("pareto_picture", run, Settings, inputs=("results+",), light=True)
