"""`python -m windquant.search` and `python -m windquant.allocation`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windquant import search, step
from windquant.allocation import BASELINES, features, learned, ppo
from windquant.allocation.__main__ import run
from windquant.allocation.layers import merged
from windquant.allocation.learned import Learned
from windquant.allocation.settings import SearchSettings, Settings
from windquant.bank import Bank
from windquant.plan import Plan

INPUTS = ("model?", "calibration?", "statistics?", "bank", "search?")
Options = dict[str, Any]


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


def policy(units: Bank, path: Path, **changes: Any) -> Learned:
    """A policy for `units` of a short search without measurements; it is told a loss model of its own.

    `changes` are made in its file.
    """
    options = SearchSettings(episodes=4, n_envs=4, evaluations=0, targets=(2.0, 3.0), hidden=8)
    made = ppo.search(units, 0, options, lambda choice: 1.0)
    told = np.linspace(-1, 1, len(made.weights))
    found = dataclasses.replace(made, **{"weights": told, "told": told, **changes})
    found.save(path)
    return found


def test_a_plan_comes_from_the_policy_in_seconds_and_without_a_model(
    tmp_path: Path, small_bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = policy(small_bank, tmp_path / "search.safetensors")
    for bits in (2.03, 2.25, 3.0):
        output = allocate(tmp_path, small_bank, "--search", "search.safetensors", "--target-bits", str(bits))
        plan = Plan.load(output)
        assert bits - 0.02 < plan.effective_bits <= bits
        assert plan.search["chosen"] == "policy"
        expected = small_bank.plan(found.plan(small_bank, bits), allocator="ppo", target_bits=bits, seed=0)
        assert plan.actions == expected.actions
        assert json.loads((tmp_path / "plan.json.manifest.json").read_text())["seconds"] < 20
    output = allocate(tmp_path, small_bank, "--search", "search.safetensors", "--target-bits", "3.5")
    assert Plan.load(output).search["reason"] == "the search is for 2 to 3 bits (search.targets)"
    assert not Plan.load(output).fallback


def test_the_policy_survives_its_file(tmp_path: Path, small_bank: Bank) -> None:
    found = policy(small_bank, tmp_path / "search.safetensors")
    again = Learned.load(tmp_path / "search.safetensors")
    assert (again.search, again.targets, again.features) == (found.search, found.targets, found.features)
    np.testing.assert_array_equal(again.plan(small_bank, 2.1), found.plan(small_bank, 2.1))


def test_a_layer_policy_gives_every_layer_one_action(
    tmp_path: Path, make_bank: Callable[..., Bank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bank = make_bank(layers=6)
    coarse = merged(bank)
    assert coarse.total_bytes(np.full(len(bank.linears), 2)) == bank.total_bytes(np.full(len(bank.linear), 2))
    options = SearchSettings(episodes=4, n_envs=4, evaluations=0, per="layer")
    found = dataclasses.replace(ppo.search(coarse, 0, options, lambda choice: 1.0), bank=bank.sha256)
    found.save(tmp_path / "search.safetensors")
    output = allocate(tmp_path, bank, "--search", "search.safetensors", "--allocator", "layer")
    plan = Plan.load(output)
    assert 1.98 < plan.effective_bits <= 2.0
    mixed = [row for row in plan.actions.values() if len(set(row)) > 1]
    assert len(mixed) <= 0.3 * len(plan.actions), "what is left of the budget may split a few"
    assert len({tuple(set(row)) for row in plan.actions.values()}) > 1
    outside = Plan.load(
        allocate(tmp_path, bank, "--search", "search.safetensors", "--allocator", "layer", "--target-bits", "6")
    )
    assert outside.search["chosen"] == "lagrangian"
    assert outside.search["reason"].startswith("the search is for ")


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, ["--allocator", "layer"], "decides by chunk, not by layer"),
        ({"bank": "0" * 64}, [], "made with another bank (digest 000000000000"),
        ({"version": features.VERSION + 1}, [], f"features of version {features.VERSION + 1}; this version reads"),
        ({"features": ["kind q_proj"]}, [], "other features than the bank (kind down_proj"),
        ({"actions": ["trellis-1"]}, [], "other actions than the bank (trellis-1.5)"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, small_bank: Bank, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    changes: Options, flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    policy(small_bank, tmp_path / "search.safetensors", **changes)
    with pytest.raises(SystemExit) as stopped:
        allocate(tmp_path, small_bank, "--search", "search.safetensors", *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: search.safetensors: ")
    assert message in error
    assert not (tmp_path / "plan.json").exists()


def test_a_policy_of_another_bank_is_taken_where_that_is_asked_for(
    tmp_path: Path, small_bank: Bank, make_bank: Callable[..., Bank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = make_bank(layers=3, hidden=64, inner=160, key=32, chunk=16)
    found = policy(other, tmp_path / "search.safetensors")
    flags = ["--search", "search.safetensors", "--target-bits", "2.4", "--transfer"]
    plan = Plan.load(allocate(tmp_path, small_bank, *flags))
    assert plan.search["chosen"] == "policy"
    assert plan.predicted_loss == pytest.approx(small_bank.predicted_loss(found.plan(small_bank, 2.4)))
    policy(other, tmp_path / "search.safetensors", features=["kind conv"])
    with pytest.raises(SystemExit):
        allocate(tmp_path, small_bank, *flags)


@pytest.mark.parametrize("damage", [lambda content: content[:500], lambda content: b"nothing"])
def test_a_damaged_policy_is_refused(
    tmp_path: Path, small_bank: Bank, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    policy(small_bank, path := tmp_path / "search.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit):
        allocate(tmp_path, small_bank, "--search", "search.safetensors")
    assert "error: search.safetensors: not a readable search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"), [("ppo", "give --search"), ("evolution", "--model and --calibration and --statistics")]
)
def test_an_allocator_says_what_it_needs(
    tmp_path: Path, small_bank: Bank, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        allocate(tmp_path, small_bank, "--allocator", name)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
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


def test_searches_measure_a_real_model(
    tmp_path: Path, tiny_model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step before it, and searches on what they made; twice with the same seed."""
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
    common += ["--statistics", "statistics.safetensors", "--bank", "bank.safetensors"]
    names = ("model", "calibration", "statistics", "bank")
    options = "--episodes 8 --n-envs 4 --evaluations 5 --reward-tokens 64 --targets 3,6".split()
    for name in ("first", "second"):
        step.main("search", search.run, SearchSettings, names, argv=[*common, *options, "--output", f"{name}.search"])
    assert Path("first.search").read_bytes() == Path("second.search").read_bytes()
    notes = json.loads(Path("first.search.manifest.json").read_text())["notes"]
    assert notes["evaluations"] == 5
    assert list(Path(".cache").rglob("*.safetensors")) == []  # the search's state is gone

    common += ["--reward-tokens", "64", "--target-bits", "4"]
    for allocator, flags in (("ppo", ["--search", "first.search"]), ("evolution", ["--evaluations", "6"])):
        arguments = [*common, *flags, "--allocator", allocator, "--output", f"{allocator}.json"]
        step.main("allocation", run, Settings, INPUTS, argv=arguments)
        plan = Plan.load(Path(f"{allocator}.json"))
        assert plan.effective_bits <= 4
        assert plan.allocator == allocator
    losses = [loss for _, _, _, loss, _ in plan.search["pairs"]]
    assert plan.search["evaluations"] == len(losses) == 6
    learned_plan = Plan.load(Path("ppo.json")).search
    assert learned_plan["chosen"] == "policy" or learned_plan["reason"]
    monkeypatch.setattr(learned.Learned, "doubt", lambda self, bits: "")
    arguments = [*common, "--search", "first.search", "--output", "confirmed.json"]
    step.main("allocation", run, Settings, INPUTS, argv=arguments)
    found = Plan.load(Path("confirmed.json")).search
    better = found["confirmed"]["learned"] < found["confirmed"]["lagrangian"]
    assert found["chosen"] == ("policy" if better else "lagrangian")
