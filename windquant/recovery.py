"""Recover: codes and bits frozen, scales and norms tuned by distillation from the original model.

    python -m windquant.recovery --model DIR --calibration DIR --checkpoint DIR --output DIR --steps 60

Each step takes one window of the recovery split and lowers the KL divergence of the quantized model's next-token
distribution from the original's. What is trained is one log-gain per row and chunk (end-to-end tuning of the scales
alone, EfficientQAT arXiv 2407.11062) and the norms. In the second half of the steps the model computes with the gains
as they will be stored, rounded to the grid of the scales' codes, and their gradients pass straight through: what
rounding costs is trained away, and the checkpoint takes exactly as many bytes as before.

The original is walked through once, before the first step (original.py). Where the quantized model does not fit into
memory with its gradients, the same steps go layer by layer (layerwise.py). Before all that `--rounding 100` moves codes
of scalar chunks (rounding.py).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from windquant import calibration, compute, decoder, memory, models, presets, rounding, step, streaming
from windquant.checkpoint.linear import PackedLinear
from windquant.checkpoint.rewriting import rewrite
from windquant.divergence import BATCH
from windquant.errors import WindquantError
from windquant.gains import GainLinear, regain, stored_gain
from windquant.layerwise import Streamed
from windquant.original import Original
from windquant.progress import Progress
from windquant.settings import Natural, Rate
from windquant.training import Training
from windquant.tuning import Tuning, drawn, norms_of

PASSES = 2  # through the text, beyond which recovery learns it by heart (docs/decisions.md)


@dataclass(frozen=True)
class Settings:
    preset: Literal["light", "standard", "full"] = "light"  # 80, 400, 2000 steps; an EPYC takes 4, 18, about 80 minutes
    # Layer by layer takes the memory of one, and more time; what is recovered is the same
    scope: Literal["auto", "model", "layers"] = "auto"  # what is in memory; auto: the whole model where it fits
    steps: Natural | None = None  # distillation steps of one window each; none: the preset's; 0: the model stays
    text: Literal["recovery", "all"] = "recovery"  # split it learns from; all: the calibration split as well
    # Rates are multiplied by the divergence before recovery, of at most one nat: the less there is to recover, the less
    # a step may destroy
    gain_rate: Rate = 6e-3  # learning rate of the log-gains, per nat of divergence
    norm_rate: Rate = 3e-3  # learning rate of the norms, per nat of divergence
    warmup: Natural = 5  # steps until the full rate; it falls as a cosine from there
    # Before the distillation, by signed gradients; the codes of a trellis stay
    rounding: Natural = 0  # steps for every decoder layer that move codes of scalar chunks of up to 4 bits; 0: none


def run(task: step.Task, settings: Settings) -> None:
    original, quantized = task.inputs["model"], task.inputs["checkpoint"]
    texts = calibration.load(task.inputs["calibration"])
    steps = presets.recovery_steps(settings.preset, settings.steps)
    text = learned_from(texts) if settings.text == "all" else texts.recovery.long()
    windows, held_out = drawn(text, steps, task.seed), texts.reward.long()
    if (passes := steps / len(text)) > PASSES:
        print(
            f"recovery: {steps} steps pass {passes:.1f} times through its text and will learn it by heart; take fewer "
            "(recovery.steps), or give it more text (recovery.text, calibration.source, calibration.recovery_samples)",
            file=sys.stderr,
            flush=True,
        )
    if settings.rounding:
        quantized = rounding.rounded(task, original, quantized, text, held_out, settings.rounding)
    scope = settings.scope
    if scope == "auto":
        size = memory.RECOVERY * streaming.open_source(original).parameters
        scope = "model" if memory.fits(size) else "layers"

    def walked(batch: int) -> Original:
        source = Original(original, windows, held_out, batch, task.output.parent)
        for _ in task.progress(source.walk(), total=source.depth, label="original"):
            pass
        return source

    source = compute.with_smaller_batches(BATCH, walked)

    def recovered(scope: str) -> tuple[dict[str, Tensor], float, float, list[float]]:
        """What changes in the checkpoint, the divergence before and after it, and the curve."""
        model = (Whole if scope == "model" else Streamed)(source, quantized)
        nats = min(1.0, model.before)
        tuning = Tuning(steps, settings.gain_rate * nats, settings.norm_rate * nats, settings.warmup)
        curve = distill(task, model, tuning)
        changes = stored(quantized, model)
        return changes, model.before, model.divergence(), curve

    found = None
    try:
        found = recovered(scope)
    except torch.OutOfMemoryError as error:
        reason = models.first_line(error).partition(". ")[0]
        if scope == "layers":
            raise WindquantError(
                f"out of GPU memory with one layer ({reason}); use a GPU with more, or the CPU"
            ) from error
        print(f"out of GPU memory ({reason}): again layer by layer", file=sys.stderr, flush=True)
    if found is None:  # outside of `except`: the error holds what filled the GPU
        scope = "layers"
        found = recovered(scope)
    changes, before, after, curve = found
    task.metrics({"divergence_before": before, "divergence_after": after}, None)
    # a diverged or useless tuning is dropped whole
    measured = rewrite(quantized, task.output, changes.items() if after < before else ())
    task.note("scope", scope)
    task.note("divergence", {"before": before, "after": after, "kept": after < before})
    task.note("curve", [round(value, 5) for value in curve])
    task.note("effective_bits", measured.effective_bits)
    task.note("checkpoint_bits", measured.checkpoint_bits)
    task.note("measured_bytes", measured.measured_bytes)


def learned_from(texts: calibration.Calibration) -> Tensor:
    """The windows of recovery, and the calibration split cut into as long ones: int64 [n, length].

    A token that begins every sample (BOS) begins every window and stands nowhere else.
    """
    first = texts.calibration[:, :1]
    begins = int((first == first[0]).all())
    tokens, length = texts.calibration[:, begins:].flatten(), texts.recovery.shape[1] - begins
    more = tokens[: len(tokens) // length * length].view(-1, length)
    return torch.cat([texts.recovery, torch.cat([first[:1, :begins].expand(len(more), -1), more], 1)]).long()


class Whole:
    """A quantized model with gains, in memory as a whole."""

    def __init__(self, original: Original, quantized: Path) -> None:
        """quantized: folder."""
        self.original, self.student = original, compute.move(models.load(quantized))
        self.gains, self.norms = trainable(self.student)
        self.rounding = False
        self.before = self.divergence()

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean divergence from the original on the held-out windows."""
        flow = self.original.flow(self.student)
        for index, layer in streaming.walk(self.student):
            flow.through(layer, index)
        return self.original.divergence(self.student, flow)

    def learn(self, place: int) -> Tensor:
        """The divergence on a window, in nats per token; its gradients are left at gains and norms."""
        for module in self.student.modules():
            if isinstance(module, GainLinear):
                module.rounding = self.rounding
        ids = self.original.windows[place][None].to(compute.device())
        with compute.autocast():
            hidden, calls = decoder.embed(self.student, ids)
            for index, layer in streaming.walk(self.student):
                hidden = decoder.run_layer(layer, hidden, calls[index])
        loss, gradient = self.original.gradient(self.student, place, hidden)
        if loss.isfinite():
            torch.autograd.backward(hidden, gradient)
        return loss


