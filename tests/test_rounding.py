"""Learned rounding: it brings layers closer to the original, changes codes alone, and survives a kill."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tests.checkpoint.making import make
from tests.checkpoint.test_format import read_linear
from tests.families import FullGpu, Prepared, own_text, prepare, run, save_calibration, token_ids, uniform
from windquant import checkpoint, divergence as measured, models, quantize, recovery, rounding, step, streaming
from windquant.manifest import Manifest
from windquant.packed import dequantize
from windquant.storage import unpack_rows

STEPS = 20
#: In turn those whose codes move, of which there are all, and others.
ACTIONS = ["scalar-1", "trellis-2", "scalar-1.5", "scalar-2", "skip", "scalar-3", "scalar-8", "scalar-4"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what is finished goes to .cache


def more_text(calibration_set: Path, ids: Tensor) -> Path:
    """Replace the recovery split of an artifact of the calibration step."""
    windows = load_file(calibration_set / "tokens.safetensors")
    save_file(windows | {"recovery": ids.int().numpy()}, calibration_set / "tokens.safetensors")
    return calibration_set


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    made = prepare(tmp_path_factory.mktemp("rounding"), tiny_model_folder)
    more_text(made.calibration, own_text(models.load(tiny_model_folder), 96, 48, seed=1))
    return made


def quantized(prepared: Prepared, action: str) -> Path:
    """The checkpoint with every unit under one action."""
    plan = prepared.bank.with_name(f"{action}.json")
    uniform(prepared, action).save(plan)
    run(quantize, plan.with_suffix(""), prepared.inputs("model", "calibration", "statistics", plan=plan))
    return plan.with_suffix("")


@pytest.fixture(scope="module")
def packed(prepared: Prepared) -> Path:
    return quantized(prepared, "scalar-1.5")


def recover(inputs: dict[str, Path], output: Path, **settings: Any) -> Path:
    """Run the step as its command line does, in this process."""
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    paths = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    step.main(
        "recovery", recovery.run, recovery.Settings, tuple(inputs), argv=[*paths, "--output", str(output), *flags]
    )
    return output


@pytest.fixture(scope="module")
def inputs(prepared: Prepared, packed: Path) -> dict[str, Path]:
    return prepared.inputs("model", "calibration", checkpoint=packed)


@pytest.fixture(scope="module")
def learned(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounding alone, without distillation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("learned"))
        return recover(inputs, Path("made").absolute(), rounding=STEPS, steps=0)


def same(one: Path, other: Path) -> bool:
    return all((other / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


def notes(folder: Path) -> Any:
    return Manifest.load(folder).notes["rounding"]


def test_layers_and_model_come_closer_to_the_original(prepared: Prepared, packed: Path, learned: Path) -> None:
    found = notes(learned)
    assert 0.01 < found["moved"] < 0.5
    assert all(after <= before for before, after in found["errors"])
    assert found["errors"][0][1] < 0.95 * found["errors"][0][0], found
    assert found["layers"] == sum(after < before for before, after in found["errors"])
    assert found["divergence"]["kept"], found
    before, after = (divergence(prepared, folder) for folder in (packed, learned))
    assert after < 0.95 * before, "on text that no step saw"


def divergence(prepared: Prepared, folder: Path) -> float:
    """From the original, on 64 windows of its own text; the reward split has four, which is little more than chance."""
    ids = own_text(models.load(prepared.model), 64, 48, seed=2)
    return measured.divergence(streaming.load(folder), streaming.load(prepared.model), ids)


def test_distillation_goes_on_from_the_learned_codes(
    prepared: Prepared, inputs: dict[str, Path], learned: Path, tmp_path: Path
) -> None:
    rates = {"steps": 12, "gain_rate": 0.15, "norm_rate": 0.05}  # a tiny model takes large steps
    both = recover(inputs, tmp_path / "both", rounding=STEPS, **rates)
    alone = recover(inputs, tmp_path / "alone", **rates)
    assert notes(both) == notes(learned)
    found = Manifest.load(both).notes["divergence"]
    assert found["before"] == pytest.approx(notes(both)["divergence"]["after"], rel=1e-4)
    assert found["after"] < found["before"]
    assert divergence(prepared, both) < divergence(prepared, alone)
    layers = recover(inputs, tmp_path / "layers", rounding=STEPS, scope="layers", **rates)
    assert same(layers, both), "also layer by layer"
    after, before = checkpoint.read(both), checkpoint.read(learned)
    for name, tensors in after.tensors.items():
        assert torch.equal(tensors["codes"], before.tensors[name]["codes"])


def levels(folder: Path) -> dict[tuple[str, str], Tensor]:
    """The codes of all chunks that rounding may change: by linear and action."""
    found = checkpoint.read(folder)
    result = {}
    for name, layout in found.layouts.items():
        for part in layout.runs:
            if part.entry.name in ("scalar-1", "scalar-1.5", "scalar-2", "scalar-3", "scalar-4"):
                own = found.tensors[name]["codes"][part.place :][: len(part.chunks) * part.width * part.stride]
                codes = unpack_rows(own.view(-1, part.stride), layout.linear.rows, part.entry.pattern)
                result[name, f"{part.entry.name} {part.width}"] = codes.int()
    return result


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_codes_move_by_one_level_and_nothing_else_changes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every action's chunks, with biases and protected columns, as a reader of the format's document sees them."""
    made = make(tmp_path / "packed", tmp_path / "original", family, 0.05, ACTIONS)
    text = more_text(save_calibration(tmp_path / "text", token_ids(32, 24)), token_ids(96, 24, seed=1))
    weights: dict[str, Tensor] = {}
    take = rounding.Codes.take

    def taken(self: rounding.Codes, stored: Tensor) -> None:
        take(self, stored)
        weights[self.layout.linear.name] = self.weight.detach().clone()
        moved = self.decoded + self.scale * self.best
        torch.testing.assert_close(self.weight.detach(), moved, rtol=1e-5, atol=1e-6)

    monkeypatch.setattr(rounding.Codes, "take", taken)
    paths = {"model": made.source, "calibration": text, "checkpoint": made.folder}
    after = recover(paths, tmp_path / "made", rounding=STEPS, steps=0)
    assert notes(after)["divergence"]["kept"], notes(after)
    assert checkpoint.measure(after) == made.measured
    found, before = checkpoint.read(after), checkpoint.read(made.folder)
    changed = {
        key for name in found.tensors for key, value in found.tensors[name].items()
        if not torch.equal(value, before.tensors[name][key])
    }  # fmt: skip
    assert changed == {"codes"}
    for key, value in found.parameters.items():
        assert torch.equal(value, before.parameters[key])
    old, new = levels(made.folder), levels(after)
    assert {action.partition(" ")[0] for _, action in old} == {f"scalar-{bits}" for bits in ("1", "1.5", "2", "3", "4")}
    assert all((new[chunks] - codes).abs().max() <= 1 for chunks, codes in old.items())
    assert any((new[chunks] != codes).any() for chunks, codes in old.items())

    quantization = json.loads((after / "config.json").read_text())["quantization_config"]
    tensors = load_file(after / "model.safetensors")
    for name, layout in found.layouts.items():
        weight = read_linear(name, quantization, tensors)
        if name in weights:
            np.testing.assert_allclose(weights[name].numpy(), weight, rtol=1e-4, atol=1e-5)
        # what is no scalar chunk of few levels decodes to what it was
        order = found.order(name)
        was, now = (dequantize(layout, one.tensors[name], order)[:, order] for one in (before, found))
        kept = layout.protected
        assert torch.equal(was[:, :kept], now[:, :kept])
        for chunk, (action, width) in enumerate(zip(layout.names, layout.widths, strict=True)):
            columns = slice(kept + layout.starts[chunk], kept + layout.starts[chunk] + width)
            if action.startswith(("trellis", "skip")) or action == "scalar-8":
                assert torch.equal(was[:, columns], now[:, columns]), action


