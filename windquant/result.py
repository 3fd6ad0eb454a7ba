"""The result of one experiment: everything measured, in one JSON file.

Nothing is computed here: the plan, the manifests and the evaluations are put together, checked against each other
and against the schema of `result_file`, and logged on the experiment's parent run. What several jobs have made has
a manifest of each: `zero_shot_original.0` is of the first task, `bank.0` of the first part of a bank that was shared.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.naming import MEASURING
from windquant.plan import Plan
from windquant.report import plan_picture
from windquant.report.svg import standalone
from windquant.result_file import ARTIFACTS, LEARNED, PERPLEXITIES, STEPS, ZERO_SHOTS, metrics, validate

if TYPE_CHECKING:
    from windquant.step import Task


@dataclass(frozen=True)
class Settings:
    config_sha256: str = ""  # digest of the model's configuration; empty: of the settings of all steps


def run(task: "Task", settings: Settings) -> None:
    tasks = {f"{name}.{i}": path for name, paths in task.files.items() for i, path in enumerate(paths)}
    manifests = {name: Manifest.load(path) for name, path in (task.inputs | tasks).items()}
    shared = [Path(entry["path"]) for name, entry in manifests["bank"].inputs.items() if name.startswith("parts.")]
    manifests |= {f"bank.{i}": Manifest.load(path) for i, path in enumerate(shared)}
    check_chain(manifests)
    plan = Plan.load(task.inputs["plan"])
    evaluations = {name: _evaluation([task.inputs[name]]) for name in PERPLEXITIES}
    evaluations |= {name: _evaluation(task.files[name]) for name in ZERO_SHOTS}
    result = assemble(plan, manifests, evaluations, settings.config_sha256, task.tracker.parent_id)
    validate(result)
    task.output.write_text(json.dumps(result, indent=1) + "\n")
    size = sum(file.stat().st_size for file in task.inputs["quantized"].glob("*.safetensors"))
    parameters = round(8 * size / result["checkpoint_bits"])
    task.note("checkpoint_bytes", size)
    task.note("original_fp16_bytes", 2 * parameters)
    for name in ("chosen", "reason"):  # of a learned plan: whether it is the one that was taken
        if name in plan.search:
            task.note(name, plan.search[name])
    track(task, plan, result, manifests)


def track(task: "Task", plan: Plan, result: Mapping[str, Any], manifests: Mapping[str, Manifest]) -> None:
    """Put everything that makes experiments comparable on the experiment's run, and close it."""
    from windquant import summary  # which imports this module

    for context, source in (("model", manifests["model"]), ("texts", manifests["calibration"])):
        entry = source.output
        task.tracker.dataset(Path(entry["path"]).name, entry["path"], entry["sha256"], context, parent=True)
    table = [("", "original", "quantized"), ("---", "--:", "--:"), *summary.rows(result, task.notes)]
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "plan.svg"
        picture.write_text(standalone(plan_picture.draw(plan), plan_picture.PAPER), encoding="utf-8")
        task.tracker.close_parent(
            {**metrics(result), "checkpoint_bytes": task.notes["checkpoint_bytes"]},
            {"result.json": task.output, "plan.json": task.inputs["plan"], "plan.svg": picture},
            {
                "chunk": _setting(manifests["bank"], "chunk"),
                "seed": result["seed"],
                "fallback": plan.fallback,
                "chosen": plan.search.get("chosen", plan.allocator),
            },
            parameters_of(manifests, plan.allocator),
            "\n".join(f"| {' | '.join(row)} |" for row in table),
        )


def parameters_of(manifests: Mapping[str, Manifest], allocator: str) -> dict[str, Any]:
    """Every setting of every step, `<step>.<setting>`: the MLflow UI shows where experiments differ."""
    settings = {step: _settings(found) for step, source in STEPS.items() if (found := parts(manifests, source))}
    if allocator not in MEASURING:  # they do not read the settings of the search
        settings["allocation"] = {"allocator": allocator}
    return {f"{step}.{name}": value for step, values in settings.items() for name, value in values.items()}


def assemble(
    plan: Plan,
    manifests: Mapping[str, Manifest],
    evaluations: Mapping[str, Mapping[str, Any]],
    config_sha256: str,
    mlflow_run_id: str | None,
) -> dict[str, Any]:
    """The result; WindquantError where what was measured contradicts the plan or each other."""
    quantized = manifests["quantized"]
    sources = {
        step: parts(manifests, source)
        for step, source in STEPS.items()
        if source in manifests or source in ZERO_SHOTS  # which may have no task
    }
    check_bytes(plan, quantized)
    return {
        "model": plan.model,
        "target_bits": plan.target_bits,
        "effective_bits": _note(quantized, "effective_bits"),
        "checkpoint_bits": _note(quantized, "checkpoint_bits"),
        "allocator": plan.allocator,
        "perplexity": perplexity(*(evaluations[name] for name in PERPLEXITIES)),
        **zero_shot(*(evaluations[name] for name in ZERO_SHOTS)),
        "actions": _note(manifests["plan"], "shares"),
        "protected_fraction": _setting(manifests["bank"], "protected"),
        "fallback": plan.fallback,
        "seed": quantized.seed,  # the plan's may be another: one that draws nothing serves all seeds
        "seconds": {step: round(sum(part.seconds for part in found), 3) for step, found in sources.items()},
        "peak_memory_bytes": {
            step: {kind: max((part.peak_memory_bytes[kind] for part in found), default=0) for kind in ("host", "gpu")}
            for step, found in sources.items()
        },
        # of the code that made the checkpoint, which another machine may have done
        "versions": quantized.versions,
        "git_commit": quantized.git_commit,
        "config_sha256": config_sha256 or settings_sha256(manifests),
        "data": {name: manifests[name].output["sha256"] for name in (*ARTIFACTS, *LEARNED) if name in manifests},
        "mlflow_run_id": mlflow_run_id,
    }


