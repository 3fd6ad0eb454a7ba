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
