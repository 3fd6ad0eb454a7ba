"""Result, comparison and summary, from artifacts that the step frame really made."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from windquant import comparison, result, result_file, step, summary, tracking
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.plan import Plan
from windquant.report import pareto_picture

KEYS = [
    "model",
    "target_bits",
    "effective_bits",
    "checkpoint_bits",
    "allocator",
    "perplexity",
    "zero_shot",
    "zero_shot_average",
    "actions",
    "protected_fraction",
    "fallback",
    "seed",
    "seconds",
    "peak_memory_bytes",
    "versions",
    "git_commit",
    "config_sha256",
    "data",
    "mlflow_run_id",
]
WEIGHTS, BYTES = 8000, 1995
SIZE = 200_000  # of the checkpoint


@dataclass(frozen=True)
class Units:
    protected: float = 0.03  # fraction
    chunk: int = 64  # columns


def make(name: str, output: str, write: Callable[[step.Task], None], **inputs: str) -> str:
    """Run a step that only writes; returns the path of its output."""
    argv = [part for key, path in inputs.items() for part in ("--" + key, path)]
    step.main(
        name,
        lambda task, _: write(task),
        Units,
        tuple(inputs),
        argv=[*argv, "--output", output, "--seed", "5"],
        light=True,
    )
    return output


def text(content: str, **notes: Any) -> Callable[[step.Task], None]:
    def write(task: step.Task) -> None:
        task.output.write_text(content)
        for key, value in notes.items():
            task.note(key, value)

    return write


def checkpoint(size: int, **notes: Any) -> Callable[[step.Task], None]:
    def write(task: step.Task) -> None:
        task.output.mkdir()
        (task.output / "model.safetensors").write_bytes(bytes(size))
        for key, value in notes.items():
            task.note(key, value)

    return write


def perplexity(value: float, tokens: int = 1023) -> Callable[[step.Task], None]:
    return text(json.dumps({"wikipedia": {"perplexity": value, "tokens": tokens, "context": 1024}}))


TASKS = {"cloze": 0.0, "next_sentence": 0.1}  # and how much easier than the first they are


def zero_shot(output: str, accuracy: float, samples: int = 100, **inputs: str) -> list[str]:
    """The evaluations of a checkpoint, one per task."""
    made = []
    for name, easier in TASKS.items():
        scores = {name: {"accuracy": accuracy + easier, "stderr": 0.04, "samples": samples, "metric": "acc"}}
        made.append(
            make("zero_shot", f"{output}.{name}", text(json.dumps(scores)), **inputs, calibration="calibration")
        )
    return made


def save_plan(allocator: str, target: float) -> Callable[[step.Task], None]:
    def write(task: step.Task) -> None:
        bits = 8 * BYTES / WEIGHTS
        actions = {"layers.0.q": ["scalar-2", "scalar-4"]}
        Plan("m", allocator, target, bits, BYTES, WEIGHTS, 5, actions, predicted_loss=0.5).save(task.output)
        task.note("shares", {"scalar-2": 0.75, "scalar-4": 0.25})

    return write


Inputs = dict[str, str | list[str]]


def chain(allocator: str = "ppo", quantized: float = 50.0, target: float = 2.0) -> Inputs:
    """All artifacts of one experiment."""
    found: Inputs = {"model": make("model", "model", checkpoint(2000))}
    found["calibration"] = make("calibration", "calibration", checkpoint(10), model="model")
    shared = {"model": "model", "calibration": "calibration"}
    found["statistics"] = make("statistics", "statistics", text("s"), **shared)
    found["bank"] = make("bank", "bank", text("b"), model="model", statistics="statistics")
    plan, before, after = (f"{allocator}.{part}" for part in ("plan", "before", "after"))
    policy = {}
    if allocator == "ppo":
        found["search"] = make("search", "search", text("p"), **shared, bank="bank")
        policy = {"search": "search"}
    found["plan"] = make("allocation", plan, save_plan(allocator, target), **shared, bank="bank", **policy)
    notes = {"effective_bits": 8 * BYTES / WEIGHTS, "checkpoint_bits": 4.0, "measured_bytes": BYTES}
    found["before_recovery"] = make("quantize", before, checkpoint(SIZE, **notes), **shared, plan=plan)
    found["quantized"] = make("recovery", after, checkpoint(SIZE, **notes), **shared, checkpoint=before)
    data = {"calibration": "calibration"}
    found["perplexity_original"] = make("perplexity", "p0", perplexity(19.4), checkpoint="model", **data)
    name = f"{allocator}.p"
    found["perplexity_before_recovery"] = make("perplexity", name + "1", perplexity(120.0), checkpoint=before, **data)
    found["perplexity_quantized"] = make("perplexity", name + "2", perplexity(quantized), checkpoint=after, **data)
    found["zero_shot_original"] = zero_shot("z0", 0.5, checkpoint="model")
    found["zero_shot_quantized"] = zero_shot(f"{allocator}.z", 0.375, checkpoint=after)
    return found


def assemble(inputs: Inputs, output: str = "results/r.json", *argv: str) -> dict[str, Any]:
    several = {name: paths for name, paths in inputs.items() if isinstance(paths, list)}
    flags = [
        part
        for name, paths in inputs.items()
        if paths
        for part in ("--" + name.replace("_", "-"), *several.get(name, [str(paths)]))
    ]
    names = [f"{name}{'*' * (name in several)}" for name in inputs]
    step.main("result", result.run, result.Settings, names, argv=[*flags, "--output", output, *argv], light=True)
    return result_file.load(Path(output))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Assemble and return the error line."""

    def run(inputs: Inputs) -> str:
        with pytest.raises(SystemExit) as caught:
            assemble(inputs)
        assert caught.value.code == 2
        assert not Path("results/r.json").exists()
        return capsys.readouterr().err

    return run


