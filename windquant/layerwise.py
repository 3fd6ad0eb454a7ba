"""Recovery where the quantized model does not fit into memory with its gradients: the same steps, layer by layer.

A step walks through the quantized model twice. Forwards every layer leaves its input in `Activations`; backwards it is
computed again from that input, this time with gradients, and hands the gradient on to the layer before it. So a step
computes what it computes on the whole model, in the memory of one layer and of what is trained: a gain and Adam's two
moments per row and chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from windquant import compute, decoder, streaming
from windquant.flow import Activations, Flow
from windquant.gains import GainLinear
from windquant.original import Original
from windquant.tuning import norms_of


class Streamed:
    """A quantized model with gains, of which a layer is in memory at most."""

    def __init__(self, original: Original, quantized: Path) -> None:
        """quantized: folder."""
        self.original, self.student = original, streaming.load(quantized)
        self.source = streaming.open_source(quantized)
        self.prefix, layers = decoder.decoder_layers(self.student)
        self.depth = len(layers)
        self.device = decoder.device_of(self.student)
        self.rounding = False
        self.gains: dict[str, nn.Parameter] = {}
        self.norms: dict[str, nn.Parameter] = {}
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
        flow = self.original.flow(self.student)
        for index, layer in streaming.walk(self.student):
            with self.tuned(index, layer):
                flow.through(layer, index)
        return self.original.divergence(self.student, flow)

    def learn(self, place: int) -> Tensor:
        """The divergence on a window, in nats per token; its gradients are left at gains and norms."""
        ids = self.original.windows[place][None].to(self.device)
        with torch.no_grad(), compute.autocast():
            hidden, calls = decoder.embed(self.student, ids)
        states = Activations(self.original.scratch if Flow.large(self.depth * hidden.nbytes) else None)
        for index, layer in streaming.walk(self.student):
            states.put(index, hidden)
            with torch.no_grad(), compute.autocast(), self.tuned(index, layer):
                hidden = decoder.run_layer(layer, hidden, calls[index])
        loss, gradient = self.original.gradient(self.student, place, hidden)
        if not loss.isfinite():
            return loss
        for index, layer in streaming.walk(self.student, reversed(range(self.depth))):
            given = states.get(index, self.device).detach().requires_grad_(True)
            with self.tuned(index, layer) as parameters:
                with compute.autocast():
                    end = decoder.run_layer(layer, given, calls[index])
                found = torch.autograd.grad(end, [given, *parameters], gradient)
            gradient = found[0]
            for parameter, value in zip(parameters, found[1:], strict=True):
                parameter.grad = value
        with compute.autocast():
            first, _ = decoder.embed(self.student, ids)
        if first.requires_grad:  # some architectures have a norm before the first layer
            torch.autograd.backward(first, gradient)
        return loss
