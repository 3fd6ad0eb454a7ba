"""Time and peak memory of every step for random Llama models of several sizes, as JSON and as a table.

    python -m benchmarks.scaling --folder /tmp/scaling                      # all sizes: half an hour on two cores
    python -m benchmarks.scaling --folder /tmp/scaling --sizes 10M,40M      # some; the table is of all there are
    python -m benchmarks.scaling --folder /tmp/scaling --sizes shallow,deep # two that differ in depth alone

Each step runs in a process of its own, as in the workflow, on short random text: the times are about how the steps
grow, not how good the models are. Every step streams, as it does for a model that is too large for the memory: search
and zero-shot tasks are told that there is none (WINDQUANT_MEMORY), recovery goes layer by layer. The exponent is that
of a power of the number of weights, fitted by least squares to the logarithms of the seconds that a step takes beyond
those for a model of almost nothing (imports, and the frame of a step), which comes first.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.scaling.subject import SIZES

FITTED = ("10M", "40M", "135M", "500M")
BITS = 2.0
#: Rows of the table, and the module of each step.
STEPS = {
    "statistics": "statistics",
    "bank": "bank",
    "search": "search",
    "allocation": "allocation",
    "quantize": "quantize",
    "recovery": "recovery",
    "perplexity_original": "evaluation.perplexity",
    "perplexity": "evaluation.perplexity",
    "zero_shot_original": "evaluation.zero_shot",
    "zero_shot": "evaluation.zero_shot",
}
STREAMED = {"WINDQUANT_MEMORY": "0.001"}  # GiB: nothing fits as a whole


def run(folder: Path, size: str, threads: int, samples: int, length: int) -> dict[str, Any]:
    """All steps of one size; seconds and peak memory by step, from the steps' own manifests."""
    here = folder / size
    model, text = here / "model", here / "text"
    if not model.exists():
        # in a process of its own: a child's peak of memory begins with what its parent has had at most
        maker = [sys.executable, "-m", "benchmarks.scaling.subject", str(here), size, str(samples), str(length)]
        subprocess.run(maker, check=True)
    statistics, bank, plan = (here / name for name in ("statistics.safetensors", "bank.safetensors", "plan.json"))
    packed, recovered = here / "packed", here / "recovered"
    policy = here / "search.safetensors"
    search = {"episodes": 16, "evaluations": 3, "reward-tokens": 256}
    allocate = {"search": policy, "target-bits": BITS, "confirm": "false"}  # confirming is quantize, twice
    recover = {"steps": 8, "scope": "layers"}
    words: dict[str, dict[str, Any]] = {
        "statistics": {"model": model, "output": statistics},
        "bank": {"model": model, "statistics": statistics, "output": bank},
        "search": {"model": model, "statistics": statistics, "bank": bank, "output": policy, **search},
        "allocation": {"bank": bank, "output": plan, **allocate},
        "quantize": {"model": model, "statistics": statistics, "plan": plan, "output": packed},
        "recovery": {"model": model, "checkpoint": packed, "output": recovered, **recover},
        "perplexity_original": {"checkpoint": model, "output": here / "original.json"},
        "perplexity": {"checkpoint": packed, "output": here / "quantized.json"},
        "zero_shot_original": {"checkpoint": model, "tasks": "cloze", "output": here / "original.cloze.json"},
        "zero_shot": {"checkpoint": packed, "tasks": "cloze", "output": here / "quantized.cloze.json"},
    }
    found: dict[str, Any] = {}
    for step in STEPS:
        output = words[step]["output"]
        manifest = output.with_name(f"{output.name}.manifest.json")
        if not manifest.exists():
            texts = {} if step in ("bank", "allocation") else {"calibration": text}
            flags = [f"--{name}={value}" for name, value in {**words[step], **texts, "threads": threads}.items()]
            command = [sys.executable, "-m", f"windquant.{STEPS[step]}", *flags]
            subprocess.run(command, check=True, env={**os.environ, **STREAMED})
        document = json.loads(manifest.read_text())
        found[step] = {"seconds": document["seconds"], "peak_memory_bytes": document["peak_memory_bytes"]["host"]}
    config = json.loads((model / "config.json").read_text())
    from windquant.shape import Shape

    return {"weights": Shape.of(config, model).weights, "layers": config["num_hidden_layers"], "steps": found}


def exponent(weights: list[int], seconds: list[float]) -> float:
    """b of seconds = a weights^b, by least squares on the logarithms."""
    x, y = [math.log(value) for value in weights], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row per step, seconds and peak memory by size, and the exponents over the FITTED sizes.

    Where they are there, also how much more memory the deep model takes than the shallow one.
    """
    sizes = [size for size in SIZES if size in results]
    fitted = [size for size in FITTED if size in results]
    compared = {"shallow", "deep"} <= results.keys()
    head = ["step", *sizes, "exponent", *(["memory, deep / shallow"] if compared else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for step in STEPS:
        rows = {size: results[size]["steps"][step] for size in sizes}
        cells = [f"{rows[size]['seconds']:.1f} s, {rows[size]['peak_memory_bytes'] / 1e9:.2f} GB" for size in sizes]
        beyond = {size: rows[size]["seconds"] - rows["nothing"]["seconds"] for size in fitted}
        large = [size for size in fitted if beyond[size] > 0.5]
        fit = "-"
        if len(large) > 1:
            fit = f"{exponent([results[s]['weights'] for s in large], [beyond[s] for s in large]):.2f}"
        cells.append(fit)
        if compared:
            cells.append(f"{rows['deep']['peak_memory_bytes'] / rows['shallow']['peak_memory_bytes']:.2f}")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for models and artifacts; what is there is kept")
    parser.add_argument("--sizes", default=",".join(FITTED), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16, help="of the calibration set")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    options = parser.parse_args()
    path = options.folder / "scaling.json"
    # numba compiles what a machine has not run yet: not in a step whose time counts
    run(options.folder / "warm-up", "nothing", options.threads, options.samples, options.length)
    for size in ["nothing", *options.sizes.split(",")]:
        result = run(options.folder, size, options.threads, options.samples, options.length)
        results = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(results | {size: result}, indent=1) + "\n")
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
