"""The configuration: what is refused and how, what holds for a model, and that schema and code agree."""

import argparse
import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from windquant import configuration, dependencies, schema as schema_module, settings, validation
from windquant.errors import WindquantError

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = configuration.load(ROOT / schema_module.SCHEMA)
CONFIG = configuration.load(ROOT / "config" / "config.yaml")
HUB = {"source": "hub", "id": "a/b"}


def settings_class(step: str) -> type:
    return importlib.import_module(dependencies.entry(configuration.STEPS[step].module)).Settings


def test_schema_and_readme_are_current() -> None:
    for path, text in schema_module.documents().items():
        assert (ROOT / path).read_text() == text, f"{path}: run `python -m windquant.schema`"


@pytest.mark.parametrize("step", configuration.STEPS)
def test_schema_and_settings_agree(step: str) -> None:
    entry = configuration.STEPS[step]
    fields = settings.json_schema(settings_class(step))["properties"]
    assert tuple(fields) == dependencies.settings(entry.module)
    for name in set(fields) - {*entry.arguments, "name"}:
        stated = SCHEMA["$defs"][entry.section_of(name)]["properties"][name]
        assert stated.get("default") == fields[name].get("default"), name
        assert stated.get("type") == fields[name].get("type"), name
        assert stated["description"], name


def test_every_key_of_the_schema_is_used() -> None:
    used = {
        (step.section_of(name), name)
        for step in configuration.STEPS.values()
        for name in dependencies.settings(step.module)
    }
    for section in schema_module.SECTIONS:
        for name in SCHEMA["$defs"][section]["properties"]:
            assert (section, name) in used


@pytest.mark.parametrize("model", CONFIG["models"])
@pytest.mark.parametrize("step", configuration.STEPS)
def test_flags_give_the_settings_back(step: str, model: str) -> None:
    resolved = configuration.resolve(CONFIG, SCHEMA, model)
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, settings_class(step))
    given = {"allocation": ["--allocator=ppo", "--target-bits=2.0"]}.get(step, [])
    parsed = settings.from_arguments(
        settings_class(step), parser.parse_args([*given, *shlex.split(configuration.flags(resolved, step))])
    )
    expected = configuration.step_settings(resolved, step)
    assert {name: value for name, value in settings.to_json(parsed).items() if name in expected} == expected


def test_hub_models_have_the_papers_settings() -> None:
    resolved = configuration.resolve(CONFIG, SCHEMA, "llama2-7b")
    assert resolved["model"] == {"name": "llama2-7b", "source": "hub", "id": "meta-llama/Llama-2-7b-hf"}
    assert resolved["units"]["chunk"] == 256
    assert resolved["units"]["protected"] == 0.03
    texts = resolved["calibration"]
    assert (texts["samples"], texts["length"], texts["dataset"]) == (64, 256, "garage-bAInd/Open-Platypus")
    assert texts["test_subset"] == "wikitext-2-raw-v1"
    assert len(resolved["evaluation"]["tasks"]) == 6


def test_the_default_model_needs_no_hub() -> None:
    resolved = configuration.resolve(CONFIG, SCHEMA, "smollm2-135m")
    assert resolved["model"]["source"] == "embedded"
    assert resolved["calibration"]["source"] == "articles"
    assert resolved["calibration"]["test_source"] == "same"
    assert resolved["evaluation"]["tasks"] == ["cloze", "next_sentence"]
    assert resolved["units"]["chunk"] == 192


