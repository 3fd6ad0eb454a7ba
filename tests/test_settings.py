"""Settings: dataclass -> command line, schema, flags, and back."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest

from windquant import settings
from windquant.errors import WindquantError


@dataclass(frozen=True)
class Base:
    device: Literal["auto", "cpu"] = "auto"  # where to compute


@dataclass(frozen=True)
class Settings(Base):
    steps: int = 30  # distillation steps, at 100 % "load" # really
    learning_rate: float = 6e-3  # of the gains
    tasks: tuple[str, ...] = ("a", "b")  # names
    targets: tuple[float, ...] = (
        3.0,
        2.5,  # curriculum
    )
    fast: bool = False  # be quick
    exact: bool = True
    limit: int | None = None  # samples
    path: Path = Path("x")  # a file
    share: Annotated[float, settings.Limit("minimum", 0), settings.Limit("exclusiveMaximum", 1)] = 0.5
    budgets: Annotated[tuple[settings.Bits, ...], settings.Limit("maxItems", 2)] = (2.0,)
    states: Literal[8, 12] = 12
    most: settings.Count | None = None


def parse(*argv: str, cls: type = Settings) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    settings.add_arguments(parser, cls)
    return settings.from_arguments(cls, parser.parse_args(argv))


def test_defaults_and_values() -> None:
    assert parse() == Settings()
    found = parse(
        *("--steps", "3", "--learning-rate", "1e-4", "--tasks", "c, d", "--targets=-1,2", "--fast", "--no-exact"),
        *("--limit", "5", "--path", "y", "--device", "cpu"),
        *("--share", "0", "--budgets", "1,16", "--states", "8", "--most", "1"),
    )
    assert found == Settings("cpu", 3, 1e-4, ("c", "d"), (-1.0, 2.0), True, False, 5, Path("y"), 0.0, (1.0, 16.0), 8, 1)


def test_false_true_none_and_empty() -> None:
    found = parse("--fast", "true", "--exact=false", "--limit", "none", "--tasks", "")
    assert (found.fast, found.exact, found.limit, found.tasks) == (True, False, None, ())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "3.5"], "'3.5' is not a whole number"),
        (["--learning-rate", "fast"], "'fast' is not a number"),
        (["--fast", "maybe"], "'maybe' is not true or false"),
        (["--device", "tpu"], "'tpu' is not one of auto, cpu"),
        (["--targets", "3,x"], "'x' is not a number"),
        (["--share", "-0.1"], "'-0.1' is not at least 0"),
        (["--share", "1"], "'1' is not less than 1"),
        (["--share", "nan"], "'nan' is not at least 0"),
        (["--budgets", "2,0"], "'0' is not more than 0"),
        (["--budgets", "2,3,4"], "the number of values in '2,3,4' is not at most 2"),
        (["--states", "9"], "'9' is not one of 8, 12"),
        (["--most", "0"], "'0' is not at least 1"),
    ],
)
def test_wrong_values_name_flag_and_remedy(argv: list[str], message: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=f"argument {argv[0]}: {message}"):
        parse(*argv)


def test_comments_become_help() -> None:
    assert settings.comments(Settings) == {
        "device": "where to compute",
        "steps": 'distillation steps, at 100 % "load" # really',
        "learning_rate": "of the gains",
        "tasks": "names",
        "targets": "curriculum",
        "fast": "be quick",
        "limit": "samples",
        "path": "a file",
    }
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, Settings)
    text = " ".join(parser.format_help().split())
    assert 'distillation steps, at 100 % "load" # really [30]' in text
    assert "--targets FLOAT,... curriculum [3.0,2.5]" in text
    assert "--device auto|cpu where to compute [auto]" in text


def test_a_field_without_default_is_required() -> None:
    @dataclass(frozen=True)
    class Required:
        model: str  # a name

    assert parse("--model", "m", cls=Required) == Required("m")
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse(cls=Required)


def test_unsupported_type_is_refused() -> None:
    @dataclass(frozen=True)
    class Wrong:
        table: dict[str, int] | None = None

    with pytest.raises(TypeError, match="setting table"):
        settings.kinds(Wrong)


def test_flags_and_json_lead_back() -> None:
    original = Settings("cpu", 7, 0.1, (), (1.0,), True, False, None, Path("a b"))
    plain = settings.to_json(original)
    assert plain["targets"] == [1.0]
    assert parse(*settings.to_flags(plain)) == original
    assert settings.from_mapping(Settings, plain) == original


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, r"recovery\.step: unknown key; known are device, steps"),
        ({"steps": "many"}, r"recovery\.steps: 'many' is not a whole number"),
    ],
)
def test_mapping_errors_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(WindquantError, match=message):
        settings.from_mapping(Settings, values, "recovery")


def test_schema_accepts_what_the_dataclass_accepts() -> None:
    schema = settings.json_schema(Settings)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(settings.to_json(Settings()), schema)
    assert schema["properties"]["steps"]["default"] == 30
    assert schema["properties"]["learning_rate"]["description"] == "of the gains"
    for wrong in (
        *({"steps": 1.5}, {"device": "tpu"}, {"stepz": 1}, {"tasks": "a"}, {"exact": None}),
        *({"share": 1.0}, {"budgets": [0.0]}, {"budgets": [2.0, 3.0, 4.0]}, {"states": 9}, {"most": 0}),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
