"""The configuration against its schema: what is wrong, in one line that names the key and what would be right."""

import contextlib
import copy
import difflib
import functools
import json
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from windquant.configuration import Config, overridable
from windquant.errors import WindquantError


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
    elsewhere = {name: list(section.get("properties", ())) for name, section in overridable(schema).items()}
    for section, keys in elsewhere.items():
        if near := difflib.get_close_matches(key, keys, 1, cutoff=0.8):
            return f"; did you mean {section}.{near[0]}?"
    return f"; known are {', '.join(known)}"


def _about(schema: Config | None) -> str:
    return str((schema or {}).get("description", "see config/README.md"))


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
