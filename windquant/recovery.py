"""Recover: codes and bits frozen, scales and norms tuned by distillation from the original model.

    python -m windquant.recovery --model DIR --calibration DIR --checkpoint DIR --output DIR --steps 60

Each step takes one window of the recovery split and lowers the KL divergence of the quantized model's next-token
distribution from the original's. What is trained is one log-gain per row and chunk (end-to-end tuning of the scales
alone, EfficientQAT arXiv 2407.11062) and the norms. In the second half of the steps the model computes with the gains
as they will be stored, rounded to the grid of the scales' codes, and their gradients pass straight through: what
rounding costs is trained away, and the checkpoint takes exactly as many bytes as before.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from windquant import atomic, calibration, checkpoint, compute, models, presets, step
from windquant.checkpoint.linear import PackedLinear
from windquant.packed import SCALE_BITS, Layout
from windquant.progress import Progress
from windquant.storage import pack, unpack

SAVE_EVERY = 20  # steps between two training checkpoints


@dataclass(frozen=True)
class Settings:
    preset: Literal["light", "standard", "full"] = "light"  # 80, 400 or 2000 steps: 3 or 15 minutes on two cores, a GPU
    steps: int | None = None  # distillation steps of one window each; none: the preset's; 0: the model stays as it is
    gain_rate: float = 6e-3  # learning rate of the log-gains
    norm_rate: float = 2e-3  # learning rate of the norms
    warmup: int = 5  # steps until the full rate; it falls as a cosine from there


def run(task: step.Task, settings: Settings) -> None:
    packed = checkpoint.read(task.inputs["checkpoint"])
    texts = calibration.load(task.inputs["calibration"])
    teacher = compute.move(models.load(task.inputs["model"]))
    student = compute.move(models.load(task.inputs["checkpoint"]))
    gains, norms = trainable(student)
    held_out = texts.reward.long()
    before = divergence(student, teacher, held_out)
    state = {name: value.detach().clone() for name, value in (gains | norms).items()}
    steps = presets.recovery_steps(settings.preset, settings.steps)
    curve = distill(task, student, teacher, gains, norms, texts.recovery.long(), steps, settings)
    tensors = {}
    for name, layout in packed.layouts.items():
        tensors[name] = regain(layout, packed.tensors[name], gains[name].detach().cpu())
        gains[name].data.copy_(stored_gain(layout, packed.tensors[name], tensors[name]))
    after = divergence(student, teacher, held_out)
    task.metrics({"divergence_before": before, "divergence_after": after}, None)
    if not after < before:  # a diverged or useless tuning is dropped whole
        tensors = {name: dict(entry) for name, entry in packed.tensors.items()}
        for name, value in (gains | norms).items():
            value.data.copy_(state[name])
    task.note("divergence", {"before": before, "after": after, "kept": after < before})
    task.note("curve", [round(value, 5) for value in curve])
    for name, value in norms.items():
        teacher.get_parameter(name).data.copy_(value.detach())
    measured = checkpoint.write(task.output, teacher.cpu(), packed.layouts, tensors, packed.plan, task.inputs["model"])
    if measured.measured_bytes != packed.plan.bytes:
        raise RuntimeError(f"the checkpoint takes {measured.measured_bytes} bytes, the plan says {packed.plan.bytes}")
    task.note("effective_bits", measured.effective_bits)
    task.note("checkpoint_bits", measured.checkpoint_bits)
    task.note("measured_bytes", measured.measured_bytes)


class _Scaled(torch.autograd.Function):
    """weight [rows, slots, chunk] * exp(gain [rows, slots]); keeps no more than the product for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor) -> Tensor:
        scaled = weight * gain.exp().to(weight.dtype)[..., None]
        ctx.save_for_backward(scaled)
        return scaled.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (scaled,) = ctx.saved_tensors
        # d weight exp(g) / d g = weight exp(g)
        return None, (gradients[0].view_as(scaled) * scaled).sum(-1, dtype=torch.float32)


