"""Block-wise recovery: closer to the original, within what the checkpoint can store, and streamed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.families import Prepared, in_float32, prepare, run, uniform
from windquant import blockwise, calibration, checkpoint, models, quantize, recovery, streaming
from windquant.blockwise import Block, Schedule, columns_of
from windquant.checkpoint import Packed
from windquant.decoder import decoder_layers, embed, run_layer


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("blockwise"), tiny_model_folder)


@pytest.fixture(scope="module")
def folder(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("packed")
    uniform(prepared, "scalar-2").save(made / "plan.json")
    inputs = prepared.inputs("model", "calibration", "statistics", plan=made / "plan.json")
    run(quantize, made / "packed", inputs)
    return made / "packed"


def distilled(prepared: Prepared, folder: Path, scratch: Path, epochs: int = 4) -> tuple[Packed, dict, dict]:
    packed = checkpoint.read(folder)
    windows = calibration.load(prepared.calibration).recovery.long()

    def stored(name: str, gain: Tensor) -> Tensor:
        before = packed.tensors[name]
        return recovery.stored_gain(packed.layouts[name], before, recovery.regain(packed.layouts[name], before, gain))

    seen: list[int] = []
    original, student = streaming.load(prepared.model), streaming.load(folder)
    with in_float32():
        gains, norms = blockwise.distill(
            original, student, packed.layouts, packed.order, stored, windows, Schedule(epochs), scratch, seen.append
        )
    assert seen == [1, 1]
    return packed, gains, norms


@torch.no_grad()
def distance(prepared: Prepared, folder: Path, gains: dict, norms: dict, packed: Packed) -> float:
    """Mean KL divergence from the original on text that was not trained on."""
    ids = calibration.load(prepared.calibration).reward.long()
    student = models.load(folder)
    weights = {}
    for name, gain in gains.items():
        chunk_of = columns_of(packed.layouts[name], packed.order(name))
        factor = torch.cat([torch.zeros(len(gain), 1), gain], 1).exp()[:, chunk_of]
        weights[f"{name}.weight"] = student.get_submodule(name).weight * factor
    for name, weight in weights.items():
        student.get_submodule(name.removesuffix(".weight")).dense = weight
    for name, norm in norms.items():
        student.get_parameter(name).copy_(norm)
    return recovery.divergence(student, models.load(prepared.model), ids)


def test_the_recovered_model_is_closer_on_other_text(prepared: Prepared, folder: Path, tmp_path: Path) -> None:
    packed, gains, norms = distilled(prepared, folder, tmp_path)
    assert gains.keys() == packed.layouts.keys()
    assert all(
        gain.shape == (layout.linear.rows, len(layout.widths))
        for gain, layout in ((gains[name], packed.layouts[name]) for name in gains)
    )
    assert len(norms) == 4, "two of every layer"
    with in_float32():
        before = distance(prepared, folder, {}, {}, packed)
        after = distance(prepared, folder, gains, norms, packed)
    assert after < 0.95 * before
    assert not list(tmp_path.iterdir())


def test_gains_are_what_the_checkpoint_can_store(prepared: Prepared, folder: Path, tmp_path: Path) -> None:
    packed, gains, _ = distilled(prepared, folder, tmp_path, epochs=1)
    for name, gain in gains.items():
        layout, before = packed.layouts[name], packed.tensors[name]
        again = recovery.stored_gain(layout, before, recovery.regain(layout, before, gain))
        torch.testing.assert_close(again, gain)
    assert any(gain.any() for gain in gains.values())


def test_a_block_without_gains_is_the_layer(folder: Path) -> None:
    packed = checkpoint.read(folder)
    model = models.load(folder)
    hidden, calls = embed(model, torch.arange(12)[None])
    prefix, _ = decoder_layers(model)
    for index, layer in streaming.walk(streaming.load(folder)):
        block = Block(layer, f"{prefix}.{index}.", packed.layouts, packed.order)
        with torch.no_grad():
            torch.testing.assert_close(run_layer(block, hidden, calls[index]), run_layer(layer, hidden, calls[index]))
