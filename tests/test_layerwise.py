"""Recovery layer by layer: to the byte what the whole model gives, in the memory of one layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.checkpoint.making import ARCHITECTURES, make
from tests.families import Prepared, in_float32, memory_for, prepare, run, save_calibration, token_ids, uniform
from windquant import checkpoint, decoder, memory, quantize, recovery, step, streaming, training
from windquant.checkpoint.rewriting import rewrite
from windquant.layerwise import Streamed
from windquant.manifest import Manifest

RATES = {"gain_rate": 0.15, "norm_rate": 0.05}  # a tiny model takes large steps


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
        return recover(three, Path("made").absolute(), scope="layers", steps=12, **RATES)


def same(one: Path, other: Path) -> bool:
    return all((other / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


def test_what_comes_out_is_what_the_whole_model_gives(
    three: tuple[Prepared, Path], recovered: Path, tmp_path: Path
) -> None:
    whole = recover(three, tmp_path / "whole", scope="model", steps=12, **RATES)
    assert same(recovered, whole)
    found, expected = notes(recovered), notes(whole)
    assert (found["scope"], expected["scope"]) == ("layers", "model")
    assert found["curve"] == expected["curve"]
    assert len(found["curve"]) == 12
    assert found["divergence"] == expected["divergence"]
    assert found["divergence"]["kept"]
    assert found["divergence"]["after"] < 0.97 * found["divergence"]["before"]
    assert not same(recovered, three[1])
    assert checkpoint.measure(recovered) == checkpoint.measure(three[1]), "no byte is added"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Norms and packed tensors have the same names in the model and in the files; biases, ties and skipped chunks."""
    made = make(tmp_path / "packed", tmp_path / "original", name, 0.05, ["scalar-2", "skip", "scalar-1.5"])
    text = save_calibration(tmp_path / "text", token_ids(32, 24))
    inputs = {"model": made.source, "calibration": text, "checkpoint": made.folder}
    whole, layers = (
        run(recovery, tmp_path / scope, inputs, scope=scope, steps=3, **RATES) for scope in ("model", "layers")
    )
    assert layers["curve"] == whole["curve"]
    assert layers["divergence"] == whole["divergence"]
    assert same(tmp_path / "model", tmp_path / "layers")
    assert checkpoint.measure(tmp_path / "layers") == made.measured