class _Slotted(torch.autograd.Function):
    """x [..., columns] -> [..., slots * chunk]; the gradient goes the way back without adding anything up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return F.pad(x, (0, 1)).index_select(-1, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(-1, ctx.saved_tensors[0]), None, None


class GainLinear(nn.Module):
    """A decoded linear with one trainable log-gain per row and chunk.

    Columns stand in slots of `chunk` columns, in column order, so that gains and their gradients need no gather; the
    protected columns take slots of their own, whose gain stays zero, as that of skipped chunks does, and what is left
    of a slot holds zeros.
    """

    rounding = False  # whether to compute with the gains as they will be stored

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        layout = packed.layout
        rows, columns, chunk = layout.linear.rows, layout.linear.columns, layout.format.chunk
        parts = list(packed.get_buffer("column_order").cpu().split([layout.protected, *layout.widths]))
        parts = [*parts[0].split(chunk), *parts[1:]] if layout.protected else parts[1:]
        slots = torch.stack([F.pad(part, (0, chunk - len(part)), value=columns) for part in parts])
        weight = F.pad(packed.weight.float(), (0, 1))[:, slots]
        self.fixed = len(slots) - len(layout.widths)  # slots of protected columns
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("slots", slots.flatten().to(weight.device))  # column at each place; `columns` is empty
        self.register_buffer("place", slots.flatten().argsort()[:columns].to(weight.device))  # of each column
        self.bias = packed.bias
        scaled = torch.tensor([entry.has_scale for entry in layout.actions])
        self.register_buffer("scaled", scaled.float().to(weight.device))  # skipped chunks have no scale to tune
        codes = torch.zeros(rows, len(layout.widths))
        codes[:, _scaled(layout)] = _scale_codes(layout, packed.tensors).T.cpu()
        self.register_buffer("codes", codes.to(weight.device))  # of the scales, [rows, chunks]
        self.register_buffer("step", _code_step(packed.tensors))
        self.gain = nn.Parameter(torch.zeros_like(codes, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        gain: Tensor = self.gain
        if self.rounding:
            codes, step_size = self.get_buffer("codes"), self.get_buffer("step")
            stored = (_moved(codes, gain, step_size) - codes) * step_size
            gain = gain + (stored - gain).detach()  # straight through
        gain = F.pad(gain * self.get_buffer("scaled"), (self.fixed, 0))
        slotted = _Slotted.apply(x, self.slots, self.place)
        return F.linear(slotted, _Scaled.apply(self.weight, gain), self.bias)


def trainable(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Log-gains by linear and norm weights by parameter name; the model's packed linears become GainLinears."""
    dtype = torch.bfloat16 if compute.native_bfloat16() else torch.float32
    gains: dict[str, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            parent, _, child = name.rpartition(".")
            replacement = GainLinear(module, dtype)
            setattr(model.get_submodule(parent), child, replacement)
            gains[name] = replacement.gain
    norms = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for key, value in module.named_parameters(recurse=False)
    }
    for value in norms.values():
        value.requires_grad_(True)
    return gains, norms


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits [..., vocabulary], mean over the positions, nats."""
    return F.kl_div(
        F.log_softmax(student.float().flatten(0, -2), -1),
        F.log_softmax(teacher.float().flatten(0, -2), -1),
        log_target=True,
        reduction="batchmean",
    )


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module, ids: Tensor) -> float:
    """Mean KL divergence of the student from the teacher on ids [n, length]."""
    total = 0.0
    for part in ids.split(4):
        part = part.to(compute.device())
        with compute.autocast():
            total += len(part) * kl_divergence(_logits(student, part), _logits(teacher, part)).item()
    return total / len(ids)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def distill(
    task: step.Task,
    student: nn.Module,
    teacher: nn.Module,
    gains: Mapping[str, nn.Parameter],
    norms: Mapping[str, nn.Parameter],
    windows: Tensor,
    steps: int,
    settings: Settings,
) -> list[float]:
    """Train gains and norms in place; goes on from the last training checkpoint in the task's cache.

    Returns the divergence of every step's window, before that step, in nats per token.
    """
    groups = [
        {"params": list(gains.values()), "lr": settings.gain_rate},
        {"params": list(norms.values()), "lr": settings.norm_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = {f"gain:{name}": value for name, value in gains.items()}
    parameters |= {f"norm:{name}": value for name, value in norms.items()}
    linears = [module for module in student.modules() if isinstance(module, GainLinear)]
    draw = torch.randperm(len(windows), generator=torch.Generator().manual_seed(task.seed))
    curve = _resume(task.cache, parameters, optimizer)
    progress: Progress[None] = task.progress(total=steps, label="recovery")
    with progress:
        progress.update(len(curve))
        for index in range(len(curve), steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(index, steps, settings.warmup)
            for linear in linears:
                linear.rounding = index >= steps // 2
            ids = windows[draw[index % len(draw)]][None].to(compute.device())
            with compute.autocast():
                with torch.no_grad():
                    target = _logits(teacher, ids)
                loss = kl_divergence(_logits(student, ids), target)
            if not loss.isfinite():
                break  # the check against the untuned model decides what is kept
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
            task.metric("recovery_divergence", curve[-1], index)
            progress.update(1)
            if (index + 1) % SAVE_EVERY == 0:
                _save(task.cache, curve, parameters, optimizer)
    return curve


def schedule(index: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine to zero."""
    return min(1.0, (index + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * index / steps))


