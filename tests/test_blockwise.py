"""Recovery block by block: closer to the original, as many bytes, a layer's memory, and a kill costs one layer."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoint.making import ARCHITECTURES, make
from tests.families import Prepared, in_float32, prepare, run, save_calibration, token_ids, uniform
from windquant import blockwise, calibration, checkpoint, memory, quantize, recovery, step, streaming
from windquant.checkpoint.rewriting import rewrite
from windquant.manifest import Manifest
from windquant.tuning import divergence

RATES = {"gain_rate": 0.03, "norm_rate": 0.01}  # a tiny model takes large steps


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # training checkpoints go to .cache


def deep(folder: Path, layers: int) -> tuple[Prepared, Path]:
    """A random Llama with that many layers, and its checkpoint at 1.5 bits."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).half().save_pretrained(folder / "model")
    prepared = prepare(folder, folder / "model")
    uniform(prepared, "scalar-1.5").save(folder / "plan.json")
    run(quantize, folder / "packed", prepared.inputs("model", "calibration", "statistics", plan=folder / "plan.json"))
    return prepared, folder / "packed"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    return deep(tmp_path_factory.mktemp("three"), 3)


def recover(made: tuple[Prepared, Path], output: Path, **settings: Any) -> Path:
    """Run the step as its command line does, in this process."""
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    inputs = made[0].arguments("model", "calibration", checkpoint=made[1])
    names = ("model", "calibration", "checkpoint")
    step.main("recovery", recovery.run, recovery.Settings, names, argv=[*inputs, "--output", str(output), *flags])
    return output


def notes(output: Path) -> dict[str, Any]:
    return Manifest.load(output).notes


