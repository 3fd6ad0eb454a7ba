"""Streamed models compute what models in memory do, and hold one decoder layer whatever their depth."""

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.checkpoint.making import ARCHITECTURES
from tests.families import Prepared, collected, family, in_float32, prepare, run, token_ids, uniform
from windquant import models, quantize, streaming
from windquant.decoder import decoder_layers
from windquant.errors import WindquantError
from windquant.evaluation.perplexity import token_losses
from windquant.flow import Activations

IDS = token_ids(4, 24)


def saved(model: PreTrainedModel, folder: Path, shard: str = "5GB") -> Path:
    model.half().save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("streaming"), tiny_model_folder)


@pytest.fixture(scope="module")
def packed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    uniform(prepared, "scalar-3").save(folder / "plan.json")
    inputs = prepared.inputs("model", "calibration", "statistics", plan=folder / "plan.json")
    run(quantize, folder / "packed", inputs)
    return folder / "packed"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_streams_to_the_same_bits(name: str, tmp_path: Path) -> None:
    folder = saved(family(name), tmp_path / "model", "60KB")  # in several files
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole, streamed = models.load(folder), streaming.load(folder)
    assert hasattr(streamed, streaming.SOURCE)
    assert torch.equal(token_losses(streamed, IDS, 2), token_losses(whole, IDS, 2))
    with in_float32():
        found, expected = collected(streamed, IDS, 4), collected(whole, IDS, 4)
    assert found.linears == expected.linears
    for part in ("energy", "conditional", "fisher"):
        assert all(torch.equal(value, getattr(expected, part)[key]) for key, value in getattr(found, part).items())


def test_a_packed_checkpoint_streams_to_the_same_bits(packed: Path) -> None:
    streamed = streaming.load(packed)
    assert hasattr(streamed, streaming.SOURCE)
    assert torch.equal(token_losses(streamed, IDS), token_losses(models.load(packed), IDS))


def deep(folder: Path, layers: int) -> Path:
    config = LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return saved(LlamaForCausalLM(config), folder)


def held(model: nn.Module) -> int:
    """Bytes of the parameters that have memory."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)


@pytest.mark.parametrize("layers", [2, 9])
def test_one_layer_has_memory_at_a_time(tmp_path: Path, layers: int) -> None:
    model = streaming.load(deep(tmp_path / "model", layers))
    outside, most = held(model), 0
    _, blocks = decoder_layers(model)
    for index, layer in streaming.walk(model):
        most = max(most, held(model))
        assert [place for place, block in enumerate(blocks) if held(block)] == [index]
        assert held(layer) == 4 * (48 * 48 * 4 + 3 * 48 * 80 + 2 * 48)
    assert most == outside + 4 * (48 * 48 * 4 + 3 * 48 * 80 + 2 * 48), "whatever the depth"
    assert held(model) == outside


@pytest.mark.parametrize("layers", [2, 5])
def test_quantize_holds_no_more_of_what_it_has_made(
    tmp_path: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def watched(kind: str, tensor: torch.Tensor) -> torch.Tensor:
        alive[kind] += 1
        most[kind] = max(most[kind], alive[kind])
        weakref.finalize(tensor, alive.subtract, [kind])
        return tensor

    quantized, parameter = quantize.quantize_linear, streaming.Source.parameter

    def made(*arguments: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, decoded = quantized(*arguments)
        watched("linear", tensors["codes"])
        return tensors, decoded

    prepared = prepare(tmp_path, deep(tmp_path / "model", layers))
    uniform(prepared, "scalar-3").save(tmp_path / "plan.json")
    monkeypatch.setattr(quantize, "quantize_linear", made)
    monkeypatch.setattr(quantize, "abreast", lambda linears, device: 2)
    monkeypatch.setattr(streaming.Source, "parameter", lambda *given: watched("other", parameter(*given)))
    inputs = prepared.inputs("model", "calibration", "statistics", plan=tmp_path / "plan.json")
    run(quantize, tmp_path / "packed", inputs)
    assert most["linear"] in (2, 3), "the last one and those side by side, whatever the depth"
    assert most["other"] == 2, "the last one and this"
    assert not any(alive.values())


def test_a_pass_reads_every_tensor_once_also_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read = streaming.Source.tensor

    def counted(self: streaming.Source, name: str) -> torch.Tensor:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(streaming.Source, "tensor", counted)
    model = streaming.load(deep(tmp_path / "model", 3))
    assert not any(".layers." in name for name in seen)
    order = [index for index, _ in streaming.walk(model, reversed(range(3)))]
    assert order == [2, 1, 0]
    assert len(seen) == len(set(seen)) == len(load_file(tmp_path / "model" / "model.safetensors"))


def test_other_names_in_the_files_load_the_model_as_a_whole(tmp_path: Path) -> None:
    folder = saved(family("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): value for name, value in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    model = streaming.load(folder)
    assert not hasattr(model, streaming.SOURCE)
    assert [index for index, _ in streaming.walk(model)] == [0, 1]
    assert torch.equal(token_losses(model, IDS), token_losses(models.load(folder), IDS))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_of_its_own_is_kept_although_it_should_be_tied(tmp_path: Path, equal: bool) -> None:
    """As transformers does where the files hold both."""
    folder = saved(family("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    state = load_file(folder / "model.safetensors")
    if equal:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    whole, streamed = models.load(folder), streaming.load(folder)
    torch.testing.assert_close(token_losses(streamed, IDS), token_losses(whole, IDS), rtol=0, atol=0)
    assert (getattr(streamed, streaming.SOURCE, None) is not None) == equal, "only a copy is not read"


def test_a_missing_shard_is_named_before_anything_is_read(tmp_path: Path) -> None:
    folder = saved(family("llama"), tmp_path / "model", "60KB")
    names = sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))
    (folder / names[1]).unlink()
    with pytest.raises(WindquantError, match=f"{names[1]}: missing, though .* names it; get it again"):
        streaming.load(folder)


def test_a_shard_that_goes_away_while_the_model_is_read_is_named(tmp_path: Path) -> None:
    folder = saved(family("llama"), tmp_path / "model")
    model = streaming.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WindquantError, match=r"model\.safetensors: went away while the model was read"):
        list(streaming.walk(model))


def test_nan_is_refused_when_its_layer_comes(tmp_path: Path) -> None:
    folder = saved(family("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WindquantError, match=r"layers\.1\.mlp\.down_proj\.weight holds 1 NaN or Inf"):
        list(streaming.walk(streaming.load(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_in_a_file_are_those_that_were_put(tmp_path: Path, dtype: torch.dtype) -> None:
    states = Activations(tmp_path)
    values = {("a", place): torch.randn(3, 5, 7).to(dtype) for place in range(4)}
    for key, value in values.items():
        states.put(key, torch.zeros_like(value))
    for key, value in reversed(values.items()):
        states.put(key, value[:, :, :])
    for key, value in values.items():
        assert torch.equal(states.get(key, torch.device("cpu")), value)
    assert not list(tmp_path.iterdir()), "the file has no name: nothing is left behind"
