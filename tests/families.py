"""Tiny models, random texts and the steps in a row, for the tests of the core.

Everything stays small: window 8 and three trellis patterns, because numba compiles each pattern for seconds.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.checkpoint.making import tiny
from windquant import bank, compute, memory, models, statistics, step
from windquant.plan import Plan
from windquant.units import Linear

WINDOW = 8
#: From the cheapest width to the dearest, as in a bank's menu.
NAMES = [
    "scalar-1", "scalar-1.5", "trellis-1.5", "scalar-2", "trellis-2", "trellis-2.5", "scalar-3", "scalar-4", "scalar-8",
    "skip",
]  # fmt: skip


def family(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of an architecture (tests/checkpoint/making.py), float32, without gradients."""
    model: PreTrainedModel = tiny(name, seed).float().requires_grad_(False)
    # The padding token's embedding is zero: a norm turns the smallest change of that into anything.
    embeddings = model.get_input_embeddings().weight
    embeddings[0] = embeddings[1].flip(0)
    return model


def token_ids(count: int, length: int, seed: int = 0) -> Tensor:
    """int64 [count, length], below every tiny model's vocabulary of 320."""
    return torch.randint(320, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def own_text(model: PreTrainedModel, count: int, length: int, seed: int = 0) -> Tensor:
    """int64 [count, length], sampled from the model: the only text that a random model knows something about.

    On it the Fisher weights are the curvature of the loss, and what damages the weights raises the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = token_ids(count, 1, seed)
    for _ in range(length - 1):
        following = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(following, 1, generator=generator)], 1)
    return ids


@contextmanager
def in_float32() -> Iterator[None]:
    """No BF16 products, also where the processor has them: for comparisons with direct computations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "native_bfloat16", lambda: False)
        yield


@contextmanager
def inputs_of(model: nn.Module, linears: list[Linear]) -> Iterator[dict[str, Tensor]]:
    """What the linears read in the model's own forward pass: float32 [tokens, columns] by name, batches in a row."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        seen[name] = torch.cat([seen[name], x]) if name in seen else x

    handles = [
        model.get_submodule(linear.name).register_forward_pre_hook(
            lambda _, arguments, name=linear.name: keep(name, arguments[0])
        )
        for linear in linears
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def statistics_of(model: PreTrainedModel, ids: Tensor) -> statistics.Statistics:
    """As the step makes them, in float32."""
    with in_float32():
        return collected(model, ids, 4)


def collected(model: PreTrainedModel, ids: Tensor, batch: int) -> statistics.Statistics:
    """Statistics of a model in memory, the Fisher weights of all ids."""
    return statistics.collected(model, ids, batch, len(ids), Path(tempfile.gettempdir()), int)


def save_calibration(folder: Path, ids: Tensor) -> Path:
    """The artifact of the calibration step from ids [32, length]: its splits follow one another."""
    folder.mkdir(parents=True)
    names = ("calibration", "reward", "recovery", "test")
    windows = {name: part.int().clone() for name, part in zip(names, ids.split([8, 6, 16, 2]), strict=True)}
    save_file(windows, folder / "tokens.safetensors")
    (folder / "info.json").write_text(json.dumps({"test_name": "own"}))
    return folder


def run(module: ModuleType, output: Path, inputs: dict[str, Path], seed: int = 0, **settings: Any) -> dict[str, Any]:
    """Run a step in this process, without its command line; returns its notes."""
    task = step.Task(module.__name__, inputs, output, seed=seed)
    module.run(task, module.Settings(**settings))
    return task.notes


@dataclass(frozen=True)
class Prepared:
    """The artifacts in front of a plan."""

    model: Path
    calibration: Path
    statistics: Path
    bank: Path

    def inputs(self, *names: str, **others: Path) -> dict[str, Path]:
        return {name: getattr(self, name) for name in names} | others

    def arguments(self, *names: str, **others: Path) -> list[str]:
        """The same as flags of a command line."""
        return [word for name, path in self.inputs(*names, **others).items() for word in (f"--{name}", str(path))]


def uniform(prepared: Prepared, action: str) -> Plan:
    """The plan that gives every unit the same action."""
    found = bank.Bank.load(prepared.bank)
    choice = np.full(len(found.linear), found.actions.index(action), np.int64)
    return found.plan(choice, allocator="uniform", target_bits=16.5, seed=0)


def prepare(folder: Path, model: Path, **settings: Any) -> Prepared:
    """Calibration set, statistics and bank of a model; `settings` are the bank's."""
    made = Prepared(model, folder / "calibration", folder / "statistics.safetensors", folder / "bank.safetensors")
    save_calibration(made.calibration, own_text(models.load(model), 32, 48))
    run(statistics, made.statistics, made.inputs("model", "calibration"))
    chosen = {"chunk": 32, "protected": 0.03, "treatment": "scalar", "window": WINDOW} | settings
    run(bank, made.bank, made.inputs("model", "statistics"), **chosen)
    return made


def memory_for(size: float) -> str:
    """What memory.LIMIT has to be for weights of `size` bytes to fit just so."""
    return str((size + memory.REST) / memory.SHARE / memory.GIB)


class FullGpu:
    """Llama's layers as on a GPU with room for `most` samples at a time; `sizes` are those that it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most, self.sizes = most, list[int]()
        call = LlamaDecoderLayer.forward

        def forward(layer: nn.Module, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
            self.sizes.append(len(hidden))
            if len(hidden) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
            return call(layer, hidden, *arguments, **options)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