def test_a_models_own_section_wins_over_the_shared_one_and_that_over_the_default() -> None:
    config = {"recovery": {"steps": 5}, "seed": 1, "models": {"a": {**HUB, "recovery": {"steps": 7}}, "b": HUB}}
    a, b = (configuration.resolve(config, SCHEMA, name) for name in "ab")
    assert (a["recovery"]["steps"], b["recovery"]["steps"]) == (7, 5)
    assert a["seed"] == b["seed"] == 1
    assert a["units"] == b["units"] == configuration.resolve({"models": {"c": HUB}}, SCHEMA, "c")["units"]
    assert configuration.sha256(a) != configuration.sha256({**a, "seed": 2})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "models: missing"),
        ({"models": {}}, "models: {}"),
        ({"models": {"a": {}}}, "models.a.source: missing"),
        ({"models": {"a": {"source": "hub"}}}, "models.a.id: missing"),
        ({"models": {"a": {"source": "folder"}}}, "models.a.path: missing"),
        ({"models": {"a": {"source": "disk"}}}, "models.a.source: 'disk' is not one of"),
        ({"models": {"a_b": HUB}}, "models: 'a_b' is no name for a model"),
        ({"models": {"my-model (1)": HUB}}, "models: 'my-model (1)' is no name for a model: letters and digits"),
        ({"models": {"-a": HUB}}, "models: '-a' is no name for a model"),
        ({"models": {"a": {**HUB, "pth": "x"}}}, "models.a.pth: unknown key; did you mean models.a.path?"),
        ({"models": {"a": HUB}, "recoverry": {}}, "recoverry: unknown key; did you mean recovery?"),
        ({"models": {"a": HUB}, "recovery": {"step": 1}}, "recovery.step: unknown key; did you mean recovery.steps?"),
        ({"models": {"a": HUB}, "recovery": {"chunk": 1}}, "recovery.chunk: unknown key; did you mean units.chunk?"),
        ({"models": {"a": HUB}, "recovery": {"zzz": 1}}, "recovery.zzz: unknown key; known are "),
        (
            {"models": {"a": {**HUB, "units": {"chnk": 1}}}},
            "models.a.units.chnk: unknown key; did you mean models.a.units",
        ),
        ({"models": {"a": HUB}, "units": {"chunk": 0}}, "units.chunk: 0 is less than the minimum of 1"),
        ({"models": {"a": HUB}, "units": {"chunk": "many"}}, "units.chunk: 'many' is not of type 'integer'"),
        ({"models": {"a": HUB}, "units": {"protected": 1.5}}, "units.protected: 1.5 is greater than"),
        ({"models": {"a": HUB}, "units": {"protected": 1}}, "units.protected: 1 is greater than or equal to"),
        ({"models": {"a": HUB}, "units": {"window": 9}}, "units.window: 9 is not one of [8, 10, 12, 14]"),
        ({"models": {"a": HUB}, "search": {"n_envs": 1}}, "search.n_envs: 1 is less than the minimum of 2"),
        ({"models": {"a": HUB}, "search": {"targets": []}}, "search.targets: []"),
        (
            {"models": {"a": HUB}, "search": {"targets": [4, 1]}},
            "search.targets: [4, 1] ends below its beginning; give from, to, as in [1, 4]",
        ),
        ({"models": {"a": {**HUB, "search": {"targets": [4, 1]}}}}, "models.a.search.targets: [4, 1] ends below"),
        (
            {"models": {"a": HUB}, "ablations": {"x": {"y": {"search": {"targets": [4, 1]}}}}},
            "ablations.x.y.search.targets: [4, 1] ends below",
        ),
        ({"models": {"a": HUB}, "recovery": {"steps": True}}, "recovery.steps: True is not of type 'integer', 'null'"),
        ({"models": {"a": HUB}, "evaluation": {"tasks": "cloze"}}, "evaluation.tasks: 'cloze' is not of type 'array'"),
        ({"models": {"a": HUB}, "seed": -1}, "seed: -1 is less than the minimum of 0"),
        ({"models": {"a": HUB}, "seed": 2**32}, "seed: 4294967296 is greater than the maximum of 4294967295"),
        ({"models": {"a": HUB}, "seeds": [0, 0]}, "seeds: [0, 0] has non-unique elements"),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(WindquantError) as caught:
        validation.validate(config, SCHEMA)
    assert str(caught.value).startswith(f"configuration: {message}")
    assert "\n" not in str(caught.value)


def numbers() -> dict[str, dict[str, Any]]:
    """The schema of every number in the configuration, also of those in a list."""
    sections = {"": SCHEMA, **{f"{name}.": SCHEMA["$defs"][name] for name in schema_module.SECTIONS}}
    keys = {f"{name}{key}": value for name, part in sections.items() for key, value in part["properties"].items()}
    found = {key: value.get("items", value) for key, value in keys.items()}
    return {key: value for key, value in found.items() if re.search("integer|number", str(value.get("type")))}


@pytest.mark.parametrize("key", numbers())
def test_every_number_has_a_lower_bound(key: str) -> None:
    """So that a wrong one is refused before anything runs."""
    assert {"minimum", "exclusiveMinimum", "enum"} & numbers()[key].keys()


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    config = yaml.safe_load("models: {a: {source: hub, id: a/b}}\nunits: {protected: 3e-2}\nrecovery: {steps: '4'}")
    assert config["units"]["protected"] == "3e-2"
    checked = validation.validate(config, SCHEMA)
    assert (checked["units"]["protected"], checked["recovery"]["steps"]) == (0.03, 4)


