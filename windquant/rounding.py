"""Learned rounding: codes of scalar chunks move by a level where that brings a decoder layer closer to the original.

    python -m windquant.recovery --model DIR --calibration DIR --checkpoint DIR --output DIR --rounding 100

Error feedback rounds column after column, by the covariance of what a linear reads. This goes on from its codes with
the layer as a whole (signed gradients, as SignRound, arXiv 2309.05516): every code has a variable v in [-1, 1], the
layer computes with code + round(v), and a step moves all v by one rate against the sign of the gradient, which passes
straight through the rounding, of

    error = mean over the tokens of |f(x) - y|^2 / |y|^2.

f is the quantized layer, x what the quantized layers before it hand on, y what the original layer hands on. A weight is
scale (level + offset) with a positive scale, so the sign is that of the weight's gradient. Now and then the error is
measured on windows that no step takes; the v that were best there are kept, and round(v) = 0 is one of the choices.

Error feedback leaves no fraction of a code. So v begins where the original weight lies, in levels from the code, and at
0 where feedback has taken another level than the nearest. Did all begin at 0, all would cross in the same step.

The codes of a trellis cannot be moved one by one: each is part of several states. They stay as they are.

Memory: a decoder layer of both models, four more numbers for each of its weights, and the hidden states of the text.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from windquant import atomic, compute, decoder, kernels, step, streaming, tensor_file
from windquant.checkpoint.rewriting import rewrite
from windquant.divergence import divergence
from windquant.errors import WindquantError
from windquant.flow import Flow
from windquant.packed import Layout, Run, decode_scales
from windquant.presets import (
    ROUNDING_BATCH as BATCH,
    ROUNDING_BATCHES as BATCHES,
    ROUNDING_CHECKS as CHECKS,
    ROUNDING_JUDGES as JUDGES,
)
from windquant.progress import Progress
from windquant.quantizers import Treatment
from windquant.quantizers.scalar import Scalar
from windquant.scales import FLOOR
from windquant.storage import pack, unpack_rows
from windquant.tuning import drawn

LEVELS = 16  # of the chunks whose codes move; with more there is nothing to gain
TRAVEL = 0.5  # sum of the rates: how far a v goes whose gradient never turns
START = 0.9  # of the way to the original weight: at the beginning no code has moved yet


@dataclass(frozen=True)
class Outcome:
    """What became of a decoder layer."""

    before: float  # its error on the windows that no step takes
    after: float
    moved: int  # codes
    movable: int


def rounded(task: step.Task, original: Path, quantized: Path, windows: Tensor, held_out: Tensor, steps: int) -> Path:
    """The folder of the checkpoint with learned codes; `quantized` itself where that is no closer to the original.

    windows: int64 [n, length], to learn from; held_out: likewise, for the whole model. What is finished lies in the
    task's cache: an interrupted run does not learn it again.
    """
    layouts = streaming.open_source(quantized).layouts.values()
    if not any(learnable(entry) for layout in layouts for entry in layout.actions):
        print(
            "recovery.rounding: the checkpoint has no scalar chunks of up to 4 bits, so no code moves; "
            "units.treatment scalar or mixed makes some",
            file=sys.stderr,
            flush=True,
        )
        return quantized
    if len(windows) < 2:
        raise WindquantError(
            "recovery.rounding: needs two windows of the recovery split; give more text, or set it to 0"
        )
    ids = drawn(windows, (min(steps, BATCHES) + JUDGES) * BATCH, task.seed)
    files, outcomes = compute.with_smaller_batches(
        BATCH, lambda batch: learned(task, original, quantized, ids, steps, min(batch, len(ids) // 2))
    )
    folder = task.cache / "rounded"
    rewrite(quantized, folder, (item for file in files for item in tensor_file.load(file, "outcome")[0].items()))
    teacher = streaming.load(original)
    before, after = (divergence(streaming.load(one), teacher, held_out) for one in (quantized, folder))
    moved = sum(outcome.moved for outcome in outcomes) / sum(outcome.movable for outcome in outcomes)
    task.metrics(
        {"rounding_divergence_before": before, "rounding_divergence_after": after, "rounding_moved": moved}, None
    )
    task.note("rounding", {
        "divergence": {"before": before, "after": after, "kept": after < before},
        "layers": sum(outcome.moved > 0 for outcome in outcomes),
        "moved": moved,
        "errors": [[round(outcome.before, 7), round(outcome.after, 7)] for outcome in outcomes],
    })  # fmt: skip
    return folder if after < before else quantized


def learned(
    task: step.Task, original: Path, quantized: Path, ids: Tensor, steps: int, batch: int
) -> tuple[list[Path], list[Outcome]]:
    """A file of stored codes by tensor for every decoder layer, first to last, and the outcome of each."""
    teacher, student = streaming.load(original), streaming.load(quantized)
    prefix, layers = decoder.decoder_layers(student)
    source = streaming.open_source(quantized)
    found, exact = (Flow(model, ids, batch, task.output.parent) for model in (student, teacher))
    files: list[Path] = []
    outcomes: list[Outcome] = []
    progress: Progress[None] = task.progress(total=len(layers) * steps, label="rounding")
    with progress:
        for (index, layer), (_, other) in zip(streaming.walk(student), streaming.walk(teacher), strict=True):
            exact.through(other, index)
            linears = codes_of(layer, other, f"{prefix}.{index}.", source)
            file = task.cache / f"layer{index}.safetensors"
            try:
                stored, fields = tensor_file.load(file, "outcome")
                outcome = Outcome(**fields)
                progress.update(steps)
            except tensor_file.UNREADABLE:  # not learned yet, or damaged on the disk
                outcome = learn(Block(layer, index, found, exact), list(linears.values()), steps, progress.update)
                stored = {f"{name}.codes": codes.stored() for name, codes in linears.items()}
                with atomic.output(file) as path:
                    tensor_file.save(path, stored, "outcome", asdict(outcome))
            for name, codes in linears.items():
                codes.take(stored[f"{name}.codes"])
            found.through(layer, index)
            files.append(file)
            outcomes.append(outcome)
    return files, outcomes


def learnable(entry: Treatment) -> TypeGuard[Scalar]:
    """Whether an action's codes can be moved one by one, by steps that matter."""
    return isinstance(entry, Scalar) and entry.levels <= LEVELS


