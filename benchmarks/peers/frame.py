"""What every peer's script shares. It runs in the peer's environment, which has torch, transformers and safetensors.

A script (`with_<peer>.py`) has

    quantize(folder, tokens, options) -> Any         # the work that is timed; tokens int [n, length]
    linears(quantized) -> Iterator[Stored]           # what became of each weight, and the bytes that it takes

and ends with `frame.main(quantize, linears)`. The frame writes a plain Hugging Face folder with the weights that the
peer computes with, so that whoever reads it needs nothing of the peer, and `peer.json` beside them.
"""

import argparse
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Options = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A quantized linear weight."""

    name: str  # of the module in the original model
    weight: Tensor  # [rows, columns], as the peer decodes it
    bytes: int  # of the codes and all metadata that it stores for this weight


def main(quantize: Callable[[Path, Tensor, Options], Any], linears: Callable[[Any], Iterable[Stored]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, in one safetensors file")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens.safetensors of the calibration step")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON object, the script's own")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args()
    tokens = load_file(arguments.tokens)["calibration"].long()
    began = time.monotonic()
    quantized = quantize(arguments.model, tokens, arguments.options)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stored = write(arguments.model, linears(quantized), arguments.output)
    described = {**stored, "seconds": seconds, "peak_memory_bytes": peak}
    (arguments.output / "peer.json").write_text(json.dumps(described, indent=1) + "\n")


def write(model: Path, stored: Iterable[Stored], output: Path) -> dict[str, int]:
    """Copy the folder with the weights replaced; the bytes stored and the number of weights that they stand for."""
    tensors = load_file(model / "model.safetensors")
    names: set[str] = set()
    total = count = 0
    for linear in stored:
        name = f"{linear.name}.weight"
        original = tensors[name]
        if linear.weight.shape != original.shape:
            raise ValueError(f"{name} is {tuple(linear.weight.shape)}, and {tuple(original.shape)} in the original")
        if not linear.weight.isfinite().all():
            raise ValueError(f"{name} has NaN or Inf")
        tensors[name] = linear.weight.detach().to("cpu", torch.float32).contiguous()
        names.add(name)
        total += linear.bytes
        count += original.numel()
    if expected := sorted(decoder_weights(tensors) - names):
        raise ValueError(f"{expected[0]} was not quantized, nor were {len(expected) - 1} more")
    output.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copyfile(file, output / file.name)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return {"bytes": total, "weights": count}


def decoder_weights(tensors: Iterable[str]) -> set[str]:
    """Names of the matrices of all decoder layers: what every peer has to quantize, and all that counts."""
    return {name for name in tensors if ".layers." in name and name.endswith("proj.weight")}


def replace(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    """The model with `make(name, linear)` in place of every linear of its decoder layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(name, module))
    return model


@torch.no_grad()
def decoded(module: nn.Module, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [rows, columns] that a module multiplies with, by its own forward pass of the identity."""
    return module(torch.eye(columns, dtype=dtype)).T


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, those of the tensors inside for torch's wrapper subclasses."""
    return sum(tensor.nbytes for tensor in plain(tensors))


def plain(tensors: Iterable[Any]) -> Iterator[Tensor]:
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from plain(getattr(tensor, name) for name in names)
        elif isinstance(tensor, Tensor):
            yield tensor


def gptq_layout(model: nn.Module, packed: Path) -> Iterator[Stored]:
    """The linears of a loaded checkpoint that stores qweight, qzeros and scales, as GPTQ's and AutoRound's do.

    A `g_idx` that only counts the columns in groups is not counted: a reader can make it.
    """
    sizes: dict[str, int] = {}
    for file in packed.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, kind = name.rpartition(".")
            if kind == "g_idx" and bool((tensor.diff() >= 0).all()):
                continue
            sizes[module] = sizes.get(module, 0) + tensor.nbytes
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            columns = module.in_features if hasattr(module, "in_features") else module.infeatures
            yield Stored(name, decoded(module, columns), sizes[name])
