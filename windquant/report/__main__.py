"""Report: all results in one HTML page with pictures, their numbers, and how to make them again.

python -m windquant.report --results results/A.json results/B.json --output results/report.html
"""

from dataclasses import dataclass

from windquant.report import gather, page
from windquant.step import Task, main


@dataclass(frozen=True)
class Settings:
    pass


def run(task: Task, settings: Settings) -> None:
    found = gather.experiments(task.files["results"])
    peers = gather.peers(task.inputs.get("peers"))
    task.output.write_text(page.page(found, peers), encoding="utf-8")
    task.note("results", [str(e.path) for e in found])


if __name__ == "__main__":
    main("report", run, Settings, inputs=("results+", "peers?"), light=True)
