"""The configuration: checked against its schema before any work starts, and resolved into the settings of each step.

`config/config.yaml` says what differs from the defaults, which the schema (workflow/schemas/config.schema.yaml)
states. Every section can be overridden in a model's entry. Nothing heavy is imported: the Snakefile does all this at
each start.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import json
import operator
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windquant import dependencies, settings
from windquant.errors import WindquantError

Config = Mapping[str, Any]
ALLOCATORS = ("ppo", "uniform", "greedy", "lagrangian", "random", "layer", "evolution")
LEARNED = ("ppo", "layer")  # those that take a policy
MEASURING = (*LEARNED, "evolution")  # those that spend measurements
SEEDLESS = ("uniform", "greedy", "lagrangian")  # those that draw nothing: the same plan with every seed
HIGHEST_SEED = 2**32 - 1  # numpy takes no other
LOWEST_BITS, HIGHEST_BITS = 1.0, 16.0  # the bank knows the exact lowest ones: they depend on the metadata


#: Sources that are read from a path, and what a local model's folder is made of, as far as it is read.
LOCAL_SOURCES = ("folder", "file", "rows")
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")


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


def validate(config: Config, schema: Config) -> dict[str, Any]:
    """The configuration, with numbers that YAML or the command line took for text (6e-3) made numbers again, and whole
    ones that were written otherwise (8.0) whole.

    Raises WindquantError for a key that is unknown or missing and for a value that cannot be.
    """
    import jsonschema

    _check_names(config)
    standard = jsonschema.Draft202012Validator
    whole = standard.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)  # JSON's 8.0 is one, too
    validator = jsonschema.validators.extend(standard, type_checker=whole)(schema)
    checked = copy.deepcopy(dict(config))
    for error in list(validator.iter_errors(checked)):
        if error.validator in ("type", "anyOf") and isinstance(error.instance, str | float):
            with contextlib.suppress(ValueError):
                value = json.loads(str(error.instance))
                *path, key = error.absolute_path
                functools.reduce(operator.getitem, path, checked)[key] = _whole(value)
    errors = sorted(validator.iter_errors(checked), key=_severity)
    if errors:
        raise WindquantError(f"configuration: {_message(errors[0], schema)}")
    _check_targets(checked)
    return checked


def _check_names(value: Any, where: str = "") -> None:
    """WindquantError for a key that is no text: YAML's 32 is a number and its off is false, to which no pattern of the
    schema applies.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise WindquantError(f"configuration: {where}{key}: a name is text; write it in quotes")
            _check_names(inner, f"{where}{key}.")


def _whole(value: Any) -> Any:
    """8 for 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_targets(config: Config, where: str = "") -> None:
    """WindquantError for a range that ends below its beginning, in any entry or change: a schema cannot say that."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_targets(value, _join(where, key))
        elif _join(where, key).endswith("search.targets") and value != sorted(value):
            raise WindquantError(
                f"configuration: {_join(where, key)}: {value} ends below its beginning; give from, to, as in "
                f"{sorted(value)}"
            )


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
    sections = _sections(schema)
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


@dataclass(frozen=True)
class Variant:
    """What stands behind the budget in the name of a result: an allocator, a change of the settings, a seed."""

    allocator: str
    change: str = ""  # of an ablation
    seed: int | None = None  # none: the configuration's

    @property
    def name(self) -> str:
        """As files are called, e.g. "ppo-chunk32-1"."""
        seed = "" if self.seed is None else str(self.seed)
        return "-".join(filter(None, (self.allocator, self.change, seed)))


NAME = re.compile(r"(?P<allocator>[a-z]+)(-(?P<change>[a-z][a-z0-9]*))?(-(?P<seed>\d+))?")
RESULT = re.compile(rf"[^/_]+_\d+(\.\d+)?bits(\.{NAME.pattern})?\.json")


def variant(text: str, known: Iterable[str]) -> Variant:
    """ "ppo-chunk32-1": PPO under the change `chunk32` with seed 1; raises WindquantError for what is not `known`."""
    found = NAME.fullmatch(text)
    if found is None:
        raise WindquantError(
            f"{text}: give an allocator, a change and a seed, as in ppo-chunk32-1; the last two may miss"
        )
    parsed = _variant(found)
    if parsed.seed is not None and (parsed.seed > HIGHEST_SEED or parsed.name != text):
        raise WindquantError(f"{text}: seeds go from 0 to {HIGHEST_SEED}, without zeros before them")
    if parsed.change and parsed.change not in known:
        hint = did_you_mean(parsed.change, known)
        raise WindquantError(f"unknown change {parsed.change}{hint}; the ablations have {', '.join(known) or 'none'}")
    check_allocator(parsed.allocator)
    return parsed


