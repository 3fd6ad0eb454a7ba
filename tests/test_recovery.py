"""Recovery: what is trained, what is stored, and that the step never makes a checkpoint worse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.making import make
from tests.families import Prepared, in_float32, prepare, run, uniform
from windquant import calibration, checkpoint, compute, models, quantize, recovery, step, training
from windquant.checkpoint.linear import PackedLinear
from windquant.divergence import divergence
from windquant.manifest import Manifest
from windquant.presets import recovery_steps
from windquant.recovery import learned_from, trainable


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # training checkpoints go to .cache


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("recovery"), tiny_model_folder)


@pytest.fixture(scope="module")
def packed(prepared: Prepared) -> Path:
    """The checkpoint before recovery, with every unit at 1.5 bits."""
    plan = prepared.bank.with_name("plan.json")
    uniform(prepared, "scalar-1.5").save(plan)
    folder = prepared.bank.with_name("packed")
    run(quantize, folder, prepared.inputs("model", "calibration", "statistics", plan=plan))
    return folder


def recover(prepared: Prepared, packed: Path, output: Path, **settings: Any) -> Path:
    """Run the step as its command line does, in this process."""
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    inputs = prepared.arguments("model", "calibration", checkpoint=packed)
    names = ("model", "calibration", "checkpoint")
    step.main("recovery", recovery.run, recovery.Settings, names, argv=[*inputs, "--output", str(output), *flags])
    return output


FAST = {"steps": 30, "gain_rate": 0.15, "norm_rate": 0.05}  # a tiny model takes large steps


@pytest.fixture(scope="module")
def recovered(prepared: Prepared, packed: Path) -> Path:
    return recover(prepared, packed, packed.with_name("recovered"), **FAST)


def test_recovery_comes_closer_to_the_original(prepared: Prepared, packed: Path, recovered: Path) -> None:
    found = Manifest.load(recovered).notes["divergence"]
    assert found["kept"] is True
    assert 0 < found["after"] < 0.95 * found["before"]
    ids = calibration.load(prepared.calibration).reward.long()
    teacher = compute.move(models.load(prepared.model))
    for folder, expected in ((packed, found["before"]), (recovered, found["after"])):
        assert divergence(compute.move(models.load(folder)), teacher, ids) == pytest.approx(expected, rel=0.05)


def test_recovery_changes_scales_and_norms_alone(prepared: Prepared, packed: Path, recovered: Path) -> None:
    before, after = checkpoint.read(packed), checkpoint.read(recovered)
    assert after.plan == before.plan
    for name, tensors in after.tensors.items():
        changed = [key for key, value in tensors.items() if not torch.equal(value, before.tensors[name][key])]
        assert changed == ["scales"], name
    changed = [key for key, value in after.parameters.items() if not torch.equal(value, before.parameters[key])]
    assert changed
    assert all(key.endswith("norm.weight") for key in changed)


def test_recovery_costs_no_byte(packed: Path, recovered: Path) -> None:
    assert checkpoint.measure(recovered) == checkpoint.measure(packed)
    assert Manifest.load(recovered).notes["measured_bytes"] == checkpoint.read(packed).plan.bytes


def test_same_seed_same_bytes(prepared: Prepared, packed: Path, recovered: Path, tmp_path: Path) -> None:
    again = recover(prepared, packed, tmp_path / "again", **FAST)
    for path in recovered.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    other = recover(prepared, packed, tmp_path / "other", **FAST, seed=1)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def unchanged(packed: Path, folder: Path) -> bool:
    return all((folder / path.name).read_bytes() == path.read_bytes() for path in packed.iterdir())


def test_no_steps_leave_the_checkpoint_as_it_is(prepared: Prepared, packed: Path, tmp_path: Path) -> None:
    folder = recover(prepared, packed, tmp_path / "same", steps=0)
    assert unchanged(packed, folder)
    found = Manifest.load(folder).notes["divergence"]
    assert found["before"] == found["after"]
    assert found["kept"] is False


@pytest.mark.parametrize("rates", [{"gain_rate": 1e6}, {"norm_rate": 1e3, "gain_rate": 3.0}])
def test_a_tuning_that_diverges_is_dropped(
    prepared: Prepared, packed: Path, tmp_path: Path, rates: dict[str, float]
) -> None:
    folder = recover(prepared, packed, tmp_path / "kept", steps=6, **rates)
    assert unchanged(packed, folder)
    assert Manifest.load(folder).notes["divergence"]["kept"] is False


def test_a_tuning_that_diverges_late_keeps_its_best_state(
    prepared: Prepared,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rate grows all the time: at first it helps, then it destroys the model."""
    monkeypatch.setattr(training, "RECENT", 4)
    folder = recover(prepared, packed, tmp_path / "best", steps=200, warmup=200, gain_rate=5.0, norm_rate=15.0)
    notes = Manifest.load(folder).notes
    assert len(notes["curve"]) < 200
    assert notes["stopped"] == len(notes["curve"]) + 1
    assert notes["divergence"]["kept"] is True
    assert notes["divergence"]["after"] < notes["divergence"]["before"]
    assert "it is stopped and its best state kept; lower recovery.gain_rate" in capsys.readouterr().err


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_where_it_was(
    prepared: Prepared, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    seen: list[int | None] = []
    limit = 8
    record = step.Task.metric

    def metric(self: step.Task, name: str, value: float, place: int | None = None) -> None:
        record(self, name, value, place)
        if name == "recovery_divergence":
            seen.append(place)
        if len(seen) == limit:
            raise Killed

    monkeypatch.setattr(step.Task, "metric", metric)
    with pytest.raises(Killed):
        recover(prepared, packed, tmp_path / "resumed", steps=12)
    assert not (tmp_path / "resumed").exists()
    assert list((tmp_path / ".cache").rglob("state.safetensors"))
    seen.clear()
    resumed = recover(prepared, packed, tmp_path / "resumed", steps=12)
    assert seen == list(range(6, 12)), "from the last training checkpoint on"
    assert not list((tmp_path / ".cache").rglob("*.safetensors")), "removed after success"

    limit = 100
    seen.clear()
    undisturbed = recover(prepared, packed, tmp_path / "undisturbed", steps=12)
    assert seen == list(range(12))
    for path in undisturbed.iterdir():
        assert (resumed / path.name).read_bytes() == path.read_bytes(), path.name
    curves = [Manifest.load(folder).notes["curve"] for folder in (resumed, undisturbed)]
    assert len(curves[0]) == 12
    assert curves[0] == curves[1], "the curve of an interrupted training is whole"


def test_a_training_checkpoint_of_other_settings_is_not_used(
    prepared: Prepared, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    seen: list[int | None] = []

    def metric(self: step.Task, name: str, value: float, place: int | None = None) -> None:
        if name == "recovery_divergence":
            seen.append(place)
            if place == 2:
                raise Killed

    monkeypatch.setattr(step.Task, "metric", metric)
    for rate in (4e-3, 5e-3):
        with pytest.raises(Killed):
            recover(prepared, packed, tmp_path / "never", steps=4, gain_rate=rate)
    assert seen == [0, 1, 2] * 2


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_every_norm_and_every_gain_is_trained_and_nothing_else(tmp_path: Path, family: str) -> None:
    made = make(tmp_path / "packed", tmp_path / "original", family, 0.0, ["scalar-2"])
    model = models.load(made.folder)
    with in_float32():
        gains, norms = trainable(model)
    assert list(gains) == list(made.layouts)
    expected = {name for name, _ in models.load(made.source).named_parameters() if "norm" in name}
    assert set(norms) == expected
    assert any("q_norm" in name for name in norms)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(norms) | {f"{name}.gain" for name in gains}
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_divergence_is_the_mean_over_all_windows(prepared: Prepared, packed: Path) -> None:
    teacher, student = (compute.move(models.load(folder)) for folder in (prepared.model, packed))
    ids = calibration.load(prepared.calibration).reward.long()  # 6 windows: batches of 4 and 2
    with in_float32():
        parts = [divergence(student, teacher, window[None]) for window in ids]
        assert divergence(student, teacher, ids) == pytest.approx(sum(parts) / len(parts), rel=1e-4)
        assert divergence(teacher, teacher, ids) == 0


def test_more_steps_than_text_are_said(
    prepared: Prepared, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = len(calibration.load(prepared.calibration).recovery)
    recover(prepared, packed, tmp_path / "enough", steps=2 * windows)
    assert "by heart" not in capsys.readouterr().err
    recover(prepared, packed, tmp_path / "many", steps=2 * windows + 1)
    assert f"recovery: {2 * windows + 1} steps pass 2." in capsys.readouterr().err


def test_all_text_is_recoverys_and_that_of_the_calibration(prepared: Prepared, packed: Path, tmp_path: Path) -> None:
    texts = calibration.load(prepared.calibration)
    windows, length = learned_from(texts), texts.recovery.shape[1]
    assert torch.equal(windows[: len(texts.recovery)], texts.recovery.long())
    more = windows[len(texts.recovery) :]
    assert len(more) == texts.calibration.numel() // length > 0
    assert torch.equal(more.flatten(), texts.calibration.flatten()[: more.numel()].long())
    begins = torch.full_like(texts.calibration[:, :1], 9)
    begun = learned_from(replace(texts, calibration=torch.cat([begins, texts.calibration], 1)))
    assert begun[len(texts.recovery) :, 0].unique().tolist() == [9]
    inside = begun[len(texts.recovery) :, 1:].flatten()
    assert torch.equal(inside, texts.calibration.flatten()[: len(inside)].long())
    made = recover(prepared, packed, tmp_path / "made", text="all", steps=len(windows))
    seen = Manifest.load(made).notes["curve"]
    assert len(seen) == len(windows)
    assert seen != Manifest.load(recover(prepared, packed, tmp_path / "less", steps=len(windows))).notes["curve"]


def test_presets_say_how_many_steps(prepared: Prepared, packed: Path, tmp_path: Path) -> None:
    assert [recovery_steps(preset, None) for preset in ("light", "standard", "full")] == [80, 400, 2000]
    assert recovery_steps("full", 0) == 0
    made = recover(prepared, packed, tmp_path / "made", preset="standard", steps=3)
    assert len(Manifest.load(made).notes["curve"]) == 3
