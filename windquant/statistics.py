"""Activation statistics of the original model: what a weight's error costs.

    python -m windquant.statistics --model DIR --calibration DIR --output FILE.safetensors

For every group of linears with one input, in natural column order: the channel energies E[x_j^2], and the conditional
energies 1 / U_jj^2 (the part of x_j that the columns after it in column order cannot express: what error feedback
leaves of a column's error, see feedback.py). For every linear the Fisher weight of each output row, E[g_r^2], g being
the gradient of the summed loss. To second order and with independent errors a weight error d costs

    loss increase = 1/2 sum_r fisher_r sum_j energy_j d_rj^2   nats per token.

Both passes go layer by layer, and every layer is read from the files once in each: forward with the covariance of one
layer in memory, backward for the Fisher weights, with each layer computed anew from its input, which the forward pass
has left in a file.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from windquant import calibration, compute, decoder, step, streaming, tensor_file
from windquant.errors import WindquantError
from windquant.feedback import factor
from windquant.flow import Activations, Flow
from windquant.progress import Progress
from windquant.settings import Count
from windquant.units import Linear

DAMPING = 0.01  # of the mean energy; error feedback adds something else (feedback.py), which would count as loss here


@dataclass(frozen=True)
class Settings:
    batch: Count = 16  # samples at a time
    # More of them change a plan's cost by a thousandth (docs/decisions.md); quantize takes all
    samples: Count = 64  # calibration samples that the energies are taken from, or as many as there are
    fisher_samples: Count = 16  # how many of these, the first ones, the Fisher weights are taken from


@dataclass(frozen=True)
class Statistics:
    linears: list[Linear]
    energy: dict[str, Tensor]  # group -> float32 [columns], E[x_j^2]
    conditional: dict[str, Tensor]  # group -> float32 [columns], 1 / U_jj^2
    fisher: dict[str, Tensor]  # linear -> float32 [rows], E[g_r^2]

    def save(self, path: Path) -> None:
        tensors = {f"energy:{name}": value for name, value in self.energy.items()}
        tensors |= {f"conditional:{name}": value for name, value in self.conditional.items()}
        tensors |= {f"fisher:{name}": value for name, value in self.fisher.items()}
        tensor_file.save(path, tensors, "linears", [asdict(linear) for linear in self.linears])

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        parts: dict[str, dict[str, Tensor]] = {"energy": {}, "conditional": {}, "fisher": {}}
        try:
            tensors, linears = tensor_file.load(path, "linears")
            for key, tensor in tensors.items():
                kind, name = key.split(":", 1)
                parts[kind][name] = tensor
            return cls([Linear(**linear) for linear in linears], **parts)
        except tensor_file.UNREADABLE as error:
            raise WindquantError(f"{path}: not readable statistics ({error}); delete it and run again") from error

    def check(self, model: streaming.Source) -> None:
        """Raise WindquantError unless these are the statistics of that model, or of one of its shape."""
        linears = {f"{linear.name}.weight": (linear.rows, linear.columns) for linear in self.linears}
        for name, shape in linears.items():
            if not model.holds(name, torch.Size(shape)):
                raise WindquantError(
                    f"--statistics: they have a linear {name.removesuffix('.weight')} of {shape[0]} x {shape[1]}, "
                    f"{model.folder} does not; give the statistics of this model"
                )
        last = max(self.linears, key=lambda linear: linear.layer)
        prefix = last.name.partition(f".{last.layer}.")[0]
        if any(name.startswith(f"{prefix}.{last.layer + 1}.") for name in model.entries):
            raise WindquantError(
                f"--statistics: they end with layer {last.layer}, {model.folder} has more; give the statistics of this "
                "model"
            )


def run(task: step.Task, settings: Settings) -> None:
    ids = calibration.load(task.inputs["calibration"]).calibration[: settings.samples].long()
    model = streaming.load(task.inputs["model"])
    layers = len(decoder.decoder_layers(model)[1])

    def collect(batch: int) -> Statistics:
        progress: Progress[None] = task.progress(total=2 * layers, label="statistics")
        with progress:
            return collected(model, ids, batch, settings.fisher_samples, task.output.parent, progress.update)

    found = compute.with_smaller_batches(settings.batch, collect)
    found.save(task.output)
    task.note("linears", len(found.linears))
    task.note("weights", sum(linear.weights for linear in found.linears))
    task.note("dead_inputs", sum(int((value == 0).sum()) for value in found.energy.values()))


def collected(
    model: nn.Module, ids: Tensor, batch: int, fisher_samples: int, scratch: Path, update: Callable[[int], object]
) -> Statistics:
    """Statistics of token ids [n, length], the Fisher weights of the first `fisher_samples` of them.

    batch: samples at a time, a quarter of it in the backward pass. scratch: folder for hidden states.
    """
    kept = Kept.of(min(fisher_samples, len(ids)), batch, scratch)
    linears, energy, conditional = forward(model, ids, batch, update, scratch, kept)
    fisher = backward(model, linears, ids, update, kept)
    return Statistics(linears, energy, conditional, fisher)


class Covariance:
    """Sums x x^T of the inputs of some linears over the batches of one layer.

    The sums are symmetric: in a grid of 4 x 4 blocks only the 10 on and above the diagonal are multiplied.
    """

    BLOCKS = 4

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names  # name inside the layer -> key of the sum
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def see(self, name: str, x: Tensor, *_: Tensor) -> None:
        if name not in self.names:
            return
        key = self.names[name]
        x = x.reshape(-1, x.shape[-1]).float()
        if key not in self.sums:
            self.sums[key] = x.new_zeros(x.shape[1], x.shape[1])
            self.tokens[key] = 0
        with torch.autocast(x.device.type, enabled=False), compute.products_by_onednn(rounded=True):
            for block in self.blocks(x.shape[1]):
                self.sums[key][block, block.start :].addmm_(x[:, block].T, x[:, block.start :])
        self.tokens[key] += len(x)

    def blocks(self, columns: int) -> list[slice]:
        width = -(-columns // self.BLOCKS)
        return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]

    def means(self) -> dict[str, Tensor]:
        """E[x x^T] by key, on the device; an activation that overflowed is refused."""
        result = {key: total / self.tokens[key] for key, total in self.sums.items()}
        for value in result.values():
            for block in self.blocks(len(value)):
                value[block.stop :, block] = value[block, block.stop :].T
        for key, value in result.items():
            if not value.sum().isfinite():
                raise WindquantError(f"{key}: its input overflows on the calibration text; check the model's weights")
        return result


def owners(linears: list[Linear], layer: int, prefix: str) -> dict[str, str]:
    """The linears of a layer that stand for their group: name inside the layer -> group."""
    return {
        linear.name.removeprefix(f"{prefix}.{layer}."): linear.group
        for linear in linears
        if linear.layer == layer and linear.name == linear.group
    }


@dataclass(frozen=True)
class Kept:
    """What the forward pass leaves for the backward pass: the input of every layer, and the last output."""

    states: Activations  # by layer (and one more for the last output) and place
    parts: list[tuple[int, int]]  # first sample and end of every place

    @classmethod
    def of(cls, samples: int, batch: int, scratch: Path) -> "Kept":
        """Places for the first `samples`, a quarter of a forward batch each."""
        part = max(1, batch // 4)
        starts = [s for first in range(0, samples, batch) for s in range(first, min(first + batch, samples), part)]
        return cls(Activations(scratch), list(zip(starts, [*starts[1:], samples], strict=True)))

    def save(self, index: int, flow: Flow) -> None:
        """Take the input of layer `index`."""
        first = 0
        for hidden in flow.batches(self.parts[-1][1]):
            for place, (start, stop) in enumerate(self.parts):
                if first <= start < first + len(hidden):
                    self.states.put((index, place), hidden[start - first : stop - first])
            first += len(hidden)


@torch.no_grad()
def forward(
    model: nn.Module, ids: Tensor, batch: int, update: Callable[[int], object], scratch: Path, kept: Kept | None = None
) -> tuple[list[Linear], dict[str, Tensor], dict[str, Tensor]]:
    """The linears, and the energies and conditional energies of every group, from token ids [n, length]."""
    prefix, _ = decoder.decoder_layers(model)
    linears: list[Linear] = []
    energy: dict[str, Tensor] = {}
    conditional: dict[str, Tensor] = {}
    probe = decoder.Probe(model)
    flow = Flow(model, ids, batch, scratch)
    last = 0
    for index, layer in streaming.walk(model):
        if kept is not None:
            kept.save(index, flow)
        here = probe.linears(prefix, index, layer)
        covariance = Covariance(owners(here, index, prefix))
        with decoder.watch(layer, covariance.see):
            flow.through(layer, index)
        for group, matrix in covariance.means().items():
            energy[group] = matrix.diagonal().cpu().clone()
            order = torch.argsort(energy[group], descending=True, stable=True)
            conditional[group] = torch.empty_like(energy[group])
            damping = DAMPING * energy[group].double().mean().item() or 1.0
            factor_u = factor(matrix[order.to(matrix.device)][:, order.to(matrix.device)], damping)
            conditional[group][order] = factor_u.diagonal().square().reciprocal().cpu()
            if not energy[group].any():  # damped by 1 as it is; no error costs anything here
                conditional[group].zero_()
        for linear in here:
            if linear.group not in energy:
                raise WindquantError(
                    f"{linear.name}: no token of the calibration text reaches it, so nothing is known about its "
                    "inputs; raise calibration.samples for an expert of a mixture; what a layer uses without "
                    "calling it cannot be quantized"
                )
        linears += here
        last = index + 1
        update(1)
    if kept is not None:
        kept.save(last, flow)
    return linears, energy, conditional


def backward(
    model: nn.Module, linears: list[Linear], ids: Tensor, update: Callable[[int], object], kept: Kept
) -> dict[str, Tensor]:
    """Fisher weight E[g_r^2] of every output row, g the gradient of the summed next-token loss of what was kept."""
    prefix, layers = decoder.decoder_layers(model)
    device = decoder.device_of(model)
    wanted = {linear.name for linear in linears}
    fisher: dict[str, Tensor] = {}
    gradients = Activations()
    calls: list[list[decoder.Call]] = []
    for place, (start, stop) in enumerate(kept.parts):
        part = ids[start:stop].to(device)
        with torch.no_grad(), compute.autocast():
            calls.append(decoder.embed(model, part)[1])
        gradients.put(place, _loss_gradient(model, part, kept.states.get((len(layers), place), device)))
    tokens = kept.parts[-1][1] * ids.shape[1]
    for index, layer in streaming.walk(model, reversed(range(len(layers)))):
        for place, call in enumerate(calls):
            given = kept.states.get((index, place), device).detach().requires_grad_(True)
            outputs: dict[str, Tensor] = {}

            def see(name: str, _: Tensor, out: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
                outputs[name] = out

            with compute.autocast(), decoder.watch(layer, see):
                end = decoder.run_layer(layer, given, call[index])
            found = torch.autograd.grad(end, [given, *outputs.values()], gradients.get(place, device))
            gradients.put(place, found[0])
            for name, gradient in zip(outputs, found[1:], strict=True):
                full = f"{prefix}.{index}.{name}"
                if full in wanted:
                    squares = gradient.float().flatten(0, -2).square().sum(0).cpu() / tokens
                    fisher[full] = fisher.get(full, 0) + squares
        update(1)
    return fisher


def _loss_gradient(model: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of the summed next-token loss with respect to the last hidden state."""
    start = hidden.detach().requires_grad_(True)
    with compute.autocast():
        logits = decoder.head(model, ids, start)
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return torch.autograd.grad(loss, start)[0]


if __name__ == "__main__":
    step.main("statistics", run, Settings, inputs=("model", "calibration"))