def result_name(model: str, bits: float | str, name: str) -> str:
    """File of a result by a variant's name: PPO's has none."""
    return f"{model}_{bits}bits{'' if name == 'ppo' else f'.{name}'}.json"


def variant_of(result: Path) -> Variant | None:
    """What the name of a result's file says (an empty one is PPO); None for a name that the workflow does not give."""
    found = RESULT.fullmatch(result.name)
    return _variant(found) if found and (found["allocator"] or "ppo") in ALLOCATORS else None


def _variant(found: re.Match[str]) -> Variant:
    """Of a match of NAME."""
    seed = found["seed"]
    return Variant(found["allocator"] or "ppo", found["change"] or "", None if seed is None else int(seed))


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


def check_bits(text: str) -> float:
    """Target bits per weight from a file name; raises WindquantError if they cannot be."""
    bits = float(text)
    if not LOWEST_BITS <= bits <= HIGHEST_BITS:
        raise WindquantError(f"{text} bits: impossible; give {LOWEST_BITS:g} to {HIGHEST_BITS:g} bits per weight")
    return bits


def named_bits(text: str) -> float:
    """`check_bits` of a file name, in which every number has one spelling, so that nothing is made twice."""
    bits = check_bits(text)
    if text != str(bits):
        raise WindquantError(f"{text}bits: the names of this budget's files have {bits}bits")
    return bits


def check_allocator(name: str) -> str:
    """Raise WindquantError for a name that is no allocator."""
    if name not in ALLOCATORS:
        hint = did_you_mean(name, ALLOCATORS)
        raise WindquantError(f"unknown allocator {name}{hint}; there are {', '.join(ALLOCATORS)}")
    return name


def local_files(where: str, entry: Config, keys: Mapping[str, str]) -> list[str]:
    """The local files that an entry reads: `keys` maps each key of a source to the key of its path.

    Of a folder these are the files in it that a model consists of. Raises WindquantError if there is nothing.
    """
    files: list[str] = []
    for source, key in keys.items():
        if entry[source] in LOCAL_SOURCES:
            if not entry.get(key):
                raise WindquantError(f"{where}.{key}: missing; {source}: {entry[source]} reads it")
            path = Path(str(entry[key])).expanduser()
            if path.is_dir() and entry[source] == "folder":
                files += sorted({str(file) for pattern in MODEL_FILES for file in path.glob(pattern)})
            elif path.is_file():
                files.append(str(path))
            else:
                wanted = "neither a file nor a folder" if entry[source] == "folder" else "no file"
                raise WindquantError(f"{where}.{key}: {str(path)!r} is {wanted}")
    return files


def _sections(schema: Config) -> dict[str, Config]:
    """What a model's entry can override: name -> schema, references followed."""
    return {
        name: schema["$defs"][section["$ref"].rpartition("/")[2]] if "$ref" in section else section
        for name, section in schema["properties"].items()
        if name not in ("models", *STUDIES)
    }


def _severity(error: Any) -> tuple[int, int]:
    """Unknown keys first: they are often the cause of what else is wrong."""
    return error.validator != "additionalProperties", -len(error.absolute_path)


def _message(error: Any, schema: Config) -> str:
    """One line for one error of the schema: the key, what is wrong, what would be right."""
    where = ".".join(map(str, error.absolute_path))
    match error.validator:
        case "additionalProperties":
            known = error.schema["properties"]
            unknown = next(key for key in error.instance if key not in known)
            return f"{_join(where, unknown)}: unknown key{_suggestion(str(unknown), where, known, schema)}"
        case "required":
            missing = next(key for key in error.validator_value if key not in error.instance)
            known = error.schema.get("properties") or schema["$defs"]["model"]["properties"]
            return f"{_join(where, missing)}: missing ({_about(known.get(missing))})"
        case "pattern":
            return f"{where}: {error.instance!r} {error.schema.get('description', error.message)}"
        case _:
            return f"{where}: {error.message} ({_about(error.schema)})"


def _suggestion(key: str, where: str, known: Iterable[str], schema: Config) -> str:
    """The near miss, here or in another section, else the keys that exist here."""
    if near := difflib.get_close_matches(key, known, 1):
        return f"; did you mean {_join(where, near[0])}?"
    elsewhere = {name: list(section.get("properties", ())) for name, section in _sections(schema).items()}
    for section, keys in elsewhere.items():
        if near := difflib.get_close_matches(key, keys, 1, cutoff=0.8):
            return f"; did you mean {section}.{near[0]}?"
    return f"; known are {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]}?" if near else ""


def _about(schema: Config | None) -> str:
    return str((schema or {}).get("description", "see config/README.md"))


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
