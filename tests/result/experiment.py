"""An experiment's artifacts, which the step frame really made although nothing was computed, and its result."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windquant import result, result_file, step
from windquant.plan import Plan

WEIGHTS, BYTES = 8000, 1995
SIZE = 200_000  # of the checkpoint


@dataclass(frozen=True)
class Units:
    protected: float = 0.03  # fraction
    chunk: int = 64  # columns


def make(name: str, output: str, write: Callable[[step.Task], None], seed: int = 5, **inputs: str) -> str:
    """Run a step that only writes; returns the path of its output."""
    argv = [part for key, path in inputs.items() for part in ("--" + key, path)]
    step.main(
        name,
        lambda task, _: write(task),
        Units,
        tuple(inputs),
        argv=[*argv, "--output", output, "--seed", str(seed)],
        light=True,
    )
    return output


def text(content: str, **notes: Any) -> Callable[[step.Task], None]:
    def write(task: step.Task) -> None:
        task.output.write_text(content)
        for key, value in notes.items():
            task.note(key, value)

    return write


def checkpoint(size: int, **notes: Any) -> Callable[[step.Task], None]:
    def write(task: step.Task) -> None:
        task.output.mkdir()
        (task.output / "model.safetensors").write_bytes(bytes(size))
        for key, value in notes.items():
            task.note(key, value)

    return write


def perplexity(value: float, tokens: int = 1023) -> Callable[[step.Task], None]:
    return text(json.dumps({"wikipedia": {"perplexity": value, "tokens": tokens, "context": 1024}}))


TASKS = {"cloze": 0.0, "next_sentence": 0.1}  # and how much easier than the first they are


def zero_shot(output: str, accuracy: float, samples: int = 100, **inputs: str) -> list[str]:
    """The evaluations of a checkpoint, one per task."""
    made = []
    for name, easier in TASKS.items():
        scores = {name: {"accuracy": accuracy + easier, "stderr": 0.04, "samples": samples, "metric": "acc"}}
        made.append(
            make("zero_shot", f"{output}.{name}", text(json.dumps(scores)), **inputs, calibration="calibration")
        )
    return made


def save_plan(allocator: str, target: float, search: dict[str, Any]) -> Callable[[step.Task], None]:
    def write(task: step.Task) -> None:
        bits = 8 * BYTES / WEIGHTS
        actions = {"layers.0.q": ["scalar-2", "scalar-4"]}
        Plan("m", allocator, target, bits, BYTES, WEIGHTS, 5, actions, predicted_loss=0.5, search=search).save(
            task.output
        )
        task.note("shares", {"scalar-2": 0.75, "scalar-4": 0.25})

    return write


Inputs = dict[str, str | list[str]]


def chain(
    allocator: str = "ppo", quantized: float = 50.0, target: float = 2.0, search: dict[str, Any] | None = None
) -> Inputs:
    """All artifacts of one experiment; `search`: what a learned plan says of its own."""
    found: Inputs = {"model": make("model", "model", checkpoint(2000))}
    found["calibration"] = make("calibration", "calibration", checkpoint(10), model="model")
    shared = {"model": "model", "calibration": "calibration"}
    found["statistics"] = make("statistics", "statistics", text("s"), **shared)
    found["bank"] = make("bank", "bank", text("b"), model="model", statistics="statistics")
    plan, before, after = (f"{allocator}.{part}" for part in ("plan", "before", "after"))
    policy = {}
    if allocator == "ppo":
        found["search"] = make("search", "search", text("p"), **shared, bank="bank")
        policy = {"search": "search"}
    found["plan"] = make(
        "allocation", plan, save_plan(allocator, target, search or {}), **shared, bank="bank", **policy
    )
    notes = {"effective_bits": 8 * BYTES / WEIGHTS, "checkpoint_bits": 4.0, "measured_bytes": BYTES}
    found["before_recovery"] = make("quantize", before, checkpoint(SIZE, **notes), **shared, plan=plan)
    found["quantized"] = make("recovery", after, checkpoint(SIZE, **notes), **shared, checkpoint=before)
    data = {"calibration": "calibration"}
    found["perplexity_original"] = make("perplexity", "p0", perplexity(19.4), checkpoint="model", **data)
    name = f"{allocator}.p"
    found["perplexity_before_recovery"] = make("perplexity", name + "1", perplexity(120.0), checkpoint=before, **data)
    found["perplexity_quantized"] = make("perplexity", name + "2", perplexity(quantized), checkpoint=after, **data)
    found["zero_shot_original"] = zero_shot("z0", 0.5, checkpoint="model")
    found["zero_shot_quantized"] = zero_shot(f"{allocator}.z", 0.375, checkpoint=after)
    return found


def assemble(inputs: Inputs, output: str = "results/r.json", *argv: str) -> dict[str, Any]:
    several = {name: paths for name, paths in inputs.items() if isinstance(paths, list)}
    flags = [
        part
        for name, paths in inputs.items()
        if paths
        for part in ("--" + name.replace("_", "-"), *several.get(name, [str(paths)]))
    ]
    names = [f"{name}{'*' * (name in several)}" for name in inputs]
    step.main("result", result.run, result.Settings, names, argv=[*flags, "--output", output, *argv], light=True)
    return result_file.load(Path(output))
