"""Results side by side: the table, and the picture of the budgets."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.result.experiment import assemble, chain
from windquant import comparison, manifest, step, summary
from windquant.manifest import Manifest
from windquant.report import pareto_picture


def compare(*results: str) -> pd.DataFrame:
    argv = ["--output", "results/c.csv", "--results", *results]
    step.main("comparison", comparison.run, comparison.Settings, ("results+",), argv=argv, light=True)
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


def test_a_plan_that_is_not_the_learned_one_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "the learned plan was not better"
    for seed, chosen in enumerate(("lagrangian", "policy")):
        path = Path(f"results/m_2.0bits.ppo-{seed}.json")
        entry = assemble(chain(search={"chosen": chosen, "reason": reason}), str(path))
        path.write_text(json.dumps({**entry, "seed": seed}))
        document = Manifest.load(path)
        replace(document, output={**document.output, "sha256": manifest.sha256(path)}).save(path)
    table = compare("results/m_2.0bits.ppo-0.json", "results/m_2.0bits.ppo-1.json")
    assert (list(table["lagrangian"]), list(table["fallbacks"])) == ([1], [0])
    capsys.readouterr()
    summary.main(["results/m_2.0bits.ppo-0.json", "results/m_2.0bits.ppo-1.json"])
    titles = [line.strip() for line in capsys.readouterr().out.splitlines() if "2.0 bits, ppo" in line]
    assert len(titles) == 2
    assert "ppo (the Lagrangian plan:" in titles[0]
    assert "Lagrangian" not in titles[1]


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

    for seed, actions in enumerate(({"trellis-1": 0.9, "trellis-2": 0.1}, {"trellis-1": 1.0})):
        entry = assemble(chain("ppo", 50.0), "results/r.json")
        Path(f"results/m_2.0bits.ppo-{seed}.json").write_text(json.dumps({**entry, "seed": seed, "actions": actions}))
    shares = compare(*(f"results/m_2.0bits.ppo-{seed}.json" for seed in (0, 1)))
    assert list(shares["actions_trellis-1"]) == [0.95]
    assert list(shares["actions_trellis-2"]) == [0.05], "a plan without it has none of it"

    Path("results/m_2.0bits.ppo-5.json").write_text(Path(paths[0]).read_text())  # the usual seed under another name
    with pytest.raises(SystemExit):
        compare(*paths, "results/m_2.0bits.ppo-5.json")
    assert "results/m_2.0bits.ppo-5.json is another one's model, budget and seed again" in capsys.readouterr().err

    other = json.loads(Path(paths[0]).read_text()) | {"model": "n"}
    Path("results/n_2.0bits.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit):
        compare(paths[0], "results/n_2.0bits.json")
    assert "cannot compare different values of model: m, n" in capsys.readouterr().err


def test_the_pareto_picture_has_every_budget() -> None:
    for target, value in ((2.0, 50.0), (2.5, 30.0)):
        assemble(chain("ppo", value, target=target), f"results/m_{target}bits.json")
    argv = ["--output", "results/m.pareto.svg", "--results", "results/m_2.0bits.json", "results/m_2.5bits.json"]
    step.main("pareto_picture", pareto_picture.run, pareto_picture.Settings, ("results+",), argv=argv, light=True)
    picture = Path("results/m.pareto.svg").read_text()
    assert picture.startswith("<?xml")
    assert "perplexity 50.00" in picture
    assert "perplexity 30.00" in picture


def test_without_a_result_there_is_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    for module in (comparison, pareto_picture):
        with pytest.raises(SystemExit):
            step.main("x", module.run, module.Settings, ("results+",), argv=["--output", "x"], light=True)
        assert "required: --results" in capsys.readouterr().err
