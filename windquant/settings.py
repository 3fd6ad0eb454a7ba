"""A step's settings: one frozen dataclass becomes its command line, its part of the configuration schema, and back.

    @dataclass(frozen=True)
    class Settings:
        steps: int = 30  # distillation steps

gives `--steps 30`, the help text "distillation steps", and {"steps": {"type": "integer", "default": 30, ...}}.
Field types: int, float, str, bool, Path, Literal of strings or of ints, tuples of one of these (comma-separated), and
`| None`.
What a number may be stands in its type, in the words of JSON schema: `steps: Annotated[int, Limit("minimum", 1)]`.
"""

import argparse
import ast
import dataclasses
import inspect
import io
import operator
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from windquant.errors import WindquantError

T = TypeVar("T")
NONE = "none"
#: What a limit means, and how it is told.
COMPARISONS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (operator.ge, "at least"),
    "exclusiveMinimum": (operator.gt, "more than"),
    "maximum": (operator.le, "at most"),
    "exclusiveMaximum": (operator.lt, "less than"),
    "minItems": (lambda values, least: len(values) >= least, "at least"),
    "maxItems": (lambda values, most: len(values) <= most, "at most"),
}


class Limit(NamedTuple):
    """What a number, or the size of a tuple, may be."""

    name: str  # in JSON schema
    value: float


Natural = Annotated[int, Limit("minimum", 0)]
Count = Annotated[int, Limit("minimum", 1)]
Length = Annotated[int, Limit("minimum", 2)]  # of a window: a token is given, the others are predicted
Rate = Annotated[float, Limit("minimum", 0)]
Bits = Annotated[float, Limit("exclusiveMinimum", 0), Limit("maximum", 16)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """The type of a field, taken apart."""

    scalar: type  # int, float, str, bool or Path
    many: bool = False  # tuple[scalar, ...]
    optional: bool = False  # ... | None
    choices: tuple[str | int, ...] = ()  # of a Literal
    limits: tuple[Limit, ...] = ()  # of the scalar
    sizes: tuple[Limit, ...] = ()  # of the tuple


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def comments(cls: type) -> dict[str, str]:
    """Right-hand comment of every field, base classes included. A field without one has no entry."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(base))
        lines = {
            token.start[0]: token.string.lstrip("#: ").rstrip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        body = ast.parse(source).body[0]
        for node in body.body if isinstance(body, ast.ClassDef) else ():
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                last = node.end_lineno or node.lineno
                text = [lines[line] for line in range(node.lineno, last + 1) if line in lines]
                if text:
                    found[node.target.id] = " ".join(text)
    return found


def kinds(cls: type) -> dict[str, Kind]:
    """Type of every field; raises TypeError for one that the command line cannot carry."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: _kind(hints[field.name], field.name) for field in dataclasses.fields(cls) if field.init}


def _kind(hint: Any, name: str) -> Kind:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        inner = _kind(arguments[0], name)
        limits = arguments[1:]
        return dataclasses.replace(inner, sizes=limits) if inner.many else dataclasses.replace(inner, limits=limits)
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        inner = next(argument for argument in arguments if argument is not type(None))
        return dataclasses.replace(_kind(inner, name), optional=True)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return dataclasses.replace(_kind(arguments[0], name), many=True)
    if origin is Literal and (scalars := {type(argument) for argument in arguments}) in ({str}, {int}):
        return Kind(scalars.pop(), choices=arguments)
    if hint in (int, float, str, bool, Path):
        return Kind(hint)
    raise TypeError(f"setting {name}: type {hint} has no command-line form")


def parse(text: str, kind: Kind) -> Any:
    """The value that `text` stands for; raises ValueError (the message says what would be right)."""
    if kind.optional and text.lower() == NONE:
        return None
    if kind.many:
        inner = dataclasses.replace(kind, many=False, optional=False)
        parts = tuple(parse(part.strip(), inner) for part in text.split(",") if part.strip())
        return _within(parts, kind.sizes, f"the number of values in {text!r}")
    if kind.scalar is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is not true or false")
        return text.lower() == "true"
    if kind.choices and text not in map(str, kind.choices):
        raise ValueError(f"{text!r} is not one of {', '.join(map(str, kind.choices))}")
    try:
        value = kind.scalar(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind.scalar]
        raise ValueError(f"{text!r} is not {wanted}") from None
    return _within(value, kind.limits, repr(text))


def _within(value: Any, limits: Iterable[Limit], subject: str) -> Any:
    for limit in limits:
        holds, words = COMPARISONS[limit.name]
        if not holds(value, limit.value):
            raise ValueError(f"{subject} is not {words} {limit.value:.12g}")
    return value


def show(value: Any) -> str:
    """Inverse of `parse`."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(show(item) for item in value)
    return str(value)


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup, cls: type) -> None:
    """One flag per field of the dataclass: `--name VALUE`; a bool is `--name`, `--no-name` or `--name true|false`."""
    text = comments(cls)
    for name, kind in kinds(cls).items():
        default = _default(cls, name)
        required = default is dataclasses.MISSING
        description = text.get(name, "").replace("%", "%%")
        if not required:
            description += f" [{show(default)}]".replace("%", "%%")
        options: dict[str, Any] = {
            "dest": name,
            "default": None if required else default,
            "required": required,
            "help": description.strip(),
            "type": _converter(kind),
        }
        if kind.scalar is bool and not kind.many:
            parser.add_argument(flag(name), nargs="?", const=True, metavar="true|false", **options)
            negative: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            parser.add_argument(flag(f"no_{name}"), action="store_const", const=False, **negative)
        else:
            shown = "|".join(map(str, kind.choices)) if kind.choices else kind.scalar.__name__.upper()
            parser.add_argument(flag(name), metavar=f"{shown},..." if kind.many else shown, **options)


def _converter(kind: Kind) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse(text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _default(cls: type, name: str) -> Any:
    """Default value of a field, or dataclasses.MISSING."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def from_arguments(cls: type[T], arguments: argparse.Namespace) -> T:
    return cls(**{name: getattr(arguments, name) for name in kinds(cls)})


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "settings") -> T:
    """Settings from a section of the configuration; raises WindquantError naming an unknown key or a wrong value."""
    fields = kinds(cls)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise WindquantError(f"{where}.{name}: unknown key; known are {', '.join(fields)}")
        try:
            converted[name] = parse(show(value), fields[name])
        except ValueError as error:
            raise WindquantError(f"{where}.{name}: {error}") from None
    return cls(**converted)


