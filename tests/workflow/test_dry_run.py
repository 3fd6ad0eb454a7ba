"""What a user sees before any work starts: the chain of steps, or one line that says what is wrong."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import ROOT, Snakemake
from windquant import control_groups

CHAIN = {
    "model": 1,
    "calibration": 1,
    "statistics": 1,
    "bank": 1,
    "search": 1,
    "allocation": 1,
    "quantize": 1,
    "recovery": 1,
    "perplexity_original": 1,
    "perplexity": 2,
    "zero_shot_original": 2,
    "zero_shot": 2,
    "result": 1,
}


def planned(output: str) -> dict[str, int]:
    """Jobs per rule, from Snakemake's table of a dry run."""
    table = output.partition("Job stats:")[2].partition("total ")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


@pytest.fixture(scope="module")
def folder(clone: Callable[[], Path]) -> Path:
    return clone()


def test_chain_of_a_hub_model_without_network(folder: Path, snakemake: Snakemake) -> None:
    done = snakemake(folder, "-np", "results/llama2-7b_2.0bits.json")
    assert done.returncode == 0, done.stdout
    assert planned(done.stdout) == CHAIN | {"zero_shot_original": 6, "zero_shot": 6}
    assert "--tasks=winogrande" in done.stdout
    assert "--id=meta-llama/Llama-2-7b-hf" in done.stdout
    assert not (folder / "data").exists()
    assert not (folder / "resources").exists()


def test_every_ready_model_has_a_chain(folder: Path, snakemake: Snakemake) -> None:
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    models = config["models"]
    assert {"smollm2-135m", "gemma3-270m", "llama2-7b", "llama3-8b", "llama3.2-1b", "llama3.2-3b"} < set(models)
    done = snakemake(folder, "-n", *(f"results/{name}_2.0bits.json" for name in models))
    assert done.returncode == 0, done.stdout
    tasks = sum(len(entry.get("evaluation", config["evaluation"])["tasks"]) for entry in models.values())
    chains = {name: count * len(models) for name, count in CHAIN.items()}
    assert planned(done.stdout) == chains | {"zero_shot_original": tasks, "zero_shot": tasks}


@pytest.mark.parametrize(
    ("cores", "gib", "perplexity", "zero_shot"),
    [(1, "64", 1, 1), (2, "64", 1, 1), (2, "5", 1, 2), (1000, "64", 1000, 1000)],
)
def test_evaluations_share_the_cores_where_two_have_the_memory(
    folder: Path,
    snakemake: Snakemake,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    gib: str,
    perplexity: int,
    zero_shot: int,
) -> None:
    if cores > control_groups.cores():  # more than there are: each evaluation runs alone
        perplexity = zero_shot = cores
    monkeypatch.setenv("WINDQUANT_MEMORY", gib)
    done = snakemake(folder, "-np", "--cores", str(cores), "results/smollm2-135m_2.0bits.json")
    found = set(re.findall(r"python -m windquant\.(\S+) .* --threads (\d+)", done.stdout))
    expected = {"evaluation.perplexity": perplexity, "evaluation.zero_shot": zero_shot}
    assert {name for name, _ in found} > expected.keys()
    assert found == {(name, str(expected.get(name, cores))) for name, _ in found}


def test_several_jobs_share_a_bank(folder: Path, snakemake: Snakemake) -> None:
    done = snakemake(folder, "-n", "results/smollm2-135m_2.0bits.json", "--config", "units={jobs: 3}")
    assert planned(done.stdout) == CHAIN | {"bank_part": 3}


def test_comparison_shares_the_steps_of_the_model(folder: Path, snakemake: Snakemake) -> None:
    done = snakemake(folder, "-n", "results/smollm2-135m_2.0bits.comparison.csv")
    jobs = planned(done.stdout)
    assert jobs["bank"] == jobs["statistics"] == jobs["perplexity_original"] == 1
    assert jobs["recovery"] == jobs["result"] == 7 * 3, "seven allocators, three seeds"
    assert jobs["allocation"] == jobs["quantize"] == 4 * 3 + 3, "three of them draw nothing"
    assert jobs["perplexity"] == 7 * 3 + 4 * 3 + 3
    assert jobs["search"] == 2 * 3, "by chunk and by layer"
    assert jobs["comparison"] == 1
    done = snakemake(folder, "-n", "results/smollm2-135m_2.0bits.comparison.csv", "--config", "seeds=[0]")
    assert planned(done.stdout)["result"] == 7


def test_all_budgets_share_one_search(folder: Path, snakemake: Snakemake) -> None:
    done = snakemake(folder, "-np", "results/smollm2-135m.pareto.csv", "results/smollm2-135m.pareto.svg")
    jobs = planned(done.stdout)
    assert jobs["search"] == jobs["bank"] == jobs["pareto"] == jobs["pareto_picture"] == 1
    assert jobs["allocation"] == jobs["result"] == 6
    assert "results/smollm2-135m_2.25bits.json" in done.stdout
    done = snakemake(folder, "-np", "results/smollm2-135m.pareto.csv", "--config", "budgets=[2,3]")
    assert "results/smollm2-135m_2.0bits.json" in done.stdout, "2 and 2.0 are one budget"


