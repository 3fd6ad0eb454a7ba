"""The JSON file of a result: its schema, reading it, and the numbers that make results comparable."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from windquant.errors import WindquantError

#: What a result is put together from. What is measured of one checkpoint ends with the checkpoint's name.
ARTIFACTS = ("model", "calibration", "statistics", "bank", "plan", "before_recovery", "quantized")
LEARNED = ("search",)  # an artifact, and a step, where the plan comes from a policy
PERPLEXITIES = ("perplexity_original", "perplexity_before_recovery", "perplexity_quantized")
ZERO_SHOTS = ("zero_shot_original", "zero_shot_quantized")
#: Key of `seconds` and `peak_memory_bytes` -> artifact or evaluation whose manifest tells.
STEPS = {
    "model": "model",
    "calibration": "calibration",
    "statistics": "statistics",
    "bank": "bank",
    "search": "search",
    "allocation": "plan",
    "quantize": "before_recovery",
    "recovery": "quantized",
    **{name: name for name in (*PERPLEXITIES, *ZERO_SHOTS)},
}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of an object with exactly these keys; what only a learned plan has may be missing."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name in properties if name not in LEARNED],
        "properties": dict(properties),
    }


def _each(keys: Iterable[str], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of an object with exactly these keys, all alike."""
    return _object({key: schema for key in keys})


_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_COUNT = {"type": "integer", "minimum": 0}
_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_SHARE_OR_NONE = {"anyOf": [_SHARE, {"type": "null"}]}
_PERPLEXITY = _each(("original", "before_recovery", "quantized"), {"type": "number", "minimum": 1})
_TASK = _object(
    {"original": _SHARE, "quantized": _SHARE, "stderr": {"type": "number", "minimum": 0}, "samples": _COUNT}
)

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "WINDQuant result",
    **_object(
        {
            "model": {"type": "string", "minLength": 1},
            "target_bits": _POSITIVE,
            "effective_bits": _POSITIVE,
            "checkpoint_bits": _POSITIVE,
            "allocator": {"type": "string", "minLength": 1},
            "perplexity": {"type": "object", "minProperties": 1, "additionalProperties": _PERPLEXITY},
            "zero_shot": {"type": "object", "additionalProperties": _TASK},
            "zero_shot_average": _each(("original", "quantized"), _SHARE_OR_NONE),
            "actions": {"type": "object", "minProperties": 1, "additionalProperties": _SHARE},
            "protected_fraction": _SHARE,
            "fallback": {"type": "boolean"},
            "seed": {"type": "integer"},
            "seconds": _each(STEPS, {"type": "number", "minimum": 0}),
            "peak_memory_bytes": _each(STEPS, _each(("host", "gpu"), _COUNT)),
            "versions": {"type": "object", "required": ["python"], "additionalProperties": {"type": "string"}},
            "git_commit": {"anyOf": [{"type": "string", "pattern": "^[0-9a-f]{40,64}$"}, {"type": "null"}]},
            "config_sha256": _DIGEST,
            "data": _each((*ARTIFACTS, *LEARNED), _DIGEST),
            "mlflow_run_id": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}]},
        }
    ),
}


def validate(result: Mapping[str, Any], name: str = "result") -> None:
    """Check against SCHEMA and what a schema cannot say; WindquantError names the first key that is wrong."""
    from jsonschema import Draft202012Validator

    error = next(iter(Draft202012Validator(SCHEMA).iter_errors(result)), None)
    if error is not None:
        raise WindquantError(f"{name}: {'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}")
    numbers = {"target_bits": result["target_bits"], **metrics(result)}
    for key, value in numbers.items():
        if not math.isfinite(value):
            raise WindquantError(f"{name}: {key} is {value}")
    if result["effective_bits"] > result["target_bits"]:
        raise WindquantError(
            f"{name}: effective_bits {result['effective_bits']} exceed target_bits {result['target_bits']}"
        )


def load(path: Path) -> dict[str, Any]:
    """A result file; WindquantError if it is not one."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WindquantError(f"{path}: not a readable result ({error})") from error
    validate(result, str(path))
    return result


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that make experiments comparable in the MLflow UI, under dotted names: quality comes first there."""
    numbers = {
        "effective_bits": result["effective_bits"],
        "checkpoint_bits": result["checkpoint_bits"],
        "resources.seconds": sum(result["seconds"].values()),
        "resources.host_memory_bytes": max(entry["host"] for entry in result["peak_memory_bytes"].values()),
        "resources.gpu_memory_bytes": max(entry["gpu"] for entry in result["peak_memory_bytes"].values()),
    }
    for dataset, values in result["perplexity"].items():
        numbers |= {f"perplexity.{dataset}.{name}": value for name, value in values.items()}
    for task, values in result["zero_shot"].items():
        numbers |= {f"zero_shot.{task}.{name}": values[name] for name in ("original", "quantized")}
    average = result["zero_shot_average"]
    return numbers | {f"zero_shot_average.{name}": value for name, value in average.items() if value is not None}
