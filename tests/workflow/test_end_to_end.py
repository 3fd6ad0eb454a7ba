"""The whole workflow on a tiny model, for real, and what runs again after a change."""

import json
from pathlib import Path

import pytest

from tests.workflow.conftest import BITS, GREEDY, LOCAL, MODEL, RESULT, Snakemake
from tests.workflow.test_dry_run import CHAIN, planned


def again(folder: Path, snakemake: Snakemake, *arguments: str) -> dict[str, int]:
    """The jobs that would run."""
    done = snakemake(folder, "-n", *arguments)
    assert done.returncode == 0, done.stdout
    return planned(done.stdout)


def test_result_and_everything_on_the_way(finished: Path) -> None:
    result = json.loads((finished / RESULT).read_text())
    assert result["model"] == MODEL
    assert result["target_bits"] == float(BITS)
    assert 0 < result["effective_bits"] <= float(BITS)
    assert result["allocator"] == "ppo"
    assert result["perplexity"]
    assert set(result["zero_shot"]) == {"cloze"}
    assert json.loads((finished / GREEDY).read_text())["allocator"] == "greedy"
    for name in (f"data/plans/{MODEL}_{BITS}bits.ppo.json", f"data/checkpoints/{MODEL}_{BITS}bits.greedy/quantized"):
        manifest = json.loads((finished / f"{name}.manifest.json").read_text())
        assert manifest["output"]["path"] == name
    logs = sorted(path.relative_to(finished / "logs").as_posix() for path in (finished / "logs").rglob("*.log"))
    assert f"recovery/{MODEL}_{BITS}bits.ppo.log" in logs
    assert len(list((finished / "logs").rglob("*.benchmark.jsonl"))) == len(logs)
    assert not list(finished.rglob("*.partial-*"))


def test_tracking_has_a_run_for_every_step(finished_once: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{finished_once / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    assert {run.info.status for run in runs if "step" in run.data.tags} == {"FINISHED"}
    steps = [run.data.tags["step"] for run in runs if "step" in run.data.tags]
    for step, count in {
        "statistics": 1,
        "bank": 1,
        "search": 1,
        "allocation": 2,
        "recovery": 2,
        "perplexity": 5,
    }.items():
        assert steps.count(step) == count, step


def test_second_call_has_nothing_to_do(finished: Path, snakemake: Snakemake) -> None:
    assert again(finished, snakemake, RESULT, GREEDY) == {}
    done = snakemake(finished, RESULT, GREEDY)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_recovery_steps_rerun_recovery_and_evaluation_only(finished: Path, snakemake: Snakemake) -> None:
    jobs = again(finished, snakemake, RESULT, "--config", "recovery={steps: 3}")
    assert jobs == {"recovery": 1, "perplexity": 1, "zero_shot": 1, "result": 1}


def test_another_budget_keeps_statistics_bank_and_search(finished: Path, snakemake: Snakemake) -> None:
    jobs = again(finished, snakemake, f"results/{MODEL}_5.0bits.json")
    shared = {"model", "calibration", "statistics", "bank", "search", "perplexity_original"}
    chain = CHAIN | {"zero_shot": 1}
    assert jobs == {rule: n for rule, n in chain.items() if rule not in {*shared, "zero_shot_original"}}


def test_chunk_reruns_the_bank_and_what_follows(finished: Path, snakemake: Snakemake) -> None:
    jobs = again(finished, snakemake, RESULT, "--config", "units={chunk: 8}")
    assert {"bank", "allocation", "quantize", "recovery", "perplexity", "zero_shot", "result"} <= set(jobs)
    assert not {"model", "calibration", "perplexity_original", "zero_shot_original"} & set(jobs)


def test_search_settings_rerun_the_plan_of_ppo_alone(finished: Path, snakemake: Snakemake) -> None:
    jobs = again(finished, snakemake, RESULT, GREEDY, "--config", "search={episodes: 9}")
    assert jobs["search"] == jobs["allocation"] == jobs["quantize"] == 1
    assert "bank" not in jobs


def test_evaluation_settings_rerun_evaluations_only(finished: Path, snakemake: Snakemake) -> None:
    jobs = again(finished, snakemake, RESULT, "--config", "evaluation={windows: 3}")
    assert jobs == {"perplexity_original": 1, "perplexity": 2, "result": 1}


def test_comments_rerun_nothing_and_code_reruns_its_step(finished: Path, snakemake: Snakemake) -> None:
    path = finished / "windquant" / "recovery.py"
    code = path.read_text()
    try:
        path.write_text(code.replace('"""', '"""Edited. ', 1) + "\n\n# a comment\n")
        assert again(finished, snakemake, RESULT) == {}
        path.write_text(f"{code}\nUNUSED = 1\n")
        assert again(finished, snakemake, RESULT) == {"recovery": 1, "perplexity": 1, "zero_shot": 1, "result": 1}
    finally:
        path.write_text(code)
    assert again(finished, snakemake, RESULT) == {}


def test_changed_model_reruns_all(finished: Path, snakemake: Snakemake) -> None:
    path = finished / LOCAL / "model" / "generation_config.json"
    content = path.read_bytes()
    try:
        path.write_bytes(content.replace(b"}", b"\n}"))
        assert {"model", "calibration", "recovery", "result"} < set(again(finished, snakemake, RESULT))
    finally:
        path.write_bytes(content)
    assert again(finished, snakemake, RESULT) == {}, "same content, younger file"


def test_deleted_artifact_is_made_again_with_what_follows(finished: Path, snakemake: Snakemake) -> None:
    hidden = finished / "results" / "hidden.json"
    result = finished / RESULT
    result.rename(hidden)
    try:
        assert again(finished, snakemake, RESULT) == {"result": 1}
    finally:
        hidden.rename(result)


def test_bits_below_the_banks_lowest_are_refused(finished: Path, snakemake: Snakemake) -> None:
    target = f"results/{MODEL}_1.0bits.greedy.json"
    done = snakemake(finished, target)
    assert done.returncode == 1
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stdout
    assert "lowest possible target" in errors[0]
    assert not (finished / target).exists()
    assert not (finished / f"data/plans/{MODEL}_1.0bits.greedy.json").exists()


def test_another_task_is_measured_and_no_other_again(finished: Path, snakemake: Snakemake) -> None:
    target = (RESULT, "--config", "evaluation={tasks: [cloze, next_sentence]}")
    assert again(finished, snakemake, *target) == {"zero_shot_original": 1, "zero_shot": 1, "result": 1}
    assert snakemake(finished, *target).returncode == 0
    result = json.loads((finished / RESULT).read_text())
    assert set(result["zero_shot"]) == {"cloze", "next_sentence"}
    accuracies = [task["quantized"] for task in result["zero_shot"].values()]
    assert result["zero_shot_average"]["quantized"] == pytest.approx(sum(accuracies) / 2)
    target = (RESULT, "--config", "evaluation={tasks: [next_sentence]}")
    assert again(finished, snakemake, *target) == {"result": 1}


def test_several_jobs_make_the_same_bank(finished: Path, snakemake: Snakemake) -> None:
    """The last one: it leaves a bank of other settings behind."""
    bank = finished / "data" / "bank" / f"{MODEL}.safetensors"
    before = bank.read_bytes()
    target = (str(bank.relative_to(finished)), "--config", "units={jobs: 2}")
    assert again(finished, snakemake, *target) == {"bank_part": 2, "bank": 1}
    assert snakemake(finished, *target).returncode == 0
    assert bank.read_bytes() == before
    assert again(finished, snakemake, *target) == {}
