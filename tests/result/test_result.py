"""The result, from artifacts that the step frame really made."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.result.experiment import (
    BYTES,
    SIZE,
    TASKS,
    Inputs,
    Units,
    assemble,
    chain,
    checkpoint,
    make,
    perplexity,
    text,
    zero_shot,
)
from windquant import result, result_file, step
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.plan import Plan

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


def test_the_seed_is_that_of_the_recovery() -> None:
    inputs = chain("lagrangian")
    assert assemble(inputs)["seed"] == 5
    again = {"model": "model", "calibration": "calibration", "checkpoint": str(inputs["before_recovery"])}
    after = str(inputs["quantized"])
    notes = Manifest.load(Path(after)).notes
    make("recovery", after, checkpoint(SIZE, **notes), seed=7, **again)
    assert assemble(inputs, "results/seven.json")["seed"] == 7, "the plan draws nothing and keeps its own"


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
    Path("p0").write_text("{")
    assert "p0: damaged" in fails(inputs)
    inputs = chain()
    Path("ppo.after.manifest.json").unlink()
    assert "ppo.after.manifest.json: not a readable manifest" in fails(inputs)


def test_files_that_are_no_results() -> None:
    for content in ("{", "{}", json.dumps({**assemble(chain()), "more": 1})):
        Path("x.json").write_text(content)
        with pytest.raises(WindquantError, match=r"x\.json: "):
            result_file.load(Path("x.json"))


def test_the_parent_run_gets_the_result() -> None:
    found = assemble(chain(), "results/r.json", "--experiment", "m_2.0bits.ppo")

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
