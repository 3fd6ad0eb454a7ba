"""Activation statistics of the original model: what a weight's error costs.

    python -m windquant.statistics --model DIR --calibration DIR --output FILE.safetensors

For every group of linears with one input, in natural column order: the channel energies E[x_j^2], and the conditional
energies 1 / U_jj^2 (the part of x_j that the columns after it in column order cannot express: what error feedback
leaves of a column's error, see feedback.py). For every linear the Fisher weight of each output row, E[g_r^2], g being
the gradient of the summed loss. To second order and with independent errors a weight error d costs

    loss increase = 1/2 sum_r fisher_r sum_j energy_j d_rj^2   nats per token.

Both passes go layer by layer: forward with the covariance of one layer in memory, backward for the Fisher weights.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from windquant import calibration, compute, decoder, models, step
from windquant.errors import WindquantError
from windquant.feedback import factor
from windquant.progress import Progress
from windquant.units import Linear


@dataclass(frozen=True)
class Settings:
    batch: int = 16  # samples at a time
    fisher_samples: int = 16  # calibration samples that the Fisher weights are taken from


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
        save_file(tensors, path, {"linears": json.dumps([asdict(linear) for linear in self.linears])})

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        parts: dict[str, dict[str, Tensor]] = {"energy": {}, "conditional": {}, "fisher": {}}
        try:
            with safe_open(path, framework="pt") as file:
                linears = json.loads(file.metadata()["linears"])
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    kind, name = key.split(":", 1)
                    parts[kind][name] = file.get_tensor(key)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise WindquantError(f"{path}: not readable statistics ({error}); delete it and run again") from error
        return cls([Linear(**linear) for linear in linears], **parts)


def run(task: step.Task, settings: Settings) -> None:
    ids = calibration.load(task.inputs["calibration"]).calibration.long()
    model = compute.move(models.load(task.inputs["model"]))
    linears = decoder.quantizable(model)
    fisher_ids = ids[: settings.fisher_samples]
    layers = 1 + max(linear.layer for linear in linears)
    progress: Progress[None] = task.progress(total=2 * layers, label="statistics")
    with progress:
        energy, conditional = forward(model, linears, ids, settings.batch, progress.update)
        fisher = backward(model, linears, fisher_ids, max(1, settings.batch // 4), progress.update)
    Statistics(linears, energy, conditional, fisher).save(task.output)
    task.note("linears", len(linears))
    task.note("weights", sum(linear.weights for linear in linears))
    task.note("dead_inputs", sum(int((value == 0).sum()) for value in energy.values()))


class Covariance:
    """Sums x x^T of the inputs of some linears over the batches of one layer."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names  # name inside the layer -> key of the sum
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def see(self, name: str, x: Tensor, _: Tensor) -> None:
        if name not in self.names:
            return
        key = self.names[name]
        x = x.reshape(-1, x.shape[-1]).float()
        if key not in self.sums:
            self.sums[key] = x.new_zeros(x.shape[1], x.shape[1])
            self.tokens[key] = 0
        with torch.autocast(x.device.type, enabled=False):
            self.sums[key].addmm_(x.T, x)
        self.tokens[key] += len(x)

    def means(self) -> dict[str, Tensor]:
        """E[x x^T] by key, on the CPU; an activation that overflowed is refused."""
        result = {key: (total / self.tokens[key]).cpu() for key, total in self.sums.items()}
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


def states(model: nn.Module, ids: Tensor, batch: int) -> tuple[list[Tensor], list[list[decoder.Call]]]:
    """First hidden states and layer calls of every batch of ids [n, length]."""
    device = next(model.parameters()).device
    with compute.autocast():
        embedded = [decoder.embed(model, part.to(device)) for part in ids.split(batch)]
    return [hidden for hidden, _ in embedded], [calls for _, calls in embedded]


def advance(layer: nn.Module, index: int, hidden: list[Tensor], calls: list[list[decoder.Call]]) -> list[Tensor]:
    """Hidden states of every batch after decoder layer `index`."""
    with compute.autocast():
        return [decoder.run_layer(layer, part, call[index]) for part, call in zip(hidden, calls, strict=True)]


@torch.no_grad()
def forward(
    model: nn.Module, linears: list[Linear], ids: Tensor, batch: int, update: Callable[[int], object]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Energies and conditional energies of every group, from token ids [n, length]."""
    prefix, layers = decoder.decoder_layers(model)
    energy: dict[str, Tensor] = {}
    conditional: dict[str, Tensor] = {}
    hidden, calls = states(model, ids, batch)
    for index, layer in enumerate(layers):
        covariance = Covariance(owners(linears, index, prefix))
        with decoder.watch(layer, covariance.see):
            hidden = advance(layer, index, hidden, calls)
        for group, matrix in covariance.means().items():
            energy[group] = matrix.diagonal().clone()
            order = torch.argsort(energy[group], descending=True, stable=True)
            conditional[group] = torch.empty_like(energy[group])
            conditional[group][order] = factor(matrix[order][:, order]).diagonal().square().reciprocal()
        for linear in linears:
            if linear.layer == index and linear.group not in energy:
                raise WindquantError(
                    f"{linear.name}: no token of the calibration text reaches it, so nothing is known about its "
                    "inputs; raise calibration.samples"
                )
        update(1)
    return energy, conditional


def backward(
    model: nn.Module, linears: list[Linear], ids: Tensor, batch: int, update: Callable[[int], object]
) -> dict[str, Tensor]:
    """Fisher weight E[g_r^2] of every output row, g the gradient of the summed next-token loss."""
    prefix, layers = decoder.decoder_layers(model)
    wanted = {linear.name for linear in linears}
    fisher: dict[str, Tensor] = {}
    with torch.no_grad():
        hidden, calls = states(model, ids, batch)
        inputs = [hidden]
        for index, layer in enumerate(layers):
            inputs.append(advance(layer, index, inputs[-1], calls))
    gradients = [_loss_gradient(model, part, last) for part, last in zip(ids.split(batch), inputs[-1], strict=True)]
    for index in reversed(range(len(layers))):
        inputs.pop()
        for place, call in enumerate(calls):
            start = inputs[-1][place].detach().requires_grad_(True)
            outputs: dict[str, Tensor] = {}

            def see(name: str, _: Tensor, out: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
                outputs[name] = out

            with compute.autocast(), decoder.watch(layers[index], see):
                end = decoder.run_layer(layers[index], start, call[index])
            found = torch.autograd.grad(end, [start, *outputs.values()], gradients[place])
            gradients[place] = found[0]
            for name, gradient in zip(outputs, found[1:], strict=True):
                full = f"{prefix}.{index}.{name}"
                if full in wanted:
                    squares = gradient.float().flatten(0, -2).square().sum(0).cpu() / ids.numel()
                    fisher[full] = fisher.get(full, 0) + squares
        update(1)
    return fisher


def _loss_gradient(model: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of the summed next-token loss with respect to the last hidden state."""
    start = hidden.detach().requires_grad_(True)
    ids = ids.to(start.device)
    with compute.autocast():
        logits = decoder.head(model, ids, start)
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return torch.autograd.grad(loss, start)[0]


if __name__ == "__main__":
    step.main("statistics", run, Settings, inputs=("model", "calibration"))
