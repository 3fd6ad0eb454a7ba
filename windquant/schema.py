"""The configuration's schema and its description for people, made from the steps' `Settings`.

    python -m windquant.schema

writes workflow/schemas/config.schema.yaml and config/README.md. A setting is stated once, in its step's dataclass:
name, type, default and the comment that explains it. A test checks that both files are current.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from windquant import dependencies, settings
from windquant.configuration import STEPS
from windquant.naming import HIGHEST_SEED

SCHEMA = Path("workflow/schemas/config.schema.yaml")
README = Path("config/README.md")
HEAD = "# Made by `python -m windquant.schema` from the Settings of the steps: do not edit.\n"

#: What a section is about.
SECTIONS = {
    "calibration": "The texts: what is read, how much of it, and what is kept apart for the evaluation.",
    "statistics": "Activation statistics of the original model.",
    "units": "The column chunks, and how they may be quantized.",
    "search": "The allocation: what the PPO search spends, and on what. One search serves all budgets of its range.",
    "quantize": "Quantization with error feedback.",
    "recovery": "Distillation of scales and norms after quantization, and learned rounding.",
    "evaluation": "Perplexity and zero-shot tasks, the same for the original and the quantized model.",
}
MODELS = "The models that can be asked for: the name in results/<model>_<bits>bits.json, and where it comes from."
NAMES = "is no name for a model: letters and digits, and behind the first one also . + -"
MODEL = (
    "Every section below can be repeated in a model's entry; it holds for that model alone. A name has letters and "
    "digits, and behind the first one also `. + -`."
)
SEED = "Of every random choice."
BITS: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0, "maximum": 16}
#: What compares results: type, default, description. A model's entry may have its own.
CHANGE = "what a change replaces"
STUDIES: dict[str, dict[str, Any]] = {
    "budgets": {
        "type": "array",
        "items": BITS,
        "minItems": 1,
        "uniqueItems": True,
        "default": [1.75, 2.0, 2.25, 2.5, 3.0, 4.0],
        "description": "bits of the results in results/<model>.pareto.csv and its picture",
    },
    "seeds": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": HIGHEST_SEED},
        "minItems": 1,
        "uniqueItems": True,
        "default": [0, 1, 2],
        "description": "of the results of every allocator in results/<model>_<bits>bits.comparison.csv",
    },
    "ablations": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z0-9]+$", "description": "is no name for an ablation: a-z and 0-9 only"},
        "additionalProperties": {
            "type": "object",
            "minProperties": 1,
            "description": "changes by name",
            "propertyNames": {"pattern": "^[a-z][a-z0-9]*$", "description": "is no name for a change: a-z, then 0-9"},
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "description": CHANGE,
                "properties": {
                    name: {"$ref": f"#/$defs/{name}"} for name in ("units", "search", "quantize", "recovery")
                },
            },
        },
        "default": {},
        "description": "of results/<model>_<bits>bits.ablation.<name>.csv: changes by name, and what they replace "
        "in units, search, quantize and recovery",
    },
}


def schema() -> dict[str, Any]:
    """JSON schema of config/config.yaml."""
    sections: dict[str, dict[str, Any]] = {}
    for step in STEPS.values():
        known = settings.json_schema(importlib.import_module(dependencies.entry(step.module)).Settings)["properties"]
        for name in (name for name in known if name not in step.arguments):
            section = step.section_of(name)
            key, value = f"{section}.{name}", known[name]
            if sections.setdefault(section, {}).setdefault(name, value) != value:
                raise ValueError(f"{step.module}: {key} means something else in another step")
    model = sections.pop("model")
    model.pop("name")  # the key of the entry
    references = {name: {"$ref": f"#/$defs/{name}"} for name in SECTIONS}
    seed = {"type": "integer", "minimum": 0, "maximum": HIGHEST_SEED, "default": 0, "description": SEED}
    needs = [
        {"if": {"properties": {"source": {"const": source}}}, "then": {"required": [key]}}
        for source, key in (("hub", "id"), ("folder", "path"))
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "WINDQuant configuration",
        "type": "object",
        "additionalProperties": False,
        "required": ["models"],
        "properties": {
            "models": {
                "description": MODELS,
                "type": "object",
                "minProperties": 1,
                "propertyNames": {"pattern": "^[A-Za-z0-9][A-Za-z0-9.+-]*$", "description": NAMES},
                "additionalProperties": {"$ref": "#/$defs/model"},
            },
            "seed": seed,
            **references,
            **STUDIES,
        },
        "$defs": {
            "model": {
                "description": MODEL,
                "type": "object",
                "additionalProperties": False,
                "required": ["source"],
                "properties": {**model, "seed": seed, **references, **STUDIES},
                "allOf": needs,
            },
            **{
                name: {
                    "description": about,
                    "type": "object",
                    "additionalProperties": False,
                    "properties": sections[name],
                }
                for name, about in SECTIONS.items()
            },
        },
    }


def readme(schema: Mapping[str, Any]) -> str:
    """The configuration explained, as Markdown."""
    special = {*SECTIONS, *STUDIES}
    model = {name: value for name, value in schema["$defs"]["model"]["properties"].items() if name not in special}
    parts = [
        "# Configuration",
        f"<!-- {HEAD.strip('# ').strip()} -->",
        "`config.yaml` says what differs from the defaults below. `snakemake --config 'recovery={steps: 60}'` sets "
        "a key for one call, and `--configfile FILE` merges a file of your own into it. A wrong key or value is "
        "refused before anything runs.",
        "What holds for a model is the first of these that says it: `--config`; the section in the model's own entry; "
        "the section at the top of `config.yaml`; the default. So where an entry has a section, a `--configfile` has "
        "to say it in that entry.",
        "A setting that changes reruns the steps that use it and what follows from them, and nothing else.",
        f"## models\n\n{MODELS} {MODEL}",
        _table({name: value for name, value in model.items() if name != "seed"}),
        f"## seed\n\n{SEED} Default: `0`.",
    ]
    for name in SECTIONS:
        section = schema["$defs"][name]
        parts.append(f"## {name}\n\n{section['description']}")
        parts.append(_table(section["properties"]))
    parts.append("## budgets, seeds, ablations\n\nWhat compares results with each other; see docs/allocation.md.")
    parts.append(_table(STUDIES))
    return "\n\n".join(parts) + "\n"


def _table(properties: Mapping[str, Any]) -> str:
    rows = ["| key | default | |", "|---|---|---|"]
    for name, value in properties.items():
        text = str(value.get("description", "")).replace("|", "\\|")
        rows.append(f"| `{name}` | {_default(value)} | {text}{_choices(value)} |")
    return "\n".join(rows)


def _default(value: Mapping[str, Any]) -> str:
    if "default" not in value:
        return ""
    default = value["default"]
    plain = settings.show("" if default is None else default)
    shown = f"[{', '.join(map(settings.show, default))}]" if isinstance(default, list) else plain
    return f"`{shown}`" if shown else "empty"


def _choices(value: Mapping[str, Any]) -> str:
    """Those of a text; those of a number stand in its description."""
    inner = value.get("items", value)
    words = "enum" in inner and inner.get("type") == "string"
    return f" (one of {', '.join(f'`{choice}`' for choice in inner['enum'])})" if words else ""


class _Dumper(yaml.SafeDumper):
    """Writes what occurs twice twice: anchors are hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def documents() -> dict[Path, str]:
    """What the two files should hold."""
    made = schema()
    text = yaml.dump(made, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
    return {SCHEMA: HEAD + text, README: readme(made)}


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