def perplexity(
    original: Mapping[str, Any], before_recovery: Mapping[str, Any], quantized: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """{dataset: {original, before_recovery, quantized}} of three evaluations {dataset: {perplexity, tokens, ...}}."""
    measured = {"original": original, "before_recovery": before_recovery, "quantized": quantized}
    _check_same("perplexity", measured, "tokens")
    return {
        dataset: {name: evaluation[dataset]["perplexity"] for name, evaluation in measured.items()}
        for dataset in original
    }


def zero_shot(original: Mapping[str, Any], quantized: Mapping[str, Any]) -> dict[str, Any]:
    """`zero_shot` and `zero_shot_average` of two evaluations {task: {accuracy, stderr, samples}}."""
    _check_same("zero-shot accuracy", {"original": original, "quantized": quantized}, "samples")
    tasks = {
        task: {
            "original": original[task]["accuracy"],
            "quantized": quantized[task]["accuracy"],
            "stderr": quantized[task]["stderr"],
            "samples": quantized[task]["samples"],
        }
        for task in original
    }
    average = {
        name: sum(values[name] for values in tasks.values()) / len(tasks) if tasks else None
        for name in ("original", "quantized")
    }
    return {"zero_shot": tasks, "zero_shot_average": average}


def check_bytes(plan: Plan, quantized: Manifest) -> None:
    """The checkpoint must take exactly the bytes that the plan predicted."""
    measured, bits = _note(quantized, "measured_bytes"), _note(quantized, "effective_bits")
    if measured != plan.bytes or not math.isclose(bits, plan.effective_bits, rel_tol=1e-12):
        raise WindquantError(
            f"{quantized.output['path']}: {measured} bytes, {bits} effective bits, but its plan predicted {plan.bytes} "
            f"and {plan.effective_bits}; please report this"
        )


def parts(manifests: Mapping[str, Manifest], source: str) -> list[Manifest]:
    """The manifests of an artifact or evaluation: one, or those of all jobs that made it."""
    return [manifest for name, manifest in manifests.items() if name.partition(".")[0] == source]


def check_chain(manifests: Mapping[str, Manifest]) -> None:
    """Every step must have read the very artifacts that stand in this result."""
    for name, manifest in manifests.items():
        for input_name, entry in manifest.inputs.items():
            source = _checkpoint_of(name) if input_name == "checkpoint" else input_name
            if source in manifests and entry["sha256"] != manifests[source].output["sha256"]:
                raise WindquantError(
                    f"{manifest.output['path']}: made from another {manifests[source].output['path']}; "
                    "delete it and run again"
                )


def _checkpoint_of(name: str) -> str:
    """Which artifact is the `checkpoint` input of the step that made `name`."""
    if name == "quantized":
        return "before_recovery"
    checkpoint = name.partition(".")[0].removeprefix("perplexity_").removeprefix("zero_shot_")
    return "model" if checkpoint == "original" else checkpoint


def settings_sha256(manifests: Mapping[str, Manifest]) -> str:
    """Digest of the settings and seeds of all steps."""
    settings = {name: [manifest.settings, manifest.seed] for name, manifest in manifests.items()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _check_same(what: str, evaluations: Mapping[str, Mapping[str, Any]], key: str) -> None:
    """All evaluations must be on the same data: equal names, each with an equal `key`."""
    samples = {name: {data: entry[key] for data, entry in values.items()} for name, values in evaluations.items()}
    if any(sample != samples["original"] for sample in samples.values()):
        raise WindquantError(f"{what} was measured on different data ({key}: {samples}); delete them and run again")


def _evaluation(paths: Iterable[Path]) -> dict[str, Any]:
    """What was measured of one checkpoint, all files together."""
    document: dict[str, Any] = {}
    for path in paths:
        try:
            document |= json.loads(path.read_text())
        except (OSError, ValueError, TypeError) as error:
            raise WindquantError(f"{path}: not a readable evaluation ({error}); delete it and run again") from error
    return document


def _settings(found: Sequence[Manifest]) -> dict[str, Any]:
    """The settings of a step's jobs, which differ in their tasks alone."""
    tasks = [name for part in found for name in part.settings.get("tasks", ())]
    return {**found[0].settings, **({"tasks": tasks} if tasks else {})}


def _note(manifest: Manifest, key: str) -> Any:
    return _find(manifest, manifest.notes, "notes", key)


def _setting(manifest: Manifest, key: str) -> Any:
    return _find(manifest, manifest.settings, "settings", key)


def _find(manifest: Manifest, values: Mapping[str, Any], where: str, key: str) -> Any:
    if key not in values:
        raise WindquantError(
            f"{manifest.output['path']}: its manifest has no {where}.{key} (another version?); delete it and run again"
        )
    return values[key]


if __name__ == "__main__":
    from windquant import step

    names = (*ARTIFACTS, *(f"{name}?" for name in LEARNED), *PERPLEXITIES, *(f"{name}*" for name in ZERO_SHOTS))
    step.main("result", run, Settings, inputs=names, light=True)
