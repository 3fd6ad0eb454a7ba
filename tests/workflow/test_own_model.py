"""`python -m windquant quantize`: from a folder to a checkpoint with its card, and what is refused before any work."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.workflow.commands import run, windquant
from tests.workflow.conftest import BITS, tiny_config
from windquant import checkpoint, configuration, own_model, validation
from windquant.errors import WindquantError

SMALL = [
    f"--set={section}.{key}={json.dumps(value)}"
    for section, values in tiny_config(Path()).items()
    if section in ("calibration", "units", "recovery", "evaluation") and isinstance(values, dict)
    for key, value in values.items()
    if key not in ("path", "source", "test_source")
]


@pytest.fixture(scope="module")
def folder(clone: Callable[[], Path]) -> Path:
    return clone()


def test_one_line_makes_a_checkpoint_with_its_card(folder: Path, tiny_model_folder: Path, text_file: Path) -> None:
    out = folder / "out"
    line = ("quantize", str(tiny_model_folder), "--bits", BITS, "--out", str(out), "--text", str(text_file))
    line += ("--allocator", "lagrangian", "--cores", "1", *SMALL)
    shown = windquant(folder, *line, PYTHONPATH=str(folder))
    assert "effective bits per weight" in shown
    assert f"python -m windquant generate {out}" in shown
    packed = checkpoint.read(out)
    assert packed.plan.allocator == "lagrangian"
    card = (out / "README.md").read_text()
    result = json.loads((out / "result.json").read_text())
    perplexity = next(iter(result["perplexity"].values()))
    assert f"{result['effective_bits']:.4f}" in card.partition("## Measured")[2]
    assert f"| {perplexity['original']:.2f} | {perplexity['quantized']:.2f} |" in card
    assert not (folder / "data").exists(), "the project's own folder stays as it is"

    (out / "README.md").unlink()
    again = windquant(folder, *line, PYTHONPATH=str(folder))
    assert "Nothing to be done" in again
    assert (out / "README.md").read_text() == card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere", "--bits", "2", "--out", "o"],
            "nowhere: neither a folder or file here nor a repository on the Hub",
        ),
        (["smolm2-135m", "--bits", "2", "--out", "o"], "did you mean smollm2-135m?"),
        (["a/b", "--bits", "many", "--out", "o"], "--bits many: not a number"),
        (["a/b", "--bits", "0.5", "--out", "o"], "0.5 bits: impossible"),
        (["a/b", "--bits", "2", "--out", "o", "--allocator", "gredy"], "did you mean greedy?"),
        (["a/b", "--bits", "2", "--out", "o", "--text", "none.txt"], "--text none.txt: no such file"),
        (["a/b", "--bits", "2", "--out", "o", "--set", "recovery.stps=1"], "did you mean models.b.recovery.steps?"),
        (
            ["a/b", "--bits", "2", "--out", "o", "--set", "recovery.steps=x"],
            "recovery.steps: 'x' is not of type 'integer'",
        ),
        (["a/b", "--bits", "2", "--out", "o", "--set", "recovery"], "--set recovery: give KEY=VALUE"),
        (["a/b", "--bits", "2", "--out", "o", "--set", "units.order=@x"], "--set units.order=@x: @x is not YAML"),
        (["a/b", "--bits", "2", "--out", "o", "--set", "source.x=1"], "models.b.source: {'x': 1} is not"),
        (["a/b", "--bits", "2", "--out", "o", "--set", "calibration.path=5"], "calibration.path: 5 is not of type"),
        (["a/b", "--bits", "2", "--out", "."], "--out .: would be replaced"),
        (["config", "--bits", "2", "--out", "o"], "config: no config.json"),
        (["a/b", "--bits", "2", "--out", "config"], "--out config: would be replaced"),
        (["a/b", "--bits", "2", "--out", "Snakefile"], "--out Snakefile: is a file"),
        (["a/b", "--bits", "2", "--out", "o", "--work", "o/work"], "--work o/work: in the folder that --out replaces"),
        (["a/b", "--bits", "2", "--out", "o", "--work", "o"], "--work o: in the folder that --out replaces"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(WindquantError) as refusal:
        own_model.main(arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (folder / "o.work").exists()


def test_what_the_user_has_put_into_an_output_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    own_model.check_output(out, None)
    (out / "result.json").touch()
    with pytest.raises(WindquantError, match=r"result\.json in it was not made by this command"):
        own_model.check_output(out, None)
    (out / ".windquant").write_text("config.json\nresult.json\n")
    own_model.check_output(out, tmp_path / "out.work")
    (out / "mine.json").touch()
    with pytest.raises(WindquantError, match=r"mine\.json in it was not made by this command"):
        own_model.check_output(out, None)


def test_paths_start_where_the_caller_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(own_model, "run_workflow", lambda *_: None)
    sets = ["calibration.path=mine.txt", "calibration.source=file", "evaluation={data_dir: tasks}"]
    own_model.quantize("a/b", "2.0", Path(), changes=sets, dry_run=True)
    entry = yaml.safe_load((tmp_path / "here.work" / "config" / "config.yaml").read_text())["models"]["b"]
    assert entry["calibration"] == {"path": str(tmp_path / "here" / "mine.txt"), "source": "file"}
    assert entry["evaluation"] == {"data_dir": str(tmp_path / "here" / "tasks")}


@pytest.mark.parametrize(
    ("folder_name", "name"),
    [("My model (1)", "my-model-1"), ("a&b;c$d", "a-b-c-d"), (".hidden_", "hidden"), ("模型", "model")],
)
def test_a_folder_gives_a_name_that_is_safe_in_a_shell(tmp_path: Path, folder_name: str, name: str) -> None:
    (tmp_path / folder_name).mkdir()
    (tmp_path / folder_name / "config.json").write_text("{}")
    found, entry = own_model.describe(str(tmp_path / folder_name), None)
    assert found == name
    schema = configuration.load(own_model.ROOT / "workflow" / "schemas" / "config.schema.yaml")
    validation.validate({"models": {found: entry}}, schema)


def test_a_failed_step_gives_its_reason_last(folder: Path) -> None:
    """A Hub model without a Hub."""
    line = ("quantize", "nobody/nothing", "--bits", "2.0", "--out", "x", "--cores", "1")
    done = run(folder, sys.executable, "-m", "windquant", *line, PYTHONPATH=str(folder), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    said = done.stdout.splitlines()[-1]
    assert said.startswith("error: ")
    assert "models.nothing.id: nobody/nothing is not on this machine" in said
    assert "the same line again goes on" in said


def test_a_dry_run_shows_the_chain_and_paths_are_absolute(folder: Path, tiny_model_folder: Path) -> None:
    out = ["--bits", "3.0", "--out", "dry", "--dry-run"]
    done = run(
        folder, sys.executable, "-m", "windquant", "quantize", str(tiny_model_folder), *out, PYTHONPATH=str(folder)
    )
    assert done.returncode == 0, done.stdout
    assert "recovery" in done.stdout
    entry = yaml.safe_load((folder / "dry.work" / "config" / "config.yaml").read_text())["models"]["tiny"]
    assert entry["path"] == str(tiny_model_folder)
    assert entry["units"]["chunk"] == 64, "the model is small"
    assert entry["calibration"]["source"] == "articles"
    assert not (folder / "dry").exists()


def test_an_entry_of_the_configuration_keeps_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"calibration": {"source": "file", "path": "mine.txt"}, "evaluation": {"tasks": [], "windows": 64}}
    models = {"own": {"source": "folder", "path": "x", **texts}, "bare": {"source": "folder", "path": "x"}}
    monkeypatch.setattr(own_model.configuration, "load", lambda _: {"models": models})
    assert own_model.describe("own", None)[1] == models["own"]
    assert own_model.describe("bare", None)[1] == models["bare"] | own_model.WITHOUT_HUB
    assert own_model.describe("own", "articles")[1] == models["own"] | own_model.WITHOUT_HUB


def test_a_ready_model_keeps_its_settings() -> None:
    name, entry = own_model.describe("smollm2-135m", None)
    assert (name, entry["source"], entry["units"]["chunk"]) == ("smollm2-135m", "embedded", 192)
    name, entry = own_model.describe("Qwen/Qwen3_0.6B", None)
    assert (name, entry) == ("qwen3-0.6b", {"source": "hub", "id": "Qwen/Qwen3_0.6B"})
    _, entry = own_model.describe("smollm2-135m", "hub")
    assert not {"calibration", "evaluation"} & entry.keys(), "the shared ones hold"
    assert own_model.anchored({"calibration": {"path": "a/b", "source": "file"}}) == {
        "calibration": {"path": str(own_model.ROOT / "a/b"), "source": "file"}
    }
