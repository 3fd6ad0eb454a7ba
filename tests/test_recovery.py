"""Recovery: what is trained, what is stored, and that the step never makes a checkpoint worse."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.checkpoint.making import Made, make
from tests.families import Prepared, in_float32, prepare, run, uniform
from windquant import calibration, checkpoint, compute, models, quantize, recovery, step, training
from windquant.checkpoint.linear import PackedLinear
from windquant.divergence import divergence, kl_divergence
from windquant.gains import GainLinear, regain, stored_gain
from windquant.manifest import Manifest
from windquant.packed import dequantize
from windquant.presets import recovery_steps
from windquant.recovery import learned_from, trainable
from windquant.tuning import Tuning, schedule


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


# -- the step

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


def test_a_damaged_training_checkpoint_starts_over(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"\xff" * 100)
    value = torch.nn.Parameter(torch.ones(2))
    found = training.Training(Tuning(10, 0.1, 0.1, 1), {}, {"a": value}, tmp_path)
    assert (found.curve, found.lowest) == ([], math.inf)
    assert value.tolist() == [1, 1]


def test_an_interrupted_training_knows_its_best_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    monkeypatch.setattr(training, "RECENT", 2)
    losses = [3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.4, 1.4, 1.3, 1.3]

    def trained(folder: Path, *until: int) -> training.Training:
        folder.mkdir()
        for steps in until:
            value = torch.nn.Parameter(torch.ones(2))
            found = training.Training(Tuning(10, 0.1, 0.1, 1), {}, {"a": value}, folder)
            while len(found.curve) < steps:
                found.begin()
                value.grad = value.detach().clone()
                found.step(losses[len(found.curve)])
        return found

    whole, parts = trained(tmp_path / "whole", 10), trained(tmp_path / "parts", 9, 10)
    for one in (whole, parts):
        assert one.curve == losses
        assert one.lowest == 1.0
        assert not one.diverges(1.5)
        assert one.diverges(1.8)
        assert one.diverges(math.nan)
        last = one.parameters["norm:a"].clone()
        one.restore_best()
        assert (one.parameters["norm:a"] > last).all(), "the state before the fifth step"
    assert torch.equal(whole.parameters["norm:a"], parts.parameters["norm:a"])


# -- what is trained


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Qwen2 (biases) with protected columns, skipped chunks and narrow last ones."""
    folder = tmp_path_factory.mktemp("biased")
    return make(folder / "packed", folder / "original", "qwen2", 0.05, ["scalar-2", "skip", "scalar-1.5"])


def linears(made: Made) -> dict[str, tuple[PackedLinear, GainLinear]]:
    model = models.load(made.folder)
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return {name: (module, GainLinear.of(module, torch.float32)) for name, module in found.items()}


def some_gain(made: Made, name: str) -> Tensor:
    """Log-gains that can be stored: whole steps that leave no code's range; zero for chunks without scales."""
    layout, tensors = made.layouts[name], made.tensors[name]
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-20, 21, (layout.linear.rows, len(layout.widths)), generator=generator)
    wanted = steps * tensors["scale_grid"][1].float() * torch.log(torch.tensor(2.0))
    return stored_gain(layout, tensors, regain(layout, tensors, wanted))


def test_gains_are_stored_in_the_scales(biased: Made) -> None:
    skipped = 0
    for name, layout in biased.layouts.items():
        tensors, gain = biased.tensors[name], some_gain(biased, name)
        after = regain(layout, tensors, gain)
        assert {key for key in after if not torch.equal(after[key], tensors[key])} == {"scales"}
        torch.testing.assert_close(stored_gain(layout, tensors, after), gain)
        assert gain.abs().max() > 0.1
        for chunk, action in enumerate(layout.names):
            if action == "skip":
                skipped += 1
                assert (gain[:, chunk] == 0).all()
        again = regain(layout, after, torch.zeros_like(gain))
        assert torch.equal(again["scales"], after["scales"])
    assert skipped > 0


def test_stored_gains_are_the_nearest_ones(biased: Made) -> None:
    name = next(iter(biased.layouts))
    layout, tensors = biased.layouts[name], biased.tensors[name]
    grid = tensors["scale_grid"][1].float() * torch.log(torch.tensor(2.0))
    chunk = layout.names.index("scalar-2")
    wanted = torch.zeros(layout.linear.rows, len(layout.widths))
    wanted[:, chunk] = (torch.rand(layout.linear.rows, generator=torch.Generator().manual_seed(0)) - 0.5) * 4 * grid
    stored = stored_gain(layout, tensors, regain(layout, tensors, wanted))
    off = (stored - wanted).abs()[:, chunk]
    assert (off <= 0.501 * grid).float().mean() > 0.8, "all but those at the ends of the codes' range"
    assert ((stored[:, chunk] / grid).round() * grid - stored[:, chunk]).abs().max() < 1e-5


