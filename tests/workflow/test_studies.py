"""What compares results, on the tiny model: an ablation, seeds, and the picture of several budgets."""

from pathlib import Path

import pandas as pd
import pytest

from tests.workflow.conftest import BITS, GREEDY, MODEL, RESULT, Snakemake
from tests.workflow.test_dry_run import planned

TABLE = f"results/{MODEL}_{BITS}bits.ablation.recovery.csv"
ABLATIONS = "ablations={recovery: {raw: {recovery: {steps: 0}}}}"
PARETO = [f"results/{MODEL}.pareto.{kind}" for kind in ("csv", "svg")]


@pytest.fixture(scope="module")
def studied(finished: Path, snakemake: Snakemake) -> Path:
    done = snakemake(finished, TABLE, *PARETO, "--config", ABLATIONS, f"budgets=[{BITS}]")
    assert done.returncode == 0, done.stdout[-5000:]
    return finished


def test_an_ablation_shares_what_its_change_leaves_alone(studied: Path) -> None:
    table = pd.read_csv(studied / TABLE).fillna("")
    assert sorted(table["change"]) == ["", "raw"]
    assert list(table["seeds"]) == [1, 1]
    raw = table[table["change"] == "raw"].iloc[0]
    assert raw["gap_text_quantized"] == raw["gap_text_before_recovery"], "no recovery at all"
    assert [path.name for path in (studied / "data" / "search").glob("*.safetensors")] == [f"{MODEL}_ppo.safetensors"]
    assert len(list((studied / "data" / "plans").glob("*.ppo*.manifest.json"))) == 1
    codes = studied.glob(f"data/checkpoints/{MODEL}_{BITS}bits.ppo*/before_recovery")
    assert [path.parent.name for path in codes] == [f"{MODEL}_{BITS}bits.ppo"]


def test_the_budgets_have_a_table_and_a_picture(studied: Path) -> None:
    assert list(pd.read_csv(studied / PARETO[0])["target_bits"]) == [float(BITS)]
    assert (studied / PARETO[1]).read_text().startswith("<?xml")


def test_a_seed_of_its_own_is_a_search_of_its_own(studied: Path, snakemake: Snakemake) -> None:
    done = snakemake(studied, "-np", RESULT, RESULT.replace(".json", ".ppo-7.json"))
    jobs = planned(done.stdout)
    assert jobs["search"] == jobs["allocation"] == jobs["result"] == 1
    assert "bank" not in jobs
    assert "--seed 7" in done.stdout


def test_a_plan_that_draws_nothing_serves_all_seeds(studied: Path, snakemake: Snakemake) -> None:
    done = snakemake(studied, "-np", GREEDY.replace("greedy", "greedy-7"))
    jobs = planned(done.stdout)
    assert jobs["recovery"] == jobs["result"] == jobs["perplexity"] == 1
    assert "allocation" not in jobs
    assert "quantize" not in jobs
    assert "--seed 7" in done.stdout