def to_flags(values: Mapping[str, Any]) -> list[str]:
    """Command-line flags of a section of the configuration: {"learning_rate": 6e-3} -> ["--learning-rate=0.006"]."""
    return [f"{flag(name)}={show(value)}" for name, value in values.items()]


def to_json(settings: Any) -> dict[str, Any]:
    """Settings as JSON types: tuples are lists, paths are strings."""
    return {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def json_schema(cls: type) -> dict[str, Any]:
    """JSON schema of the section of the configuration that holds this dataclass's fields."""
    text = comments(cls)
    properties: dict[str, Any] = {}
    for name, kind in kinds(cls).items():
        json_type = {int: "integer", float: "number", bool: "boolean"}.get(kind.scalar, "string")
        schema: dict[str, Any] = {"type": json_type}
        if kind.choices:
            schema["enum"] = list(kind.choices)
        schema |= dict(kind.limits)
        if kind.many:
            schema = {"type": "array", "items": schema, **dict(kind.sizes)}
        if kind.optional:  # as a list of types where it can be: what is wrong is said more plainly than of `anyOf`
            plain = not (kind.many or kind.choices)
            schema = {**schema, "type": [json_type, "null"]} if plain else {"anyOf": [schema, {"type": "null"}]}
        if name in text:
            schema["description"] = text[name]
        if (default := _default(cls, name)) is not dataclasses.MISSING:
            schema["default"] = _plain(default)
        properties[name] = schema
    return {"type": "object", "additionalProperties": False, "properties": properties}