def test_every_key_is_measured() -> None:
    inputs = chain()
    found = assemble(inputs, "results/r.json", "--config-sha256", "a" * 64)
    assert list(found) == KEYS
    assert (found["model"], found["allocator"], found["seed"], found["fallback"]) == ("m", "ppo", 5, False)
    assert (found["target_bits"], found["effective_bits"], found["checkpoint_bits"]) == (2.0, 1.995, 4.0)
    assert found["perplexity"] == {"wikipedia": {"original": 19.4, "before_recovery": 120.0, "quantized": 50.0}}
    assert found["zero_shot"]["cloze"] == {"original": 0.5, "quantized": 0.375, "stderr": 0.04, "samples": 100}
    assert found["zero_shot_average"] == pytest.approx({"original": 0.55, "quantized": 0.425})
    assert found["actions"] == {"scalar-2": 0.75, "scalar-4": 0.25}
    assert found["protected_fraction"] == 0.03
    assert found["config_sha256"] == "a" * 64
    manifest = Manifest.load(Path("ppo.after"))
    assert found["seconds"]["recovery"] == manifest.seconds
    assert found["peak_memory_bytes"]["recovery"] == manifest.peak_memory_bytes
    assert found["data"]["quantized"] == manifest.output["sha256"]
    assert found["versions"] == manifest.versions
    assert set(found["seconds"]) == set(found["peak_memory_bytes"]) == set(result_file.STEPS)
    tasks = [Manifest.load(Path(f"ppo.z.{name}")) for name in TASKS]
    assert found["seconds"]["zero_shot_quantized"] == pytest.approx(sum(task.seconds for task in tasks))
    assert found["peak_memory_bytes"]["zero_shot_quantized"]["host"] == max(
        task.peak_memory_bytes["host"] for task in tasks
    )
    assert "search" in found["data"]
    notes = Manifest.load(Path("results/r.json")).notes
    assert notes == {"checkpoint_bytes": SIZE, "original_fp16_bytes": 4 * SIZE}  # 4 bits instead of 16
    again = assemble(inputs, "results/again.json", "--config-sha256", "a" * 64)
    assert again == found


def test_a_shared_bank_counts_its_jobs() -> None:
    inputs = chain()
    parts = [make("bank", f"bank.{i}", text(f"{i}"), model="model", statistics="statistics") for i in range(2)]
    made = ["--model", "model", "--statistics", "statistics", "--parts", *parts, "--output", "bank"]
    step.main("bank", lambda task, _: text("b")(task), Units, ("model", "statistics", "parts*"), argv=made, light=True)
    jobs = [Manifest.load(Path(path)) for path in ("bank", *parts)]
    assert assemble(inputs)["seconds"]["bank"] == pytest.approx(sum(job.seconds for job in jobs))


def test_without_zero_shot_tasks() -> None:
    found = assemble(chain() | {"zero_shot_original": [], "zero_shot_quantized": []})
    assert (found["zero_shot"], found["zero_shot_average"]) == ({}, {"original": None, "quantized": None})
    assert found["seconds"]["zero_shot_original"] == found["peak_memory_bytes"]["zero_shot_quantized"]["gpu"] == 0


def test_every_task_must_belong_to_the_checkpoint(fails: Callable[..., str]) -> None:
    inputs = chain()
    zero_shot("ppo.z", 0.375, checkpoint="model")
    assert "error: ppo.z.cloze: made from another ppo.after; delete it and run again" in fails(inputs)


def test_configuration_digest_of_the_settings() -> None:
    assert len(assemble(chain())["config_sha256"]) == 64


