"""Tiny random models of five architectures, quantized here with every action, and written as packed checkpoints."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from windquant import checkpoint, streaming
from windquant.decoder import quantizable
from windquant.feedback import column_order, quantize_linear
from windquant.packed import Format, Layout
from windquant.plan import Plan
from windquant.quantizers import actions
from windquant.units import chunk_widths, protected_count

ARCHITECTURES: dict[str, tuple[type[Any], type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"hidden_size": 48, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, MistralForCausalLM, {"hidden_size": 40, "sliding_window": 8, "dtype": torch.bfloat16}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"hidden_size": 40, "head_dim": 12, "tie_word_embeddings": True}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"hidden_size": 48, "head_dim": 10}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"hidden_size": 48}),  # biases of q, k and v
}
WINDOW = 8


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of two layers whose dimensions no chunk of 32 divides."""
    config_class, model_class, special = ARCHITECTURES[name]
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "intermediate_size": 75,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": torch.float16,
    }
    config = config_class(**sizes | special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(config.dtype).eval()


def save_tokenizer(folder: Path) -> None:
    """Words "w1" to "w319", and the end of the text."""
    words = {"<end>": 0} | {f"w{index}": index for index in range(1, 320)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


@dataclass(frozen=True)
class Made:
    """A checkpoint and what it was made from."""

    folder: Path
    source: Path
    model: PreTrainedModel  # float32, with the weights that the packed tensors stand for
    layouts: dict[str, Layout]
    tensors: dict[str, dict[str, Tensor]]
    plan: Plan
    measured: checkpoint.Measured


def make(
    folder: Path, source: Path, name: str = "llama", protected: float = 0.03, names: list[str] | None = None
) -> Made:
    """Quantize with the given actions in turn (default: all there are) and write `folder`; `source` is made too."""
    tiny(name).save_pretrained(source)
    save_tokenizer(source)
    dtype = ARCHITECTURES[name][2].get("dtype", torch.float16)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    form = Format(chunk=32, protected=protected, window=WINDOW, dtype=dtype)
    cycle = itertools.cycle(names or list(actions()))
    generator = torch.Generator().manual_seed(1)
    layouts: dict[str, Layout] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    orders: dict[str, Tensor] = {}
    for linear in quantizable(model):
        count = protected_count(linear.columns, protected)
        if linear.group == linear.name:
            inputs = torch.randn(3 * linear.columns, linear.columns, generator=generator)
            covariance = inputs.T @ inputs / len(inputs)
            orders[linear.name] = column_order(covariance.diagonal(), "saliency", form.chunk, count)
        chunks = len(chunk_widths(linear.columns, count, form.chunk))
        layout = Layout(linear, tuple(itertools.islice(cycle, chunks)), form)
        weight = model.get_submodule(linear.name).weight.detach()
        importance = torch.ones(linear.rows)
        tensors[linear.name], dense[linear.name] = quantize_linear(
            weight, orders[linear.group], covariance, layout, importance
        )
        layouts[linear.name] = layout
    weights = sum(layout.linear.weights for layout in layouts.values())
    size = sum(layout.bytes() for layout in layouts.values())
    plan = Plan(
        model=name,
        allocator="random",
        target_bits=16.0,
        effective_bits=8 * size / weights,
        bytes=size,
        weights=weights,
        seed=0,
        actions={key: list(layout.names) for key, layout in layouts.items()},
        predicted_loss=1.0,
    )
    measured = checkpoint.write(
        folder, model, layouts, tensors.items(), streaming.parameters(model, layouts), plan, source
    )
    for key, weight in dense.items():
        model.get_submodule(key).weight.data = weight
    return Made(folder, source, model, layouts, tensors, plan, measured)