@pytest.fixture(scope="module")
def recovered(three: tuple[Prepared, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recovered"))
        return recover(three, Path("made").absolute(), scope="blocks", steps=16, **RATES)


def test_the_divergence_on_other_text_falls(three: tuple[Prepared, Path], recovered: Path) -> None:
    found = notes(recovered)
    assert found["scope"] == "blocks"
    assert found["divergence"]["kept"]
    assert 0 < found["divergence"]["after"] < 0.99 * found["divergence"]["before"]
    assert len(found["error_left"]) == 3
    assert all(0 < share < 1 for share in found["error_left"])
    ids = calibration.load(three[0].calibration).reward.long()
    for folder, expected in ((three[1], "before"), (recovered, "after")):
        measured = divergence(streaming.load(folder), streaming.load(three[0].model), ids)
        assert measured == pytest.approx(found["divergence"][expected], rel=0.01), "as it is stored"


def test_scales_and_norms_change_and_no_byte_is_added(three: tuple[Prepared, Path], recovered: Path) -> None:
    before, after = checkpoint.read(three[1]), checkpoint.read(recovered)
    for name, tensors in after.tensors.items():
        assert [key for key, value in tensors.items() if not torch.equal(value, before.tensors[name][key])] == [
            "scales"
        ]
    changed = [key for key, value in after.parameters.items() if not torch.equal(value, before.parameters[key])]
    assert len(changed) == 6, "two norms of every layer; the last one is outside of them"
    assert checkpoint.measure(recovered) == checkpoint.measure(three[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Norms and packed tensors have the same names in the model and in the files; biases, ties and skipped chunks."""
    made = make(tmp_path / "packed", tmp_path / "original", name, 0.05, ["scalar-2", "skip", "scalar-1.5"])
    text = save_calibration(tmp_path / "text", token_ids(32, 24))
    inputs = {"model": made.source, "calibration": text, "checkpoint": made.folder}
    found = run(recovery, tmp_path / "recovered", inputs, scope="blocks", steps=3, **RATES)
    assert len(found["error_left"]) == 2
    assert checkpoint.measure(tmp_path / "recovered") == made.measured


class Killed(Exception):
    pass


def test_a_killed_step_goes_on_behind_the_last_finished_layer(
    three: tuple[Prepared, Path], recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    train = blockwise.train

    def once(here: blockwise.Block, index: int, *others: Any) -> dict[str, Tensor]:
        if index == 2 and trained == [0, 1]:
            raise Killed
        trained.append(index)
        return train(here, index, *others)

    monkeypatch.setattr(blockwise, "train", once)
    with pytest.raises(Killed):
        recover(three, tmp_path / "made", scope="blocks", steps=16, **RATES)
    assert not (tmp_path / "made").exists()
    trained.append(99)
    recover(three, tmp_path / "made", scope="blocks", steps=16, **RATES)
    assert trained == [0, 1, 99, 2]
    for path in recovered.iterdir():
        assert (tmp_path / "made" / path.name).read_bytes() == path.read_bytes(), path.name
    assert notes(tmp_path / "made")["error_left"] == notes(recovered)["error_left"]
    assert not list((tmp_path / ".cache").rglob("*.safetensors")), "removed after success"


@pytest.mark.parametrize("rate", [1e6, 0])
def test_what_does_not_help_a_layer_is_dropped(three: tuple[Prepared, Path], tmp_path: Path, rate: float) -> None:
    folder = recover(three, tmp_path / "kept", scope="blocks", steps=4, gain_rate=rate, norm_rate=rate)
    assert notes(folder)["error_left"] == [1, 1, 1]
    assert notes(folder)["divergence"]["kept"] is False
    for path in three[1].iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_auto_takes_the_whole_model_where_it_fits(
    three: tuple[Prepared, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = memory.RECOVERY * streaming.open_source(three[0].model).parameters
    for room, scope in ((1.1 * size, "model"), (0.9 * size, "blocks")):
        monkeypatch.setenv(memory.LIMIT, str(memory.needed(room) / memory.GIB))
        assert notes(recover(three, tmp_path / scope, steps=1))["scope"] == scope


def most_weights(layers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Values of all living tensors that have the shape of a linear or of its slots, at most, while layers are tuned."""
    seen = []
    error = blockwise.window_error

    def counted(*arguments: Any) -> Tensor:
        shapes = {(48, 48), (80, 48), (48, 80), (48, 2, 32), (80, 2, 32), (48, 3, 32)}
        tensors = {
            tensor.data_ptr(): tensor.numel()
            for tensor in gc.get_objects()
            if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tuple(tensor.shape) in shapes
        }
        seen.append(sum(tensors.values()))
        return error(*arguments)

    made = deep(folder, layers)
    gc.collect()
    monkeypatch.setattr(blockwise, "window_error", counted)
    recover(made, folder / "made", scope="blocks", steps=2, **RATES)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    return max(seen)


def test_memory_is_that_of_one_layer_whatever_the_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_float32():
        shallow, many = (most_weights(layers, tmp_path / str(layers), monkeypatch) for layers in (3, 6))
    assert many <= 1.05 * shallow
    layer = 4 * 48 * 48 + 3 * 48 * 80
    assert shallow < 6 * layer, "teacher and student, decoded and in slots, and what is read ahead"


def test_rewriting_refuses_what_the_checkpoint_does_not_have(three: tuple[Prepared, Path], tmp_path: Path) -> None:
    for path in three[1].iterdir():
        path.chmod(0o444)  # as out of a cache that shares files
    with pytest.raises(ValueError, match=r"x \[2\] is not in the checkpoint"):
        rewrite(three[1], tmp_path / "a", {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight \[2\] is not in the checkpoint"):
        rewrite(three[1], tmp_path / "b", {"model.norm.weight": torch.zeros(2)})
    rewrite(three[1], tmp_path / "c", {"model.norm.weight": torch.full((48,), 3.0)})
    assert checkpoint.read(tmp_path / "c").parameters["model.norm.weight"].tolist() == [3.0] * 48
    assert (three[1] / "plan.json").read_bytes() == (tmp_path / "c" / "plan.json").read_bytes()