def test_bytes_must_be_those_of_the_plan(fails: Callable[..., str]) -> None:
    inputs = chain()
    notes = {"effective_bits": 1.996, "checkpoint_bits": 4.0, "measured_bytes": BYTES + 1}
    made = {"model": "model", "calibration": "calibration", "checkpoint": "ppo.before"}
    make("recovery", "ppo.after", checkpoint(SIZE, **notes), **made)
    error = fails(inputs)
    assert error.startswith("error: ppo.after: 1996 bytes, 1.996 effective bits, but its plan predicted 1995 and 1.995")


def test_target_is_an_upper_bound(fails: Callable[..., str]) -> None:
    assert "effective_bits 1.995 exceed target_bits 1.9" in fails(chain(target=1.9))


def test_a_baseline_has_no_search() -> None:
    greedy = assemble(chain("greedy"))
    assert set(greedy["seconds"]) == set(result_file.STEPS) - {"search"}
    assert "search" not in greedy["data"]


def test_all_steps_must_belong_together(fails: Callable[..., str]) -> None:
    inputs = chain()
    make("bank", "bank", text("another"), model="model", statistics="statistics")
    assert "error: search: made from another bank; delete it and run again" in fails(inputs)
    other = {**chain(), "quantized": make("recovery", "other", checkpoint(9), checkpoint="ppo.before")}
    assert "error: ppo.p2: made from another other" in fails(other)