def trainable(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Log-gains by linear and norm weights by parameter name; the model's packed linears become GainLinears."""
    dtype = torch.bfloat16 if compute.native_bfloat16() else torch.float32
    gains: dict[str, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            replacement = GainLinear.of(module, dtype)
            model.set_submodule(name, replacement)
            gains[name] = replacement.gain
    norms = norms_of(model)
    for value in norms.values():
        value.requires_grad_(True)
    return gains, norms


def distill(task: step.Task, model: Whole | Streamed, tuning: Tuning) -> list[float]:
    """Train gains and norms in place; goes on from the last training checkpoint in the task's cache.

    A tuning that diverges is stopped and its best state restored. Returns the divergence of every step's window,
    before that step, in nats per token.
    """
    training = Training(tuning, model.gains, model.norms, task.cache)
    progress: Progress[None] = task.progress(total=tuning.steps, label="recovery")
    with progress:
        progress.update(len(training.curve))
        for index in range(len(training.curve), tuning.steps):
            training.begin()
            model.rounding = index >= tuning.steps // 2  # from here on with the gains as they will be stored
            loss = model.learn(index % len(model.original.windows)).item()
            if training.diverges(loss):
                training.restore_best()
                task.note("stopped", index + 1)
                print(
                    f"recovery diverges at step {index + 1} ({loss:.3g} nats): it is stopped and its best state kept; "
                    "lower recovery.gain_rate or recovery.norm_rate",
                    file=sys.stderr,
                    flush=True,
                )
                break
            training.step(loss)
            task.metric("recovery_divergence", loss, index)
            progress.update(1)
    return training.curve


@torch.no_grad()
def stored(quantized: Path, model: Whole | Streamed) -> dict[str, Tensor]:
    """What the checkpoint stores of gains and norms, by tensor; the model then computes with these gains."""
    source = streaming.open_source(quantized)
    for name, norm in model.norms.items():
        norm.copy_(norm.to(source.entries[name].dtype))  # rounded as the file will hold it
    changes = {name: norm.detach().cpu() for name, norm in model.norms.items()}
    for name, layout in source.layouts.items():
        before = {part: source.tensor(f"{name}.{part}") for part in ("scales", "scale_grid")}
        after = regain(layout, before, model.gains[name].cpu())
        model.gains[name].copy_(stored_gain(layout, before, after))
        changes[f"{name}.scales"] = after["scales"]
    return changes


if __name__ == "__main__":
    step.main("recovery", run, Settings, inputs=("model", "calibration", "checkpoint"))
