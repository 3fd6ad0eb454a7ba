"""Loading and checking a model, and everything that must be refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from windquant import models, step, streaming
from windquant.errors import WindquantError


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a model (dots as double underscores), or take them out (None)."""
    path = folder / "model.safetensors"
    found = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, path, {"format": "pt"})


def test_load_gives_an_evaluating_float32_model_without_gradients(tiny_model_folder: Path) -> None:
    model = models.load(tiny_model_folder)
    assert isinstance(model, PreTrainedModel)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert models.load(tiny_model_folder, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("tied", [True, False])
def test_files_with_other_names_get_those_of_the_parameters(copy: Path, tmp_path: Path, tied: bool) -> None:
    """A base model's files lack the prefix; a head of its own stands beside them."""
    torch.manual_seed(0)
    config = models.configuration(copy)
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config).to(torch.float16)
    config.save_pretrained(copy)
    head = {} if tied else {"lm_head.weight": model.lm_head.weight.detach()}
    save_file(dict(model.model.state_dict()) | head, copy / "model.safetensors", {"format": "pt"})
    models.run(step.Task("model", {}, tmp_path / "made"), models.Settings("m", source="folder", path=str(copy)))
    found = streaming.open_source(tmp_path / "made")
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not tied or name != "lm_head.weight"}
    assert found.entries.keys() == wanted.keys()
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in wanted.items())
    assert hasattr(streaming.load(tmp_path / "made"), streaming.SOURCE)
    assert "layers.0.self_attn.q_proj.weight" in load_file(copy / "model.safetensors")


def test_load_for_widens_on_a_cpu(tiny_model_folder: Path) -> None:
    assert models.load_for(tiny_model_folder, "cpu", "auto").dtype == torch.float32
    assert models.load_for(tiny_model_folder, "cpu", "bfloat16").dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(WindquantError, match="no GPU"):
            models.load_for(tiny_model_folder, "cuda")


def test_tokenizer_does_not_warn_about_long_texts(tiny_model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = models.load_tokenizer(tiny_model_folder)
    assert len(tokenizer("the river " * 3000).input_ids) > 6000
    assert not caplog.records


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name(copy: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(copy / "model.safetensors")[name]
    weight[3, 4] = value
    change(copy, **{name: weight})
    with pytest.raises(WindquantError, match=rf"{name} holds 1 NaN or Inf"):
        models.load(copy)
    with pytest.raises(WindquantError, match=rf"{name} holds 1 NaN or Inf"):
        models.check_folder(copy)


def test_a_sum_that_overflows_is_no_nan() -> None:
    models.check_finite([("w", torch.full((4, 4), 1e38))], Path("x"))


def test_truncated_file_is_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for function in (models.load, models.check_folder):
        with pytest.raises(WindquantError, match=r"model\.safetensors: truncated"):
            function(copy)


def test_missing_shard_is_named(copy: Path) -> None:
    first, second = (f"model-0000{place}-of-00002.safetensors" for place in (1, 2))
    (copy / "model.safetensors").rename(copy / first)
    index = {"weight_map": {"a": first, "b": second}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WindquantError, match=r"model-00002-of-00002\.safetensors: missing"):
        models.load(copy)


def test_missing_weight_is_not_invented(copy: Path) -> None:
    change(copy, model__layers__0__mlp__down_proj__weight=None)
    with pytest.raises(WindquantError, match=r"lacks .*down_proj"):
        models.load(copy)


def test_weight_of_a_wrong_shape_is_refused(copy: Path) -> None:
    change(copy, model__layers__0__mlp__down_proj__weight=torch.zeros(48, 79))
    with pytest.raises(WindquantError, match="down_proj"):
        models.load(copy)


def test_model_without_linears_is_refused(copy: Path) -> None:
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(copy)
    for function in (models.load, models.check_folder):
        with pytest.raises(WindquantError, match=r"nn\.Linear"):
            function(copy)


def test_a_mixture_whose_experts_would_stay_as_they_are_is_refused(copy: Path) -> None:
    config = MixtralConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(copy)
    with pytest.raises(WindquantError, match=r"layers\.0\.mlp\.experts\.\w+ and its like hold \d\d% of"):
        models.check_folder(copy)


def test_remote_code_is_never_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises(WindquantError, match=r"config\.json"):
        models.load(copy)


def test_quantized_models_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(WindquantError, match="quantized by gptq"):
        models.load(copy)
    with pytest.raises(WindquantError, match="quantized already"):
        models.check_folder(copy)


def test_folder_without_anything_is_refused(tmp_path: Path, copy: Path) -> None:
    for function in (models.load, models.load_tokenizer, models.check_folder):
        with pytest.raises(WindquantError, match=str(tmp_path)):
            function(tmp_path)
    (copy / "config.json").write_text("{")
    with pytest.raises(WindquantError, match=r"config\.json"):
        models.load(copy)


def test_without_tokenizer_files_none_is_invented(copy: Path) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = Qwen2Config(**sizes, num_attention_heads=1, num_key_value_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(copy)
    models.load_tokenizer(copy)
    for path in copy.glob("*token*"):
        path.unlink()
    with pytest.raises(WindquantError, match=r"no tokenizer .*; save the model's tokenizer there"):
        models.load_tokenizer(copy)


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("tokenizer.json", "model", {"type": "Later"}, "no readable tokenizer"),
        ("config.json", "num_hidden_layers", "two", r"config\.json: .*num_hidden_layers"),
    ],
)
def test_files_that_the_libraries_cannot_read_are_named(
    copy: Path, name: str, key: str, value: object, words: str
) -> None:
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | {key: value}))
    with pytest.raises(WindquantError, match=words):
        models.check_folder(copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_a_word_in_the_configuration_the_files_tell_the_type(copy: Path, dtype: torch.dtype) -> None:
    models.load(copy, dtype).save_pretrained(copy)
    assert models.stored_dtype(copy) == dtype
    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config))
    assert models.stored_dtype(copy) == dtype