def test_a_norm_before_the_first_layer_learns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 48, "n_layer": 2, "n_head": 4}
    monkeypatch.setitem(ARCHITECTURES, "bloom", (BloomConfig, BloomForCausalLM, sizes))
    made = make(tmp_path / "packed", tmp_path / "original", "bloom", 0.05, ["scalar-2"])
    text = save_calibration(tmp_path / "text", token_ids(32, 24))
    inputs = {"model": made.source, "calibration": text, "checkpoint": made.folder}
    for scope in ("model", "layers"):
        run(recovery, tmp_path / scope, inputs, scope=scope, steps=3, **RATES)
    assert same(tmp_path / "model", tmp_path / "layers")
    name = "transformer.word_embeddings_layernorm.weight"
    before, after = (checkpoint.read(folder).parameters[name] for folder in (made.folder, tmp_path / "layers"))
    assert not torch.equal(before, after)


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_where_it_was(
    three: tuple[Prepared, Path], recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    places: list[int] = []
    learn = Streamed.learn

    def once(self: Streamed, place: int) -> Tensor:
        if places == list(range(8)):
            raise Killed
        places.append(place)
        return learn(self, place)

    monkeypatch.setattr(Streamed, "learn", once)
    with pytest.raises(Killed):
        recover(three, tmp_path / "made", scope="layers", steps=12, **RATES)
    assert not (tmp_path / "made").exists()
    places.clear()
    recover(three, tmp_path / "made", scope="layers", steps=12, **RATES)
    assert places == list(range(6, 12)), "from the last training checkpoint on"
    assert same(recovered, tmp_path / "made")
    assert not list((tmp_path / ".cache").rglob("*.safetensors")), "removed after success"


def test_a_gpu_that_is_too_small_for_the_model_goes_on_layer_by_layer(
    three: tuple[Prepared, Path],
    recovered: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the last training checkpoint on, which is one of either."""
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    places: list[int] = []

    def full(learn: Callable[..., Tensor], most: int) -> Callable[..., Tensor]:
        def limited(self: object, place: int) -> Tensor:
            if len(places) == most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
            places.append(place)
            return learn(self, place)

        return limited

    monkeypatch.setattr(recovery.Whole, "learn", full(recovery.Whole.learn, 5))
    monkeypatch.setattr(Streamed, "learn", full(Streamed.learn, 99))
    recover(three, tmp_path / "made", steps=12, **RATES)
    assert "out of GPU memory (CUDA out of memory): again layer by layer" in capsys.readouterr().err
    assert places == [0, 1, 2, 3, 4, *range(3, 12)]
    assert notes(tmp_path / "made")["scope"] == "layers"
    assert same(recovered, tmp_path / "made")
    monkeypatch.setattr(Streamed, "learn", full(Streamed.learn, len(places)))
    with pytest.raises(SystemExit) as stop:
        recover(three, tmp_path / "never", steps=12, scope="layers", **RATES)
    assert stop.value.code == 2
    assert "out of GPU memory with one layer (CUDA out of memory); use a GPU with more" in capsys.readouterr().err


def test_a_tuning_that_diverges_is_dropped(three: tuple[Prepared, Path], tmp_path: Path) -> None:
    folder = recover(three, tmp_path / "kept", scope="layers", steps=4, gain_rate=1e6)
    assert notes(folder)["divergence"]["kept"] is False
    assert same(three[1], folder)


def test_auto_takes_the_whole_model_where_it_fits(
    three: tuple[Prepared, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = memory.RECOVERY * streaming.open_source(three[0].model).parameters
    for room, scope in ((1.1 * size, "model"), (0.9 * size, "layers")):
        monkeypatch.setenv(memory.LIMIT, memory_for(room))
        assert notes(recover(three, tmp_path / scope, steps=1))["scope"] == scope


def most_weights(layers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of all weights inside the decoder layers of both models, decoded and in slots, at most."""
    seen, loaded = [], []
    run_layer, load = decoder.run_layer, streaming.load

    def counted(*arguments: Any) -> Tensor:
        inside = [decoder.decoder_layers(model)[1] for model in loaded]
        weights = {
            tensor.data_ptr(): tensor.nbytes
            for blocks in inside
            for tensor in [*blocks.parameters(), *blocks.buffers()]
            if not tensor.is_meta and tensor.dim() > 1 and tensor.shape[-1] > 4  # gains and codes have 2 or 3 columns
        }
        seen.append(sum(weights.values()))
        return run_layer(*arguments)

    def remembered(*arguments: Any) -> nn.Module:
        loaded.append(load(*arguments))
        return loaded[-1]

    made = deep(folder, layers)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "run_layer", counted)
        patch.setattr(streaming, "load", remembered)
        recover(made, folder / "made", scope="layers", steps=2, **RATES)
    return max(seen)


def test_memory_is_that_of_one_layer_whatever_the_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_float32():
        shallow, many = (most_weights(layers, tmp_path / str(layers), monkeypatch) for layers in (2, 5))
    slots = 4 * (4 * 48 * 96 + 2 * 80 * 96 + 48 * 128)  # of 32 columns, the protected ones in one of their own
    assert many == shallow == slots, "one layer's, whatever the depth"


def test_rewriting_refuses_what_the_checkpoint_does_not_have(three: tuple[Prepared, Path], tmp_path: Path) -> None:
    for path in three[1].iterdir():
        path.chmod(0o444)  # as out of a cache that shares files
    with pytest.raises(ValueError, match=r"x \[2\] is not in the checkpoint"):
        rewrite(three[1], tmp_path / "a", [("x", torch.zeros(2))])
    with pytest.raises(ValueError, match=r"\[2\] has no place at"):
        rewrite(three[1], tmp_path / "b", [("model.norm.weight", torch.zeros(2))])
    rewrite(three[1], tmp_path / "c", [("model.norm.weight", torch.full((48,), 3.0))])
    assert checkpoint.read(tmp_path / "c").parameters["model.norm.weight"].tolist() == [3.0] * 48
    assert (three[1] / "plan.json").read_bytes() == (tmp_path / "c" / "plan.json").read_bytes()