def test_evaluations_must_be_on_the_same_data(fails: Callable[..., str]) -> None:
    inputs = chain()
    make("perplexity", "p0", perplexity(19.4, tokens=7), checkpoint="model", calibration="calibration")
    assert "perplexity was measured on different data (tokens" in fails(inputs)
    inputs = chain()
    zero_shot("z0", 0.5, samples=7, checkpoint="model")
    assert "zero-shot accuracy was measured on different data (samples" in fails(inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
def test_values_must_make_sense(value: float, fails: Callable[..., str]) -> None:
    assert "perplexity.wikipedia.quantized" in fails(chain(quantized=value))


def test_what_is_missing_is_named(fails: Callable[..., str]) -> None:
    inputs = chain()
    make("recovery", "ppo.after", checkpoint(SIZE), checkpoint="ppo.before")
    make("perplexity", "ppo.p2", perplexity(50.0), checkpoint="ppo.after")
    zero_shot("ppo.z", 0.375, checkpoint="ppo.after")
    assert "ppo.after: its manifest has no notes.measured_bytes" in fails(inputs)
    inputs = chain()
    Path("ppo.after.manifest.json").unlink()
    assert "ppo.after.manifest.json: not a readable manifest" in fails(inputs)
    inputs = chain()
    Path("p0").write_text("{")
    assert "p0: damaged" in fails(inputs)


def test_files_that_are_no_results() -> None:
    for content in ("{", "{}", json.dumps({**assemble(chain()), "more": 1})):
        Path("x.json").write_text(content)
        with pytest.raises(WindquantError, match=r"x\.json: "):
            result_file.load(Path("x.json"))


def test_the_parent_run_gets_the_result() -> None:
    made = ["--model", "m", "--bits", "2.0", "--allocator", "ppo", "--output", "e.json"]
    step.main("experiment", tracking.run, tracking.Settings, argv=made, light=True)
    found = assemble(chain(), "results/r.json", "--experiment", "e.json")

    from mlflow.tracking import MlflowClient

    run = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db").get_run(found["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["perplexity.wikipedia.quantized"] == 50.0
    assert run.data.metrics["effective_bits"] == 1.995
    assert run.data.metrics["checkpoint_bytes"] == SIZE
    assert {name: run.data.tags[name] for name in ("chunk", "seed", "model")} == {
        "chunk": "64",
        "seed": "5",
        "model": "m",
    }
    artifacts = Path("mlartifacts") / run.info.run_id / "artifacts"
    assert json.loads((artifacts / "result.json").read_text()) == found
    assert Plan.load(artifacts / "plan.json").allocator == "ppo"
    assert (artifacts / "plan.svg").read_text().startswith("<?xml")
    assert run.data.params["bank.chunk"] == "64"
    assert "| effective bits per weight | 16 | 1.9950 |" in run.data.tags["mlflow.note.content"]
    assert run.inputs is not None
    assert {entry.tags[0].value for entry in run.inputs.dataset_inputs} == {"model", "texts"}


def test_settings_of_the_search_are_parameters_of_ppo_only() -> None:
    ppo, greedy = (
        set(
            result.parameters_of(
                {name: Manifest.load(Path(path)) for name, path in chain(allocator).items() if isinstance(path, str)},
                allocator,
            )
        )
        for allocator in ("ppo", "greedy")
    )
    assert {"search.chunk", "allocation.chunk", "bank.chunk"} <= ppo
    assert ppo - greedy == {name for name in ppo if name.startswith(("allocation.", "search."))}
    assert greedy - ppo == {"allocation.allocator"}  # these plans have no such setting


def compare(*results: str) -> pd.DataFrame:
    argv = ["--output", "results/c.csv", "--results", *results]
    step.main("comparison", comparison.run, comparison.Settings, ("results*",), argv=argv, light=True)
    return pd.read_csv("results/c.csv")


def test_comparison() -> None:
    for allocator, value in (("uniform", 130.0), ("ppo", 50.0), ("greedy", 60.0)):
        assemble(chain(allocator, value), f"results/m_2.0bits.{allocator}.json")
    table = compare(*(f"results/m_2.0bits.{name}.json" for name in ("uniform", "ppo", "greedy")))
    assert list(table["allocator"]) == ["ppo", "greedy", "uniform"]
    assert list(table["perplexity_wikipedia_quantized"]) == [50.0, 60.0, 130.0]
    assert list(table["perplexity_wikipedia_original"]) == [19.4] * 3
    assert table["gap_wikipedia_quantized"][0] == pytest.approx(math.log(50 / 19.4), abs=1e-4)
    assert list(table["zero_shot_average_quantized"]) == [0.425] * 3
    assert {"effective_bits", "seconds", "fallbacks", "actions_scalar-2"} <= set(table)
    assert list(table["seeds"]) == [1] * 3
    assert table["perplexity_wikipedia_quantized_std"].isna().all()


def test_comparison_of_seeds_changes_and_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds share a row, changes and budgets do not."""
    values = {"2.0bits": 50.0, "2.0bits.ppo-1": 54.0, "2.0bits.ppo-chunk32": 48.0, "2.0bits.ppo-chunk32-1": 49.0}
    paths = []
    for seed, (name, value) in enumerate(values.items()):
        entry = assemble(chain("ppo", value), "results/r.json")
        paths.append(f"results/m_{name}.json")
        Path(paths[-1]).write_text(json.dumps({**entry, "seed": seed % 2}))
    assemble(chain("ppo", 30.0, target=2.5), "results/m_2.5bits.json")
    table = compare(*paths, "results/m_2.5bits.json").fillna("")
    assert list(zip(table["target_bits"], table["change"], table["seeds"], strict=True)) == [
        (2.0, "chunk32", 2), (2.0, "", 2), (2.5, "", 1)
    ]  # fmt: skip
    assert list(table["perplexity_wikipedia_quantized"]) == [48.5, 52.0, 30.0]
    assert list(table["perplexity_wikipedia_quantized_std"])[:2] == [0.7071, 2.8284]
    assert "perplexity_wikipedia_original_std" not in table

    other = json.loads(Path(paths[0]).read_text()) | {"model": "n"}
    Path("results/n_2.0bits.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit):
        compare(paths[0], "results/n_2.0bits.json")
    assert "cannot compare different values of model: m, n" in capsys.readouterr().err


def test_the_pareto_picture_has_every_budget() -> None:
    for target, value in ((2.0, 50.0), (2.5, 30.0)):
        assemble(chain("ppo", value, target=target), f"results/m_{target}bits.json")
    argv = ["--output", "results/m.pareto.svg", "--results", "results/m_2.0bits.json", "results/m_2.5bits.json"]
    step.main("pareto_picture", pareto_picture.run, pareto_picture.Settings, ("results*",), argv=argv, light=True)
    picture = Path("results/m.pareto.svg").read_text()
    assert picture.startswith("<?xml")
    assert "perplexity 50.00" in picture
    assert "perplexity 30.00" in picture


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assemble(chain())
    capsys.readouterr()
    summary.main(["results/r.json"])
    output = capsys.readouterr().out
    lines = [" ".join(word for word in line.split() if word not in "│┃|") for line in output.splitlines()]
    assert "perplexity, wikipedia 19.40 50.00" in lines
    assert "accuracy, cloze 50.0% 37.5% ± 4.0%" in lines
    assert "effective bits per weight 16 1.9950" in lines
    assert "checkpoint size (original: FP16) 0.8 MB 0.2 MB" in lines
    assert any(line.startswith("total 0:0") for line in lines)
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in output
    assert "\x1b" not in output  # no colours in a pipe
    assert max(map(len, output.splitlines())) <= 120

    with pytest.raises(SystemExit) as caught:
        summary.main(["results/none.json"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: results/none.json: not a readable result")


def test_the_command_that_shows_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(Path.cwd() / ".venv"))
    assert summary.interface() == ".venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert summary.interface() == "open http://server:5000 in a browser"
