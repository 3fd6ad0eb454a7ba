"""Recovery where original and quantized model do not fit into memory together: the same steps, layer by layer.

The original is walked through once, for all windows: only the hidden states behind its last layer are kept, and its
head. A step then walks through the quantized model twice. Forwards every layer leaves its input in `Activations`;
backwards it is computed again from that input, this time with gradients, and hands the gradient on to the layer before
it. So a step computes what it computes on the whole model, in the memory of one layer and of what is trained: a gain
and Adam's two moments per row and chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from windquant import compute, decoder, streaming
from windquant.flow import Activations, Flow
from windquant.gains import GainLinear
from windquant.tuning import BATCH, divergence_of, kl_divergence, norms_of


class Streamed:
    """A quantized model with gains, and the original one, of which a layer each is in memory at most."""

    def __init__(self, original: Path, quantized: Path, windows: Tensor, held_out: Tensor, scratch: Path) -> None:
        """original, quantized: folders; windows, held_out: int64 [n, length]; scratch: folder for hidden states."""
        self.windows, self.held_out, self.scratch = windows, held_out, scratch
        self.teacher, self.student = streaming.load(original), streaming.load(quantized)
        self.source = streaming.open_source(quantized)
        self.prefix, layers = decoder.decoder_layers(self.student)
        self.depth = len(layers)
        self.device = decoder.device_of(self.student)
        self.rounding = False
        self.gains: dict[str, nn.Parameter] = {}
        self.norms: dict[str, nn.Parameter] = {}
        self.exact, self.target = (
            Flow(self.teacher, ids, batch, scratch) for ids, batch in ((windows, 1), (held_out, BATCH))
        )
        for index, layer in streaming.walk(self.teacher):
            self.exact.through(layer, index)
            self.target.through(layer, index)
        self.before = self.divergence()  # which also makes gains and norms, layer by layer
        self.outside = {name: norm for name, norm in norms_of(self.student).items() if not norm.is_meta}
        for name, norm in self.outside.items():
            norm.requires_grad_(True)
            self.norms[name] = norm

    @contextmanager
    def tuned(self, index: int, layer: nn.Module) -> Iterator[list[nn.Parameter]]:
        """A lent layer with its gains and norms, which are what is yielded; its linears come back at the end."""
        prefix = f"{self.prefix}.{index}."
        dtype = torch.bfloat16 if compute.native_bfloat16() else torch.float32
        layouts = self.source.layouts
        linears = {prefix + name: child for name, child in layer.named_modules() if prefix + name in layouts}
        parameters = []
        for full, layout, tensors, order in self.source.packed(linears):
            child = linears[full]
            linear = GainLinear(layout, tensors, order, child.weight, child.bias, dtype)
            linear.gain = self.gains.setdefault(full, linear.gain)
            linear.rounding = self.rounding
            layer.set_submodule(full.removeprefix(prefix), linear)
            parameters.append(linear.gain)
        for full, value in norms_of(layer, prefix).items():
            norm = self.norms.setdefault(full, value)
            norm.requires_grad_(True)
            path, _, key = full.removeprefix(prefix).rpartition(".")
            setattr(layer.get_submodule(path), key, norm)
            parameters.append(norm)
        try:
            yield parameters
        finally:
            for full, child in linears.items():
                layer.set_submodule(full.removeprefix(prefix), child)

    def divergence(self) -> float:
        """Mean divergence from the original on the held-out windows."""
        flow = Flow(self.student, self.held_out, BATCH, self.scratch)
        for index, layer in streaming.walk(self.student):
            with self.tuned(index, layer):
                flow.through(layer, index)
        return divergence_of(self.student, flow, self.teacher, self.target, self.held_out)

    def learn(self, place: int) -> Tensor:
        """The divergence on a window, in nats per token; its gradients are left at gains and norms."""
        ids = self.windows[place][None].to(self.device)
        with torch.no_grad(), compute.autocast():
            hidden, calls = decoder.embed(self.student, ids)
        states = Activations(self.scratch if Flow.large(self.depth * hidden.nbytes) else None)
        for index, layer in streaming.walk(self.student):
            states.put(index, hidden)
            with torch.no_grad(), compute.autocast(), self.tuned(index, layer):
                hidden = decoder.run_layer(layer, hidden, calls[index])
        end = hidden.detach().requires_grad_(True)
        with compute.autocast():
            with torch.no_grad():
                target = decoder.head(self.teacher, ids, self.exact.states.get(place, self.device))
            loss = kl_divergence(decoder.head(self.student, ids, end), target)
        if not loss.isfinite():
            return loss
        gradient = _gradients(loss, end, list(self.outside.values()))
        for index, layer in streaming.walk(self.student, reversed(range(self.depth))):
            given = states.get(index, self.device).detach().requires_grad_(True)
            with self.tuned(index, layer) as parameters:
                with compute.autocast():
                    end = decoder.run_layer(layer, given, calls[index])
                gradient = _gradients(end, given, parameters, gradient)
        return loss.detach()


def _gradients(end: Tensor, given: Tensor, parameters: list[nn.Parameter], upper: Tensor | None = None) -> Tensor:
    """Leave the gradients of `end` at the parameters, and return that of what was given."""
    found = torch.autograd.grad(end, [given, *parameters], upper)
    for parameter, gradient in zip(parameters, found[1:], strict=True):
        parameter.grad = gradient
    return found[0]