@pytest.mark.parametrize(
    ("model", "ablation", "banks", "searches", "plans", "codes", "results"),
    [
        ("smollm2-135m", "chunk", 4, 4, 4, 4, 4),
        ("llama3.2-1b", "protection", 4, 4, 4, 4, 5),  # 3 % is the default: it shares that plan
        ("smollm2-135m", "order", 2, 2, 2, 2, 2),
        ("smollm2-135m", "measured", 1, 4, 5, 5, 5),
        ("smollm2-135m", "recovery", 2, 2, 2, 3, 4),  # standard has more calibration text, full more states too
        ("llama3.2-1b", "recovery", 1, 1, 1, 1, 4),
    ],
)
def test_an_ablation_repeats_what_its_changes_need(
    folder: Path,
    snakemake: Snakemake,
    model: str,
    ablation: str,
    banks: int,
    searches: int,
    plans: int,
    codes: int,
    results: int,
) -> None:
    done = snakemake(folder, "-np", f"results/{model}_2.0bits.ablation.{ablation}.csv")
    assert done.returncode == 0, done.stdout
    jobs = planned(done.stdout)
    assert (jobs["bank"], jobs["search"], jobs["result"], jobs["ablation"]) == (banks, searches, results, 1)
    assert (jobs["allocation"], jobs["quantize"], jobs["recovery"]) == (plans, codes, results)
    assert jobs["statistics"] == jobs["perplexity_original"] == 1
    if ablation == "chunk":
        assert "--chunk=32" in done.stdout
        assert "data/bank/smollm2-135m_chunk32.safetensors" in done.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("results/smolm2-135m_2.0bits.json", "unknown model smolm2-135m, did you mean smollm2-135m?"),
        ("results/nothing_2.0bits.json", "unknown model nothing; config/config.yaml has smollm2-135m, gemma3-270m"),
        ("data/bank/nothing.safetensors", "unknown model nothing"),
        ("results/smollm2-135m_0.5bits.json", "0.5 bits: impossible; give 1 to 16 bits per weight"),
        ("results/smollm2-135m_17bits.json", "17 bits: impossible"),
        ("results/smollm2-135m_2bits.json", "2bits: the names of this budget's files have 2.0bits"),
        ("results/smollm2-135m_2.0bits.ppo-01.json", "ppo-01: seeds go from 0 to 4294967295, without zeros"),
        (
            "results/smollm2-135m_2.0bits.ppo-chunk32-0.json",
            "0 is the configuration's seed, which names leave out",
        ),
        ("results/smollm2-135m_-2bits.greedy.json", "-2 bits: impossible"),
        ("results/smollm2-135m_2.0bits.gredy.json", "unknown allocator gredy, did you mean greedy?"),
        ("results/smollm2-135m_2.0bits.ppo-chunk33.json", "unknown change chunk33, did you mean chunk32?"),
        ("results/smollm2-135m_2.0bits.ablation.chunks.csv", "unknown ablation chunks, did you mean chunk?"),
    ],
)
def test_impossible_targets(folder: Path, snakemake: Snakemake, target: str, message: str) -> None:
    refused(snakemake(folder, target), message)
    assert not (folder / "data").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("recovery={step: 3}", "recovery.step: unknown key; did you mean recovery.steps?"),
        ("models={x: {source: hub}}", "models.x.id: missing"),
        ("models={x: {source: folder, path: nowhere}}", None),
        (
            "models={x: {source: hub, id: a/b, evaluation: {tasks: [piqa], data_dir: nowhere}}}",
            "evaluation.data_dir: nowhere has no piqa.test.jsonl or piqa.validation.jsonl; put the rows",
        ),
        ("models={x: {source: hub, id: a/b, calibration: {source: file}}}", "calibration.path: missing"),
        ("units={chunk: many}", "units.chunk: 'many' is not of type 'integer'"),
        ("ablations={a: {b: {unit: {chunk: 8}}}}", "ablations.a.b.unit: unknown key"),
        ("ablations={a: {b: {units: {chunks: 8}}}}", "ablations.a.b.units.chunks: unknown key"),
        ("seeds=[]", "seeds: "),
    ],
)
def test_wrong_configuration(folder: Path, snakemake: Snakemake, setting: str, message: str | None) -> None:
    done = snakemake(folder, "--config", setting, "--", "results/x_2.0bits.json")
    refused(done, message or "models.x.path: 'nowhere' is neither a file nor a folder")


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """The call failed with one line that holds `message`, and no traceback."""
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stdout
    assert message in lines[0]
    assert "Traceback" not in done.stdout
    assert done.stdout.rstrip().endswith(lines[0])


def test_what_is_given_for_one_call_rules_over_the_models_own_settings(folder: Path, snakemake: Snakemake) -> None:
    given = ["--config", "evaluation={windows: 0}", "units={chunk: 96}", "seed=4"]
    done = snakemake(folder, "-n", "-p", "results/smollm2-135m_2.0bits.lagrangian.json", *given)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"--(?:windows|chunk)=\d+|--seed \d+", done.stdout)) == {
        "--windows=0", "--chunk=96", "--seed 4"
    }  # fmt: skip


def test_a_budget_below_the_metadata_is_refused_before_the_first_step(folder: Path, snakemake: Snakemake) -> None:
    refused(
        snakemake(folder, "results/smollm2-135m_1.02bits.json"), "the lowest possible target is about 1.04; ask for"
    )
    assert not (folder / "data").exists()


def test_a_report_of_nothing_is_refused(tiny_clone: Callable[[], Path], snakemake: Snakemake) -> None:
    done = snakemake(tiny_clone(), "results/report.html")
    refused(done, "results/report.html: no result is here yet; ask for one first, e.g. results/tiny_2.0bits.json")
