"""Write the folder of a packed checkpoint, tensor by tensor.

What is stored and how large it is follows from the plan. So the files are laid out first, headers and all, and each
tensor then goes to its place as soon as it is there: the memory that a checkpoint takes while it is written is that of
one tensor, whatever the model's depth.
"""

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from windquant.checkpoint import card, description
from windquant.checkpoint.files import Measured, measure
from windquant.header import Entry, lay_out, put
from windquant.packed import Layout
from windquant.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD = "50GB"  # largest file of weights: what transformers' save_pretrained makes
#: What travels with the weights: the tokenizer's files and the model's licence.
COMPANIONS = (
    "tokenizer*", "tekken.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "*.bpe", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip


def write(
    folder: Path,
    model: "PreTrainedModel",
    layouts: Mapping[str, Layout],
    packed: Iterable[tuple[str, Mapping[str, Tensor]]],
    others: Iterable[tuple[str, Tensor]],
    plan: Plan,
    source: Path,
) -> Measured:
    """Write a packed checkpoint and measure it.

    model: the original; its weights need no memory. packed: linears and their tensors, as `Layout.shapes` names them,
    in any order. others: the rest of the model's state by name (norms, embeddings, biases), asked for after `packed`;
    stored in the dtype of `source`'s configuration. source: the original's folder, whose tokenizer is copied. Raises
    ValueError where layouts, tensors and plan disagree (a caller's bug).
    """
    if {name: list(layout.names) for name, layout in layouts.items()} != plan.actions:
        raise ValueError("the layouts do not follow the plan")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = _source_dtype(source, next(iter(layouts.values())).format.dtype)
    places = _lay_out(folder, model, _state(model, layouts, dtype))
    tied = model.all_tied_weights_keys
    for name, tensor in chain(_checked(packed, layouts), others):
        if name in places:
            put(places.pop(name), tensor)
        elif name not in tied:
            raise ValueError(f"{name}: stored already, or not of the model")
    if places:
        raise ValueError(f"{next(iter(places))} is missing")
    _save_configuration(folder, model, description.describe(layouts, dtype), dtype)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    plan.save(folder / "plan.json")
    measured = measure(folder)
    text = card.card(plan, layouts, measured.effective_bits, measured.checkpoint_bits, measured.measured_bytes)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return measured


def _source_dtype(source: Path, otherwise: torch.dtype) -> torch.dtype:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    dtype = config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else otherwise


def _state(model: "PreTrainedModel", layouts: Mapping[str, Layout], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every stored tensor by name, without memory: first the model's own, then those of the linears."""
    state = {}
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        twin = model.all_tied_weights_keys.get(name)
        tied = twin in tensors and tensors[twin].data_ptr() == tensor.data_ptr()
        if name.removesuffix(".weight") not in layouts and not tied:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            state[name] = torch.empty(tensor.shape, dtype=kind, device="meta")
    for name, layout in layouts.items():
        for key, (shape, kind) in layout.shapes.items():
            state[f"{name}.{key}"] = torch.empty(shape, dtype=kind, device="meta")
    return state


def _lay_out(folder: Path, model: "PreTrainedModel", state: dict[str, Tensor]) -> dict[str, Entry]:
    """Make the files of weights, and an index where they are several, as `save_pretrained` does; places by tensor."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
    places: dict[str, Entry] = {}
    for file, names in split.filename_to_tensors.items():
        places |= lay_out(folder / file, {name: state[name] for name in names})
    return places


def _checked(
    packed: Iterable[tuple[str, Mapping[str, Tensor]]], layouts: Mapping[str, Layout]
) -> Iterable[tuple[str, Tensor]]:
    """The tensors of all linears by their full names; ValueError for those that do not fit their layout."""
    for name, tensors in packed:
        found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        if found != layouts[name].shapes:
            raise ValueError(f"{name}: tensors {found} do not fit the layout {layouts[name].shapes}")
        yield from ((f"{name}.{key}", tensor) for key, tensor in tensors.items())


def _save_configuration(
    folder: Path, model: "PreTrainedModel", quantization: dict[str, Any], dtype: torch.dtype
) -> None:
    """config.json and generation_config.json, as a loaded checkpoint's `save_pretrained` writes them."""
    from transformers import GenerationConfig

    packed = copy.deepcopy(model.config)
    packed.quantization_config = quantization
    packed.architectures = [type(model).__name__]
    packed.dtype = dtype
    packed.save_pretrained(folder)
    if model.can_generate():
        generation = model.generation_config
        try:
            generation.validate(strict=True)
        except ValueError:  # some published models have one that transformers loads but refuses to save
            generation = GenerationConfig.from_model_config(model.config)
        generation.save_pretrained(folder)