def test_whole_numbers_are_whole_however_they_are_written() -> None:
    config = yaml.safe_load(
        "models: {a: {source: hub, id: a/b, seed: 2.0}}\nseeds: [0, 1.0]\nstatistics: {batch: 1e1}\n"
        "recovery: {steps: 8.0, norm_rate: 1.0}"
    )
    checked = validation.validate(config, SCHEMA)
    found = [checked["models"]["a"]["seed"], *checked["seeds"], checked["statistics"]["batch"]]
    found += checked["recovery"].values()
    assert found == [2, 0, 1, 10, 8, 1.0]
    assert [type(value) for value in found] == [int] * 5 + [float]
    with pytest.raises(WindquantError, match=r"statistics\.batch: 8\.5 is not of type 'integer'"):
        validation.validate({"models": {"a": HUB}, "statistics": {"batch": 8.5}}, SCHEMA)


def test_what_is_given_for_one_call_holds_for_models_with_settings_of_their_own() -> None:
    given = {"units": {"chunk": 64}, "evaluation": {"windows": 0}, "seed": 3, "recovery": {"steps": 9}}
    given["ablations"] = {"chunk": {"chunk48": {"units": {"chunk": 48}}}}
    own = {"units": {"chunk": 192, "protected": 0}, "evaluation": {"windows": 16}, "seed": 1, "ablations": {"x": {}}}
    config = {**given, "models": {"a": {**HUB, **own}, "b": HUB}}
    checked = configuration.overruled(config, given)
    for name in ("a", "b"):
        found = configuration.resolve(checked, SCHEMA, name)
        assert (found["units"]["chunk"], found["evaluation"]["windows"], found["seed"]) == (64, 0, 3)
        assert found["recovery"]["steps"] == 9
        assert "chunk48" in configuration.study(checked, SCHEMA, name, "ablations")["chunk"]
    assert configuration.resolve(checked, SCHEMA, "a")["units"]["protected"] == 0
    assert configuration.overruled({"models": None}, given) == {"models": None}


def test_unknown_models_are_named() -> None:
    with pytest.raises(WindquantError, match="unknown model lama2-7b, did you mean llama2-7b"):
        configuration.resolve(CONFIG, SCHEMA, "lama2-7b")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("ablations: {chunk: {32: {units: {chunk: 32}}}}", "ablations.chunk.32"),
        ("ablations: {recovery: {off: {recovery: {steps: 0}}}}", "ablations.recovery.False"),
        ("models: {135: {source: embedded}}", "models.135"),
    ],
)
def test_names_that_yaml_takes_for_something_else(text: str, where: str) -> None:
    with pytest.raises(WindquantError, match=rf"configuration: {where}: a name is text; write it in quotes"):
        validation.validate(yaml.safe_load(text), schema_module.schema())


def test_unreadable_configurations(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(WindquantError, match="No such file"):
        configuration.load(path)
    path.write_text("a: [1,\nb: 2")
    with pytest.raises(WindquantError, match="not YAML"):
        configuration.load(path)
    path.write_bytes(b"a: caf\xe9\n")
    with pytest.raises(WindquantError, match="not UTF-8"):
        configuration.load(path)
    path.write_text("# nothing yet\n")
    with pytest.raises(WindquantError, match="holds no keys"):
        configuration.load(path)


def test_locked_versions_are_those_of_the_project_and_of_conda() -> None:
    def pins(path: str) -> set[str]:
        return {line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    exact = {canonical(line.partition(";")[0]) for line in wanted if "==" in line}
    locked = pins("requirements.lock")
    assert exact <= {canonical(line) for line in locked | pins("requirements-dev.lock")}
    conda = yaml.safe_load((ROOT / "workflow" / "envs" / "windquant.yaml").read_text())
    assert set(conda["dependencies"][-1]["pip"]) == locked
    assert not any("+" in line or "://" in line for line in locked)


def canonical(pin: str) -> str:
    """Without the extras ("moto[server]"), which a lock does not name."""
    return re.sub(r"\[.*]", "", pin.strip().lower().replace("_", "-"))
