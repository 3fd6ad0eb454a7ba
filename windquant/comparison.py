"""Several results of one model side by side: a row per allocator, change and budget, the best perplexity first.

python -m windquant.comparison --results results/X.json results/X.greedy.json --output results/X.comparison.csv

Results that differ in their seed alone share a row: means, and beside every measured quantity its standard deviation
over the seeds (n - 1; empty for a single one). `lagrangian` counts the seeds whose learned plan was not taken, because
the Lagrangian one was better or nothing could be said, and `fallbacks` those whose search came to nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windquant import naming, result_file
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.manifest import Manifest

if TYPE_CHECKING:
    from windquant.task import Task

NAMES = ["allocator", "change", "target_bits"]  # what a row is about


@dataclass(frozen=True)
class Settings:
    digits: int = 4  # after the decimal point


def run(task: "Task", settings: Settings) -> None:
    import pandas as pd

    paths = task.files["results"]
    results = [result_file.load(path) for path in paths]
    models = sorted({entry["model"] for entry in results})
    if len(models) != 1:
        raise WindquantError(f"--results: cannot compare different values of model: {', '.join(models)}")
    table = pd.DataFrame([row(path, entry) for path, entry in zip(paths, results, strict=True)])
    if (twice := table.duplicated([*NAMES, "seed"])).any():
        raise WindquantError(f"--results: {paths[int(twice.argmax())]} is another one's model, budget and seed again")
    actions = [str(name) for name in table if str(name).startswith("actions_")]
    table[actions] = table[actions].fillna(0)  # what a plan does not use
    groups = table.groupby(NAMES, sort=False, dropna=False)
    measured = [str(name) for name in table if name not in (*NAMES, "seed", "lagrangian", "fallback")]
    means = groups[measured].mean()
    spread = groups[[name for name in measured if is_quality(name)]].std()
    columns: dict[str, Any] = {
        "seeds": groups["seed"].nunique(),
        "lagrangian": groups["lagrangian"].sum(),
        "fallbacks": groups["fallback"].sum(),
    }
    for name in measured:
        columns[name] = means[name]
        if name in spread:
            columns[f"{name}_std"] = spread[name]
    final = next(name for name in measured if name.endswith("_quantized"))
    joined = pd.DataFrame(columns).reset_index().sort_values(["target_bits", final, "allocator", "change"])
    joined.to_csv(task.output, index=False, float_format=f"%.{settings.digits}f")


def row(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of one result. A gap is the loss above the original's, nats per token."""
    variant = naming.variant_of(path)
    columns: dict[str, Any] = {
        "allocator": entry["allocator"],
        "change": variant.change if variant else "",
        "target_bits": entry["target_bits"],
        "seed": entry["seed"],
        "lagrangian": _chosen(path) == "lagrangian",  # the plan that was taken instead of the learned one
        "fallback": entry["fallback"],
        "effective_bits": entry["effective_bits"],
        "checkpoint_bits": entry["checkpoint_bits"],
    }
    for dataset, values in entry["perplexity"].items():
        columns |= {f"perplexity_{dataset}_{name}": value for name, value in values.items()}
        columns |= {
            f"gap_{dataset}_{name}": math.log(values[name] / values["original"])
            for name in ("before_recovery", "quantized")
        }
    columns |= {f"zero_shot_average_{name}": value for name, value in entry["zero_shot_average"].items()}
    columns |= {f"actions_{name}": share for name, share in entry["actions"].items()}
    return columns | {"seconds": sum(entry["seconds"].values())}


def _chosen(path: Path) -> str:
    """Whose plan a learned allocator's result is of, by the result's manifest; empty where that does not say."""
    return str(Manifest.load(path).notes.get("chosen", "")) if manifest_path(path).exists() else ""


def is_quality(name: str) -> bool:
    """Whether a column is of a quantized model's quality: perplexities, gaps and accuracies."""
    return name.startswith(("perplexity_", "gap_", "zero_shot_")) and not name.endswith("_original")


if __name__ == "__main__":
    from windquant import step

    step.main("comparison", run, Settings, inputs=("results+",), light=True)