def test_a_gain_linear_is_the_packed_one(biased: Made) -> None:
    """With gains of zero and, with gains that can be stored, as it will be stored; biases included."""
    for name, (packed, tuned) in linears(biased).items():
        layout = biased.layouts[name]
        x = torch.randn(2, 5, layout.linear.columns, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(tuned(x), packed(x), rtol=1e-4, atol=1e-4)
        gain = some_gain(biased, name)
        tuned.gain.data.copy_(gain)
        order = packed.get_buffer("column_order")
        stored = dequantize(layout, regain(layout, biased.tensors[name], gain), order)
        torch.testing.assert_close(tuned(x), F.linear(x, stored, packed.bias), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tuned(x), packed(x), rtol=1e-2, atol=1e-2)


def test_rounding_computes_with_what_will_be_stored(biased: Made) -> None:
    """And its gradients are those at the stored gains: they pass straight through."""
    for name, (packed, tuned) in linears(biased).items():
        layout, tensors = biased.layouts[name], biased.tensors[name]
        x = torch.randn(2, 5, layout.linear.columns, generator=torch.Generator().manual_seed(0))
        wanted = torch.randn(layout.linear.rows, len(layout.widths), generator=torch.Generator().manual_seed(1))
        gradients = []
        for gain, rounding in ((wanted, True), (stored_gain(layout, tensors, regain(layout, tensors, wanted)), False)):
            tuned.gain.data.copy_(gain)
            tuned.rounding = rounding
            tuned.gain.grad = None
            tuned(x).square().sum().backward()
            gradients.append(tuned.gain.grad)
            stored = dequantize(layout, regain(layout, tensors, wanted), packed.get_buffer("column_order"))
            torch.testing.assert_close(tuned(x), F.linear(x, stored, packed.bias), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_the_formula(biased: Made) -> None:
    for name, (packed, tuned) in linears(biased).items():
        layout, order = biased.layouts[name], packed.get_buffer("column_order")
        x = torch.randn(7, layout.linear.columns, generator=torch.Generator().manual_seed(0), requires_grad=True)
        target = torch.randn(7, layout.linear.rows, generator=torch.Generator().manual_seed(1))
        tuned.gain.data.copy_(0.1 * torch.randn(tuned.gain.shape, generator=torch.Generator().manual_seed(2)))
        found = torch.autograd.grad((tuned(x) * target).sum(), [tuned.gain, x])

        gain = tuned.gain.detach().clone().requires_grad_(True)
        has_scale = torch.tensor([entry.has_scale for entry in layout.actions])
        by_column = (gain * has_scale).repeat_interleave(torch.tensor(layout.widths), 1)
        by_column = F.pad(by_column, (layout.protected, 0))[:, order.argsort()]
        expected = torch.autograd.grad(
            (F.linear(x, packed.weight * by_column.exp(), packed.bias) * target).sum(), [gain, x]
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert (found[0][:, ~has_scale] == 0).all()


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


# -- the loss and the schedule


def test_kl_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 11, generator=generator) for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert kl_divergence(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(teacher, teacher + 3).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kl_divergence_has_the_gradient_of_autograd(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 11, generator=generator).to(dtype) for _ in range(2))
    gradients = []
    for divergence_of in (kl_divergence, by_autograd):
        given = student.clone().requires_grad_(True)
        (3 * divergence_of(given, teacher)).backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def by_autograd(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (logits.float().flatten(0, -2).log_softmax(-1) for logits in (student, teacher))
    return (p.exp() * (p - q)).sum(-1).mean()


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
    made = recover(prepared, packed, tmp_path / "made", text="all", steps=len(windows))
    seen = Manifest.load(made).notes["curve"]
    assert len(seen) == len(windows)
    assert seen != Manifest.load(recover(prepared, packed, tmp_path / "less", steps=len(windows))).notes["curve"]


def test_presets_say_how_many_steps(prepared: Prepared, packed: Path, tmp_path: Path) -> None:
    assert [recovery_steps(preset, None) for preset in ("light", "standard", "full")] == [80, 400, 2000]
    assert recovery_steps("full", 0) == 0
    made = recover(prepared, packed, tmp_path / "made", preset="standard", steps=3)
    assert len(Manifest.load(made).notes["curve"]) == 3


def test_schedule_warms_up_and_falls_to_zero() -> None:
    rates = [schedule(index, 100, 5) for index in range(100)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[0] == pytest.approx(0.2)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert max(rates) > 0.99
    assert schedule(0, 1, 0) == 1
