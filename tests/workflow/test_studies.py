"""What compares results, on the tiny model: an ablation, seeds, and the picture of several budgets."""

from pathlib import Path

import pandas as pd
import pytest

from tests.workflow.conftest import BITS, MODEL, RESULT, Snakemake
from tests.workflow.test_dry_run import planned

TABLE = f"results/{MODEL}_{BITS}bits.ablation.recovery.csv"
ABLATIONS = "ablations={recovery: {raw: {recovery: {steps: 0}, search: {confirm: false}}}}"
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
    searches = sorted(path.name for path in (studied / "data" / "search").glob("*.safetensors"))
    assert searches == [f"{MODEL}_ppo.safetensors"]


def test_the_budgets_have_a_table_and_a_picture(studied: Path) -> None:
    assert list(pd.read_csv(studied / PARETO[0])["target_bits"]) == [float(BITS)]
    assert (studied / PARETO[1]).read_text().startswith("<?xml")


def test_a_seed_of_its_own_is_a_search_of_its_own(studied: Path, snakemake: Snakemake) -> None:
    done = snakemake(studied, "-np", RESULT, RESULT.replace(".json", ".ppo-7.json"))
    jobs = planned(done.stdout)
    assert jobs["search"] == jobs["allocation"] == jobs["result"] == 1
    assert "bank" not in jobs
    assert "--seed 7" in done.stdout
