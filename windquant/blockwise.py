"""Recovery block by block, where original and quantized model do not fit into memory together.

For every decoder layer, on the inputs that the recovered layers before it hand on, one log-gain per row and chunk and
the layer's norms are trained to lower the error of its output relative to the original one's, token by token:

    mean over tokens of |q(x) - o(y)|^2 / |o(y)|^2        q: the quantized layer, o: the original one

with x the hidden states of the quantized model so far and y those of the original one (the block-wise phase of
EfficientQAT, arXiv 2407.11062, with scales alone). Both models are streamed, each layer of either is read once: a pass
takes the memory of two layers, and the hidden states. A layer whose error does not fall stays as it is. What is found
for a layer is kept in the task's cache, so that a killed step goes on behind the last finished layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from windquant import atomic, compute, decoder, step, streaming
from windquant.flow import Flow
from windquant.gains import GainLinear, regain, stored_gain
from windquant.packed import Layout
from windquant.progress import Progress
from windquant.tuning import BATCH, Tuning, divergence_of, drawn, norms_of

Stored = dict[str, Tensor]
LEFT = "left"  # in a layer's file: the share of its error that is left


@dataclass
class Block:
    """A quantized decoder layer whose gains and norms can be trained."""

    layer: nn.Module
    linears: dict[str, GainLinear]  # by their full names
    layouts: dict[str, Layout]
    tensors: dict[str, Stored]  # by linear, as they are stored
    norms: dict[str, nn.Parameter]  # by their full names
    norm_types: dict[str, torch.dtype]  # as they are stored

    def changes(self) -> Stored:
        """What the checkpoint can store of gains and norms: its tensors by name."""
        found = {
            f"{name}.scales": regain(self.layouts[name], self.tensors[name], linear.gain.detach().cpu())["scales"]
            for name, linear in self.linears.items()
        }
        return found | {name: norm.detach().cpu().to(self.norm_types[name]) for name, norm in self.norms.items()}

    @torch.no_grad()
    def take(self, changes: Stored) -> None:
        """Compute with what is stored from here on."""
        for name, linear in self.linears.items():
            before = self.tensors[name]
            after = before | {"scales": changes[f"{name}.scales"]}
            linear.gain.copy_(stored_gain(self.layouts[name], before, after))
            linear.rounding = False
        for name, norm in self.norms.items():
            norm.copy_(changes[name])


@contextmanager
def block(layer: nn.Module, prefix: str, source: streaming.Source) -> Iterator[Block]:
    """The layer `prefix` (model.layers.3.) of a packed checkpoint with gains; its linears come back at the end."""
    dtype = torch.bfloat16 if compute.native_bfloat16() else torch.float32
    replaced = {name: child for name, child in layer.named_modules() if f"{prefix}{name}" in source.layouts}
    layouts = {f"{prefix}{name}": source.layouts[f"{prefix}{name}"] for name in replaced}
    stored = source.read(f"{name}.weight" for name in layouts)
    tensors = {name: {part: stored[f"{name}.{part}"] for part in layout.shapes()} for name, layout in layouts.items()}
    linears = {}
    for name, child in replaced.items():
        full = f"{prefix}{name}"
        order = source.order(full, stored)
        linears[full] = GainLinear(layouts[full], tensors[full], order, child.weight, child.bias, dtype)
        layer.set_submodule(name, linears[full])
    norms = norms_of(layer, prefix)
    types = {name: source.entries[name].dtype or torch.float32 for name in norms}
    for norm in norms.values():
        norm.requires_grad_(True)
    try:
        yield Block(layer, linears, layouts, tensors, norms, types)
    finally:
        for name, child in replaced.items():
            layer.set_submodule(name, child)


def recover(
    task: step.Task, tuning: Tuning, original: Path, quantized: Path, windows: Tensor, held_out: Tensor
) -> tuple[Stored, float, float, list[float]]:
    """Tensors of the checkpoint that change, and the divergence on `held_out` [n, length] before and after.

    The list is the share of every layer's error that is left. original, quantized: folders; windows: int64 [n, length],
    of which the steps take one each.
    """
    teacher, student = streaming.load(original), streaming.load(quantized)
    source = streaming.open_source(quantized)
    prefix, layers = decoder.decoder_layers(student)
    scratch = task.output.parent
    windows = windows[drawn(len(windows), task.seed)][: max(tuning.steps, 1)]
    exact, found = (Flow(model, windows, 1, scratch) for model in (teacher, student))
    target, plain, tuned = (Flow(model, held_out, BATCH, scratch) for model in (teacher, student, student))
    changes: Stored = {}
    left = []
    progress: Progress[None] = task.progress(total=len(layers) * tuning.steps, label="recovery")
    with progress:
        for (index, theirs), (_, mine) in zip(streaming.walk(teacher), streaming.walk(student), strict=True):
            for flow in (exact, target):
                flow.through(theirs, index)
            with block(mine, f"{prefix}.{index}.", source) as here:
                plain.through(here.layer, index)
                saved = task.cache / f"block-{index}.safetensors"
                stored = load(saved)
                if stored is None:
                    stored = train(here, index, found, exact, tuning, progress)
                    with atomic.output(saved) as path:
                        save_file(stored, path)
                else:
                    progress.update(tuning.steps)
                left.append(stored.pop(LEFT).item())
                task.metric("recovery_error_left", left[-1], index)
                here.take(stored)
                changes |= stored
                for flow in (found, tuned):
                    flow.through(here.layer, index)
    before, after = (divergence_of(student, flow, teacher, target, held_out) for flow in (plain, tuned))
    return changes, before, after, left


def train(here: Block, index: int, found: Flow, exact: Flow, tuning: Tuning, progress: Progress[None]) -> Stored:
    """Train the gains and norms of layer `index`, a window a step: what changes, and the share of the error LEFT."""
    untuned, before = here.changes(), error(here, index, found, exact)
    optimizer = tuning.optimizer([linear.gain for linear in here.linears.values()], here.norms.values())
    for place in range(tuning.steps):
        tuning.begin(place, optimizer, here.layer)
        loss = window_error(here, index, found, exact, place % len(found.calls))
        if loss.isfinite():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        progress.update(1)
    tuned = here.changes()
    here.take(tuned)
    after = error(here, index, found, exact)
    if after < before:
        return tuned | {LEFT: torch.tensor(after / before)}
    return untuned | {LEFT: torch.tensor(1.0)}  # diverged, or nothing to gain


def window_error(here: Block, index: int, found: Flow, exact: Flow, place: int) -> Tensor:
    """The relative squared error of the layer's output on one window, mean over its tokens."""
    x, wanted = (flow.states.get(place, flow.device) for flow in (found, exact))
    with compute.autocast():
        out = decoder.run_layer(here.layer, x, found.calls[place][index])
    squares = (out.float() - wanted.float()).square().sum(-1) / wanted.float().square().sum(-1).clamp_min(1e-12)
    return squares.mean()


@torch.no_grad()
def error(here: Block, index: int, found: Flow, exact: Flow) -> float:
    """The same over all windows."""
    places = range(len(found.calls))
    return sum(window_error(here, index, found, exact, place).item() for place in places) / len(places)


def load(path: Path) -> Stored | None:
    """What an interrupted step has found for a layer; None if it has not, or the file is damaged."""
    try:
        return load_file(path) if path.exists() else None
    except (OSError, SafetensorError):
        return None