def test_a_checkpoint_without_such_chunks_stays_as_it_is(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("scalar-8", "skip"):
        folder = quantized(prepared, action)
        made = recover(
            prepared.inputs("model", "calibration", checkpoint=folder), tmp_path / action, rounding=4, steps=0
        )
        assert same(folder, made)
        assert "rounding" not in Manifest.load(made).notes
        assert "no scalar chunks of up to 4 bits" in capsys.readouterr().err
    trellis = make(tmp_path / "packed", tmp_path / "original", names=["trellis-2"])
    paths = {"model": trellis.source, "calibration": prepared.calibration, "checkpoint": trellis.folder}
    assert same(trellis.folder, recover(paths, tmp_path / "trellis", rounding=4, steps=0))


def test_same_seed_same_bytes(inputs: dict[str, Path], learned: Path, tmp_path: Path) -> None:
    assert same(learned, recover(inputs, tmp_path / "again", rounding=STEPS, steps=0))
    assert not same(learned, recover(inputs, tmp_path / "other", rounding=STEPS, steps=0, seed=1))
    assert not list((tmp_path / ".cache").rglob("*.safetensors")), "removed after success"


class Killed(Exception):
    pass


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_behind_its_last_layer(
    inputs: dict[str, Path], learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    seen: list[int] = []
    learn = rounding.learn

    def counted(layer: rounding.Block, *rest: Any) -> rounding.Outcome:
        if seen == [0]:
            seen.append(-1)
            raise Killed
        seen.append(layer.index)
        return learn(layer, *rest)

    monkeypatch.setattr(rounding, "learn", counted)
    with pytest.raises(Killed):
        recover(inputs, tmp_path / "made", rounding=STEPS, steps=0)
    assert not (tmp_path / "made").exists()
    (file,) = (tmp_path / ".cache").rglob("*.safetensors")
    if damaged:
        file.write_bytes(file.read_bytes()[:-10])
    recover(inputs, tmp_path / "made", rounding=STEPS, steps=0)
    assert seen == ([0, -1, 0, 1] if damaged else [0, -1, 1])
    assert same(learned, tmp_path / "made")
    assert notes(tmp_path / "made") == notes(learned)


def test_a_run_that_is_killed_in_its_distillation_does_not_round_again(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recover(inputs, tmp_path / "whole", rounding=4, steps=3)
    places: list[int] = []
    learn = recovery.Whole.learn

    def once(self: recovery.Whole, place: int) -> Tensor:
        places.append(place)
        if len(places) == 2:
            raise Killed
        return learn(self, place)

    monkeypatch.setattr(recovery.Whole, "learn", once)
    with pytest.raises(Killed):
        recover(inputs, tmp_path / "made", rounding=4, steps=3)
    monkeypatch.delattr(rounding, "learn")  # nothing is learned again
    assert same(whole, recover(inputs, tmp_path / "made", rounding=4, steps=3))


def test_codes_that_make_the_model_worse_are_dropped(
    inputs: dict[str, Path], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were a layer better on its windows by what makes the model worse."""

    def lost(layer: rounding.Block, linears: list[rounding.Codes], *rest: Any) -> rounding.Outcome:
        for codes in linears:
            codes.best = codes.highest
        return rounding.Outcome(1.0, 0.5, 1, 2)

    monkeypatch.setattr(rounding, "learn", lost)
    made = recover(inputs, tmp_path / "made", rounding=4, steps=0)
    assert same(packed, made)
    found = notes(made)["divergence"]
    assert found["kept"] is False
    assert found["after"] > found["before"]


def test_a_layer_keeps_its_codes_where_steps_do_not_help(
    inputs: dict[str, Path], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "TRAVEL", 40.0)  # nearly every code moves
    made = recover(inputs, tmp_path / "made", rounding=2, steps=0)
    assert notes(made)["layers"] == 0
    assert all(after == before for before, after in notes(made)["errors"])
    assert same(packed, made)


def test_a_small_gpu_takes_fewer_windows_at_a_time(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = FullGpu(monkeypatch, 2)
    monkeypatch.setattr(measured, "BATCH", 2)  # of the comparison of codes
    made = recover(inputs, tmp_path / "made", rounding=STEPS, steps=0)
    assert "again with a batch of 2" in capsys.readouterr().err
    assert max(gpu.sizes) == 4
    assert notes(made)["divergence"]["kept"], notes(made)


def test_what_cannot_be_is_refused(
    prepared: Prepared, inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        recover(inputs, tmp_path / "made", rounding=-1)
    assert stop.value.code == 2
    assert "--rounding: '-1' is not at least 0" in capsys.readouterr().err
    short = more_text(save_calibration(tmp_path / "short", token_ids(32, 24)), token_ids(1, 24))
    with pytest.raises(SystemExit):
        recover(inputs | {"calibration": short}, tmp_path / "made", rounding=1)
    assert "error: recovery.rounding: needs two windows of the recovery split" in capsys.readouterr().err
