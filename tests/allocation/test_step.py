"""`python -m windquant.allocation`."""

import json
from pathlib import Path

import pytest

from windquant import step
from windquant.allocation import BASELINES
from windquant.allocation.__main__ import run
from windquant.allocation.settings import Settings
from windquant.bank import Bank
from windquant.plan import Plan

INPUTS = ("model?", "calibration?", "statistics?", "bank")


def allocate(folder: Path, bank: Bank, *arguments: str) -> Path:
    bank.save(folder / "bank.safetensors")
    output = folder / "plan.json"
    flags = ["--bank", str(folder / "bank.safetensors"), "--output", str(output), *arguments]
    step.main("allocation", run, Settings, INPUTS, argv=flags)
    return output


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_baseline_needs_the_bank_only(
    tmp_path: Path, small_bank: Bank, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = allocate(tmp_path, small_bank, "--allocator", name, "--target-bits", "2.5", "--seed", "3")
    plan = Plan.load(output)
    assert plan.allocator == name
    assert plan.target_bits - 0.1 < plan.effective_bits <= plan.target_bits == 2.5
    assert sum(len(actions) for actions in plan.actions.values()) == len(small_bank.linear)
    notes = json.loads((tmp_path / "plan.json.manifest.json").read_text())["notes"]
    assert sum(notes["shares"].values()) == pytest.approx(1)
    assert notes["effective_bits"] == plan.effective_bits
    assert notes["fallback"] is False


def test_ppo_says_what_it_needs(
    tmp_path: Path, small_bank: Bank, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        allocate(tmp_path, small_bank, "--allocator", "ppo")
    assert stopped.value.code == 2
    assert "--model and --calibration and --statistics" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_an_impossible_target_leaves_nothing_behind(
    tmp_path: Path, small_bank: Bank, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        allocate(tmp_path, small_bank, "--allocator", "lagrangian", "--target-bits", "0.7")
    assert stopped.value.code == 2
    assert "lowest possible target" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_ppo_measures_a_real_model(
    tmp_path: Path, tiny_model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step before it, and the search on what they made; twice with the same seed."""
    from windquant import bank, calibration, statistics

    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_model_folder)]
    texts = (
        f"--source file --path {text_file} --samples 4 --length 32 --reward-samples 2 --reward-length 32"
        " --recovery-samples 2 --recovery-length 32 --context 32 --cloze-records 1 --next-sentence-records 1"
        " --output texts"
    )
    step.main("calibration", calibration.run, calibration.Settings, ("model",), argv=[*model, *texts.split()])
    common = [*model, "--calibration", "texts"]
    arguments = [*common, "--output", "statistics.safetensors"]
    step.main("statistics", statistics.run, statistics.Settings, ("model", "calibration"), argv=arguments)
    arguments = [*model, "--statistics", "statistics.safetensors", "--chunk", "16", "--output", "bank.safetensors"]
    step.main("bank", bank.run, bank.Settings, ("model", "statistics"), argv=arguments)
    common += ["--statistics", "statistics.safetensors", "--bank", "bank.safetensors", "--target-bits", "4"]
    common += "--episodes 8 --n-envs 4 --evaluations 5 --reward-tokens 64".split()
    for name in ("first", "second"):
        step.main("allocation", run, Settings, INPUTS, argv=[*common, "--output", f"{name}.json"])
    assert Path("first.json").read_bytes() == Path("second.json").read_bytes()
    plan = Plan.load(Path("first.json"))
    assert plan.effective_bits <= 4
    assert plan.search["evaluations"] == 5
    assert plan.search["loss"] <= plan.search["lagrangian_loss"]
    notes = json.loads(Path("first.json.manifest.json").read_text())["notes"]
    assert notes["loss"] == plan.search["loss"]
    assert list(Path(".cache").rglob("*.safetensors")) == []  # the search's state is gone