def codes_of(layer: nn.Module, original: nn.Module, prefix: str, source: streaming.Source) -> dict[str, "Codes"]:
    """The linears of a lent layer that have codes to learn, by their full names; original: the layer as it was."""
    linears = {prefix + name: child for name, child in layer.named_modules() if prefix + name in source.layouts}
    found = {}
    for name, layout, tensors, order in source.packed(linears):
        if any(map(learnable, layout.actions)):
            wanted = original.get_parameter(f"{name.removeprefix(prefix)}.weight")
            found[name] = Codes(layout, tensors, order, linears[name].weight, wanted)
    return found


class Codes:
    """The codes of one linear, at most a level from where they were stored."""

    def __init__(
        self, layout: Layout, tensors: Mapping[str, Tensor], order: Tensor, weight: nn.Parameter, wanted: Tensor
    ) -> None:
        """tensors: as stored, on the CPU; order: int64 [columns]; weight: decoded, [rows, columns], to change;
        wanted: the original one.
        """
        self.layout, self.tensors, self.order, self.weight = layout, tensors, order, weight
        self.decoded = weight.detach().clone()
        self.codes = torch.zeros(weight.shape, dtype=torch.uint8)
        scale = torch.zeros(weight.shape)
        top = torch.zeros(weight.shape[1], dtype=torch.uint8)
        scales = decode_scales(layout, tensors)
        for run, entry, columns in self.runs():
            self.codes[:, columns] = unpack_rows(self.part(run, tensors["codes"]), len(weight), entry.pattern)
            scale[:, columns] = scales[run.scale :][: len(run.chunks)].repeat_interleave(run.width, 0).T
            top[columns] = entry.levels - 1
        self.scale = scale.to(weight.device)  # what a level is worth; 0 where no code may move
        self.lowest = (self.codes > 0).to(weight.device, torch.int8).neg()
        self.highest = (self.codes < top).to(weight.device, torch.int8)
        gap = (wanted - self.decoded) / self.scale.clamp_min(FLOOR)  # in levels
        nearest = (gap.abs() <= 0.5) & (self.scale > 0)
        self.place = torch.where(nearest, START * gap, 0.0).clamp(self.lowest, self.highest)  # v
        self.best = torch.zeros_like(self.lowest)  # round(v) at its best
        weight.requires_grad_(True)

    def runs(self) -> Iterator[tuple[Run, Scalar, Tensor]]:
        """The runs whose codes may move, their actions, and the columns of the weight in the order of storage."""
        for run in self.layout.runs:
            if learnable(run.entry):
                yield run, run.entry, torch.cat([self.order[column : column + run.width] for column in run.columns])

    @staticmethod
    def part(run: Run, codes: Tensor) -> Tensor:
        """A run's own codes, uint8 [columns, bytes], of a linear's."""
        return codes[run.place :][: len(run.chunks) * run.width * run.stride].view(-1, run.stride)

    @torch.no_grad()
    def move(self, gradient: Tensor, rate: float) -> None:
        """Follow the signs of the weight's gradient [rows, columns]."""
        torch.clamp(self.place.sub_(gradient.sign(), alpha=rate), self.lowest, self.highest, out=self.place)
        torch.addcmul(self.decoded, self.scale, self.place.round(), out=self.weight)

    def keep(self) -> None:
        """The codes as they are now are the best so far."""
        self.best = self.place.round().to(torch.int8)

    def stored(self) -> Tensor:
        """The best codes, packed: uint8 [bytes], on the CPU."""
        result = self.tensors["codes"].clone()
        codes = (self.codes + self.best.cpu()).to(torch.uint8)
        for run, entry, columns in self.runs():
            self.part(run, result).copy_(pack(codes[:, columns].T.contiguous(), entry.pattern))
        return result

    @torch.no_grad()
    def take(self, codes: Tensor) -> None:
        """Give the weight what the packed codes [bytes] stand for; it is learned no more."""
        device = self.weight.device
        tensors = {part: value.to(device) for part, value in {**self.tensors, "codes": codes}.items()}
        self.weight.requires_grad_(False)
        self.weight.copy_(kernels.decode(self.layout, tensors, self.order.to(device), self.weight.dtype))


