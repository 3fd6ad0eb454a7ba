"""The configuration, resolved into the settings of each step.

`config/config.yaml` says what differs from the defaults, which the schema (workflow/schemas/config.schema.yaml)
states. Every section can be overridden in a model's entry. Nothing heavy is imported: the Snakefile does all this at
each start.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windquant import dependencies, settings
from windquant.errors import WindquantError, did_you_mean

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """A step of the workflow: `python -m module`, with settings from a section of the configuration."""

    module: str
    section: str
    arguments: tuple[str, ...] = ()  # settings that the rule gives, from the name of the file that is asked for

    def section_of(self, name: str) -> str:
        """The section of the configuration that holds one of the step's settings: what the bank needs is `units`."""
        return "units" if name in dependencies.settings(STEPS["bank"].module) else self.section


#: What compares results, beside the settings of single results: keys of the configuration, and of a model's entry.
STUDIES = ("budgets", "seeds", "ablations")

STEPS = {
    "model": Step("windquant.models", "model"),
    "calibration": Step("windquant.calibration", "calibration"),
    "statistics": Step("windquant.statistics", "statistics"),
    "bank": Step("windquant.bank", "units", arguments=("part",)),
    "search": Step("windquant.search", "search", arguments=("per",)),
    "allocation": Step("windquant.allocation", "search", arguments=("allocator", "target_bits", "transfer")),
    "quantize": Step("windquant.quantize", "quantize"),
    "recovery": Step("windquant.recovery", "recovery"),
    "perplexity": Step("windquant.evaluation.perplexity", "evaluation"),
    "zero_shot": Step("windquant.evaluation.zero_shot", "evaluation"),
}


def load(path: Path) -> dict[str, Any]:
    """A YAML file as a dictionary; raises WindquantError if it is missing or not YAML."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WindquantError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WindquantError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise WindquantError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict):
        raise WindquantError(f"{path}: holds no keys; see config/README.md")
    return document


def overruled(config: Config, given: Config) -> dict[str, Any]:
    """The configuration, with what was `given` for one call in the place of what models' entries say themselves."""
    models = config.get("models")
    if not isinstance(models, Mapping):
        return dict(config)
    return {**config, "models": {name: _laid_over(entry, given) for name, entry in models.items()}}


def _laid_over(entry: Any, given: Config) -> Any:
    """A model's entry with new values for the sections that it has."""
    if not isinstance(entry, Mapping):
        return entry
    own = {key: value for key, value in given.items() if key in entry}
    for key, value in own.items():
        if isinstance(value, Mapping) and isinstance(entry[key], Mapping):
            own[key] = {**entry[key], **value}
    return {**entry, **own}


def resolve(config: Config, schema: Config, model: str) -> dict[str, Any]:
    """What holds for a model: defaults of the schema, then the configuration, then the model's own entry.

    Returns {"model": {"name", "source", ...}, section: {key: value}, "seed": int}.
    Raises WindquantError if the configuration has no such model.
    """
    entries = config.get("models") or {}
    if model not in entries:
        raise WindquantError(
            f"unknown model {model}{did_you_mean(model, entries)}; config/config.yaml has {', '.join(entries)}"
        )
    entry = entries[model]
    sections = overridable(schema)
    resolved: dict[str, Any] = {
        "model": {"name": model, **{k: v for k, v in entry.items() if k not in {*sections, *STUDIES}}}
    }
    for name, section in sections.items():
        layers = [layer[name] for layer in (config, entry) if layer.get(name) is not None]
        if "properties" in section:
            defaults = {key: value["default"] for key, value in section["properties"].items() if "default" in value}
            resolved[name] = {key: value for layer in [defaults, *layers] for key, value in layer.items()}
        else:  # a plain value, such as the seed
            resolved[name] = layers[-1] if layers else section["default"]
    return resolved


def study(config: Config, schema: Config, model: str, name: str) -> Any:
    """The model's own value of a key of STUDIES, else the configuration's, else the default; ablations go by name."""
    layers = [layer[name] for layer in (config, config["models"].get(model, {})) if layer.get(name) is not None]
    if name == "ablations":
        return {key: value for layer in layers for key, value in layer.items()}
    return layers[-1] if layers else schema["properties"][name]["default"]


def changes(config: Config, schema: Config, model: str) -> dict[str, Any]:
    """What every change of an ablation replaces: name -> {section: {key: value}}."""
    found: dict[str, Any] = {}
    for ablation, parts in study(config, schema, model, "ablations").items():
        for name, sections in parts.items():
            if found.setdefault(name, sections) != sections:
                raise WindquantError(f"ablations.{ablation}.{name}: another ablation has another change of this name")
    return found


def changed(resolved: Config, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What holds for a model under a change."""
    return {**resolved, **{name: {**resolved[name], **values} for name, values in sections.items()}}


def step_settings(resolved: Config, name: str) -> dict[str, Any]:
    """The settings of a step: what the configuration says about the fields of its module's `Settings`."""
    step = STEPS[name]
    keys = [(key, step.section_of(key)) for key in dependencies.settings(step.module)]
    return {key: resolved[section][key] for key, section in keys if key in resolved[section]}


def flags(resolved: Config, step: str) -> str:
    """The settings of a step as they stand on its command line, ready for the shell."""
    return shlex.join(settings.to_flags(step_settings(resolved, step)))


def sha256(resolved: Config) -> str:
    """Digest of what holds for a model."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def overridable(schema: Config) -> dict[str, Config]:
    """What a model's entry can override: name -> schema, references followed."""
    return {
        name: schema["$defs"][section["$ref"].rpartition("/")[2]] if "$ref" in section else section
        for name, section in schema["properties"].items()
        if name not in ("models", *STUDIES)
    }
