"""Several results of one model and budget side by side, one row each, the best perplexity first.

python -m windquant.comparison --results results/X.json results/X.greedy.json --output results/X.comparison.csv
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from windquant import result_file
from windquant.errors import WindquantError

if TYPE_CHECKING:
    from windquant.step import Task


@dataclass(frozen=True)
class Settings:
    digits: int = 4  # after the decimal point


def run(task: "Task", settings: Settings) -> None:
    import pandas as pd

    results = [result_file.load(path) for path in task.files["results"]]
    for key in ("model", "target_bits"):
        values = sorted({str(entry[key]) for entry in results})
        if len(values) != 1:
            raise WindquantError(f"--results: cannot compare different values of {key}: {', '.join(values)}")
    table = pd.DataFrame([row(entry) for entry in results])
    dataset = next(iter(results[0]["perplexity"]))
    table = table.sort_values([f"perplexity_{dataset}_quantized", "allocator", "seed"])
    table.to_csv(task.output, index=False, float_format=f"%.{settings.digits}f")


def row(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table, from one result."""
    columns: dict[str, Any] = {
        key: entry[key] for key in ("allocator", "seed", "target_bits", "effective_bits", "checkpoint_bits", "fallback")
    }
    for dataset, values in entry["perplexity"].items():
        columns |= {f"perplexity_{dataset}_{name}": value for name, value in values.items()}
    columns |= {f"zero_shot_average_{name}": value for name, value in entry["zero_shot_average"].items()}
    columns |= {f"actions_{name}": share for name, share in entry["actions"].items()}
    return columns | {"seconds": sum(entry["seconds"].values())}


if __name__ == "__main__":
    from windquant import step

    step.main("comparison", run, Settings, inputs=("results*",), light=True)