@dataclass(frozen=True)
class Block:
    """A decoder layer between what it is given and what it should hand on, batch by batch."""

    layer: nn.Module
    index: int
    found: Flow  # in front of the layer
    exact: Flow  # behind the original one

    def error(self, place: int) -> Tensor:
        """Of a batch: a scalar."""
        wanted = self.exact.states.get(place, self.exact.device).float()
        given = self.found.states.get(place, self.found.device)
        with self.found.precision():
            handed = decoder.run_layer(self.layer, given, self.found.calls[place][self.index])
        size = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return ((handed.float() - wanted).square().sum(-1) / size).mean()

    @torch.no_grad()
    def mean_error(self, places: range) -> float:
        return sum(self.error(place).item() for place in places) / len(places)


def learn(block: Block, linears: list[Codes], steps: int, update: Callable[[int], object]) -> Outcome:
    """Move the codes of a decoder layer by `steps` of a batch each; the last batches judge."""
    batches = len(block.found.calls)
    judges = range(batches - max(1, min(JUDGES, batches // 4)), batches)
    before = best = block.mean_error(judges)
    if not linears:
        update(steps)
        return Outcome(before, before, 0, 0)
    for number in range(steps):
        gradients = torch.autograd.grad(block.error(number % judges.start), [codes.weight for codes in linears])
        for codes, gradient in zip(linears, gradients, strict=True):
            codes.move(gradient, 2 * TRAVEL / (steps + 1) * (1 - number / steps))  # falls linearly, sums up to TRAVEL
        # after every CHECKS-th part of the steps, the last one included
        if (number + 1) * CHECKS // steps > number * CHECKS // steps and (now := block.mean_error(judges)) < best:
            best = now
            for codes in linears:
                codes.keep()
        update(1)
    moved = sum(int(codes.best.count_nonzero()) for codes in linears)
    return Outcome(before, best, moved, sum(int((codes.scale > 0).sum()) for codes in linears))