def _save(folder: Path, curve: list[float], parameters: Mapping[str, Tensor], optimizer: torch.optim.Adam) -> None:
    tensors = {f"value:{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        tensors |= {f"{key}:{name}": entry for key, entry in optimizer.state[value].items()}
    with atomic.output(folder / "state.safetensors") as path:
        save_file(tensors, path, {"curve": json.dumps(curve)})


def _resume(folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Adam) -> list[float]:
    """The curve of an interrupted run, a value per finished step; its parameters and optimizer state are restored."""
    path = folder / "state.safetensors"
    if not path.exists():
        return []
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            curve: list[float] = json.loads(file.metadata()["curve"])
    except (OSError, SafetensorError):  # damaged on the disk: start over
        return []
    for name, value in parameters.items():
        value.data.copy_(tensors[f"value:{name}"])
        moments = {key: tensors[f"{key}:{name}"].to(value.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[value] = {"step": tensors[f"step:{name}"], **moments}  # Adam counts on the CPU
    return curve


def regain(layout: Layout, tensors: Mapping[str, Tensor], gain: Tensor) -> dict[str, Tensor]:
    """The stored tensors with log-gains [rows, chunks] rounded into the scales' codes."""
    result = dict(tensors)
    moved = _moved(_scale_codes(layout, tensors), gain[:, _scaled(layout)].T, _code_step(tensors)).to(torch.uint8)
    result["scales"] = pack(moved, (SCALE_BITS, SCALE_BITS)) if len(moved) else tensors["scales"]
    return result


def stored_gain(layout: Layout, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    """The log-gains [rows, chunks] that the codes of `after` make on `before`."""
    gain = torch.zeros(layout.linear.rows, len(layout.widths))
    change = _scale_codes(layout, after) - _scale_codes(layout, before)
    gain[:, _scaled(layout)] = change.T * _code_step(after)
    return gain


def _moved(codes: Tensor, gain: Tensor, step_size: Tensor) -> Tensor:
    """The codes of scales that are exp(gain) times as large."""
    return (codes + gain / step_size).round().clamp(0, 2**SCALE_BITS - 1)


def _code_step(tensors: Mapping[str, Tensor]) -> Tensor:
    """Log-gain of one step of the scales' codes."""
    return tensors["scale_grid"][1].float() * math.log(2)


def _scaled(layout: Layout) -> list[int]:
    """The chunks that have scales, in storage order."""
    return [chunk for chunk in layout.storage_order if layout.actions[chunk].has_scale]


def _scale_codes(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """float32 [chunks with scales, rows], in storage order."""
    return unpack(tensors["scales"], layout.linear.rows, (SCALE_BITS, SCALE_BITS)).float()


if __name__ == "__main__":
    step.main("recovery", run, Settings, inputs=("model", "calibration", "checkpoint"))
