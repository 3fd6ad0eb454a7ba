"""What each part of a scalar quantizer is worth at equal effective bits: an ablation on real decoder layers.

    python -m benchmarks.scalars                        # after `make run`; half an hour of one core
    python -m benchmarks.scalars --layers 1 --bits 2

All linears of some layers are quantized with one width everywhere, and their errors e are judged on the reward split,
which neither covariances nor scales have seen: 1/2 sum_r f_r e_r^T H e_r, in nats per token, with the Fisher weights f.
Rows differ in metadata too, so the table also has that error at the bits of its first row: a bit more takes it to a
quarter (rate-distortion theory), so it is multiplied by 4^(bits - bits of the first row).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir

import torch
from torch import Tensor

from windquant import calibration, decoder, streaming
from windquant.feedback import column_order, damping, factor, rotate
from windquant.flow import Flow
from windquant.quantizers import Fit, action
from windquant.quantizers.rotation import rotation
from windquant.quantizers.scalar import Scalar
from windquant.scales import ScaleCoder, decode_offset, encode_offset
from windquant.statistics import Covariance, Statistics, owners
from windquant.units import Linear, chunk_widths, protected_count

Fitting = Callable[[Scalar, Tensor, Tensor], Fit]  # treatment, chunk [rows, width], energy [width]


@dataclass(frozen=True)
class Recipe:
    name: str
    entry: Scalar
    fit: Fitting = Scalar.fit
    chunk: int = 192
    scale_bits: int = (
        4  # 4: as stored by windquant, beside what rows and chunks share; 16: FP16; else a grid of so many
    )
    offset_bits: int = 8
    centred: bool = False  # the offset makes up for what rounding the scale has moved it
    feedback: bool = True
    order: str = "saliency"  # or natural, ascending
    book: bool = False  # levels that the rows of a chunk share, in place of equidistant ones
    protected: float = 0.0  # share of columns in INT8
    wide: int = 0  # of a chunk's salient columns that take 8 bits: the first ones, all rows
    residual: float = 0.0  # share of columns, the most salient ones, whose error is binarized once more


@dataclass(frozen=True)
class Subject:
    """A linear, and what is known of its inputs and outputs."""

    linear: Linear
    weight: Tensor  # float32 [rows, columns]
    seen: Tensor  # H = E[x x^T], of which errors are fed back
    unseen: Tensor  # H of other text, which judges
    fisher: Tensor  # [rows]


def recipes(bits: int) -> list[Recipe]:
    """The first one is windquant's own."""
    entry = action(f"scalar-{bits}", 12, torch.float16)
    assert isinstance(entry, Scalar)
    own = Recipe("as it is: joint search of scale and offset, 4-bit scales, 8-bit offsets", entry)
    plain = replace(entry, has_offset=False)
    found = [
        own,
        replace(own, name="smallest and largest weight", fit=extremes),
        replace(own, name="clips searched, no least squares", fit=clipped),
        replace(own, name="least squares that know no energies", fit=unweighted),
        replace(own, name="no offset", entry=plain, offset_bits=0),
        replace(own, name="scales and offsets in FP16", scale_bits=16, offset_bits=16),
        *(replace(own, name=f"scales in {n} bits", scale_bits=n) for n in (3, 6, 8)),
        replace(own, name="offsets in 4 bits", offset_bits=4),
        replace(own, name="offsets in units of the rounded scales", centred=True),
        replace(own, name="chunks of 64 columns", chunk=64),
        replace(own, name="no error feedback", feedback=False),
        replace(own, name="natural order of columns", order="natural"),
        replace(own, name="least salient columns first", order="ascending"),
        replace(own, name="rotated", entry=replace(entry, rotated=True)),
        replace(own, name="rotated, no offset", entry=replace(plain, rotated=True), offset_bits=0),
        replace(own, name="levels shared by a chunk", entry=plain, offset_bits=0, book=True),
        replace(own, name="3 % protected columns in INT8", protected=0.03),
        replace(own, name="the 64 most salient columns in 8 bits", wide=64),
    ]
    if bits == 1:
        found.append(replace(own, name="residual of the 10 % most salient columns", residual=0.1))
    return found


def extremes(entry: Scalar, chunk: Tensor, energy: Tensor) -> Fit:
    """The lowest level is the smallest weight of a row, the highest the largest."""
    return _between(entry, chunk, 1.0)


def clipped(entry: Scalar, chunk: Tensor, energy: Tensor) -> Fit:
    """The best of some shares of that range, about its middle."""
    fits = [_between(entry, chunk, share) for share in torch.linspace(0.35, 1.0, 12).tolist()]
    errors = torch.stack([((chunk - _nearest(levels(entry, fit), chunk)).square() * energy).sum(1) for fit in fits])
    best = errors.argmin(0)[None]
    scale, offset = (torch.stack(values).gather(0, best)[0] for values in zip(*map(_pair, fits), strict=True))
    return Fit(scale, offset if entry.has_offset else None)


def unweighted(entry: Scalar, chunk: Tensor, energy: Tensor) -> Fit:
    return entry.fit(chunk, torch.ones_like(energy))


def _between(entry: Scalar, chunk: Tensor, share: float) -> Fit:
    low, high = chunk.amin(1), chunk.amax(1)
    if not entry.has_offset:
        high = torch.maximum(high, -low)
        low = -high
    scale = (high - low).clamp_min(1e-8) / (entry.levels - 1)
    return Fit(scale * share, (high + low) / 2 / (scale * share) if entry.has_offset else None)


def _pair(fit: Fit) -> tuple[Tensor, Tensor]:
    return fit.scale, torch.zeros_like(fit.scale) if fit.offset is None else fit.offset


def levels(entry: Scalar, fit: Fit) -> Tensor:
    """What the codes of every row stand for, [rows, levels]."""
    scale, offset = _pair(fit)
    return (torch.arange(entry.levels) - entry.middle + offset[:, None]) * scale[:, None]


def shared_levels(entry: Scalar, chunk: Tensor, energy: Tensor, scale: Tensor) -> Tensor:
    """Lloyd's levels of a chunk's weights in units of their rows' scales; [rows, levels]."""
    values = (chunk / scale[:, None]).flatten()
    weights = (scale.square()[:, None] * energy).flatten()
    book = torch.arange(entry.levels) - entry.middle
    for _ in range(10):
        code = (values[:, None] - book).abs().argmin(1)
        total = torch.zeros(entry.levels).index_add_(0, code, weights)
        book = torch.zeros(entry.levels).index_add_(0, code, weights * values) / total.clamp_min(1e-30)
        book = book.sort().values
    return book * scale[:, None]


def _nearest(values: Tensor, weights: Tensor) -> Tensor:
    """The nearest of values [rows, levels] to weights [rows, columns]."""
    code = (weights[:, :, None] - values[:, None]).abs().argmin(2)
    return values.gather(1, code)


class Scales:
    """Stores scales as a recipe says."""

    def __init__(self, recipe: Recipe, expected: Tensor) -> None:
        """expected: scales [rows, chunks] before any feedback."""
        self.bits, self.coder = recipe.scale_bits, ScaleCoder.fit(expected)
        rest = expected.log2() - self.coder.row_logs[:, None]
        self.low, self.high = rest.min(), rest.max()

    def stored(self, scale: Tensor) -> Tensor:
        if self.bits == 16:
            return scale.half().float()
        if self.bits == 4:
            return self.coder.decode(*self.coder.encode(scale))
        step = (self.high - self.low).clamp_min(1e-6) / (2**self.bits - 1)
        code = ((scale.log2() - self.coder.row_logs - self.low) / step).round().clamp(0, 2**self.bits - 1)
        return torch.exp2(self.coder.row_logs + self.low + code * step)


def quantized(subject: Subject, recipe: Recipe) -> tuple[Tensor, float]:
    """The decoded weight [rows, columns] and the effective bits of a linear."""
    entry, linear = recipe.entry, subject.linear
    energy = subject.seen.diagonal()
    protected = protected_count(linear.columns, recipe.protected)
    order = column_order(-energy if recipe.order == "ascending" else energy, recipe.order, recipe.chunk, protected)
    widths = chunk_widths(linear.columns, protected, recipe.chunk)
    starts = [protected + sum(widths[:index]) for index in range(len(widths))]
    blocks = list(zip(starts, widths, strict=True))
    feedback = factor(rotate(subject.seen[order][:, order], blocks if entry.rotated else []), damping(energy))
    if not recipe.feedback:
        feedback = torch.eye(linear.columns)
    work, energy = subject.weight[:, order].clone(), energy[order]
    turns = {width: rotation(width) if entry.rotated else torch.eye(width) for width in widths}
    for start, width in blocks:
        work[:, start : start + width] = work[:, start : start + width] @ turns[width]
    fits = [recipe.fit(entry, work[:, start : start + width], energy[start : start + width]) for start, width in blocks]
    scales = Scales(recipe, torch.stack([fit.scale for fit in fits], 1))
    twice = set(energy.argsort(descending=True)[: round(recipe.residual * linear.columns)].tolist())
    decoded = torch.empty_like(work)

    def settle(column: int, value: Tensor) -> None:
        """Fix a column, and spread its error over those behind it."""
        decoded[:, column] = value
        error = (work[:, column] - value) / feedback[column, column]
        work[:, column + 1 :] -= error[:, None] * feedback[column, column + 1 :]

    def in_eight_bits(column: int) -> None:
        scale = (work[:, column].abs().max() / 127).clamp_min(2.0**-24)
        settle(column, (work[:, column] / scale).round() * scale)

    for column in range(protected):
        in_eight_bits(column)
    for start, width in blocks:
        chunk, around = work[:, start : start + width], energy[start : start + width]
        fit = recipe.fit(entry, chunk, around)
        scale, offset = scales.stored(fit.scale), fit.offset
        if offset is not None and recipe.centred:
            offset = offset * fit.scale / scale
        if offset is not None and recipe.offset_bits < 16:
            coarse = 2 ** (8 - recipe.offset_bits)
            offset = decode_offset(encode_offset(offset / coarse, entry.levels), entry.levels) * coarse
        values = levels(entry, Fit(scale, offset))
        if recipe.book:
            values = shared_levels(entry, chunk, around, scale)
        finer = values
        if salient := [column - start for column in range(start, start + width) if column in twice]:
            rest = (chunk[:, salient] - _nearest(values, chunk[:, salient])).abs().mean(1, keepdim=True)
            finer = torch.cat([values - rest, values + rest], 1)
        for column in range(start, start + width):
            if column < protected + recipe.wide:
                in_eight_bits(column)
                continue
            settle(column, _nearest(finer if column in twice else values, work[:, column, None])[:, 0])
    for start, width in blocks:
        decoded[:, start : start + width] = decoded[:, start : start + width] @ turns[width].T
    result = torch.empty_like(decoded)
    result[:, order] = decoded
    return result, effective_bits(recipe, linear, len(widths), protected)


def effective_bits(recipe: Recipe, linear: Linear, chunks: int, protected: int) -> float:
    """Codes, scales, offsets, shared levels and what rows share; the columns' order is the same for all."""
    rows, columns = linear.rows, linear.columns
    wide = protected + recipe.wide
    total = recipe.entry.bits * rows * (columns - wide) + wide * (8 * rows + 16)
    total += chunks * rows * (recipe.scale_bits + recipe.offset_bits)
    if recipe.residual:  # a bit, and a scale of eight bits per row in every chunk that may hold such columns
        total += rows * (round(recipe.residual * columns) + 8 * chunks)
    total += 16 * chunks * recipe.entry.levels * recipe.book
    if recipe.scale_bits < 16:
        total += 8 * rows + 16 * chunks
    return total / (rows * columns)


@torch.no_grad()
def subjects(root: Path, model: str, layers: list[int], windows: int) -> list[Subject]:
    """The linears of some layers of the original model."""
    statistics = Statistics.load(root / "data" / "statistics" / f"{model}.safetensors")
    texts = calibration.load(root / "data" / "calibration" / model)
    original = streaming.load(root / "resources" / "models" / model)
    prefix, _ = decoder.decoder_layers(original)
    flows = [Flow(original, ids[:windows].long(), 16, Path(gettempdir())) for ids in (texts.calibration, texts.reward)]
    found = []
    for index, layer in streaming.walk(original):
        if index in layers:
            here = [linear for linear in statistics.linears if linear.layer == index]
            covariances = [Covariance(owners(here, index, prefix)) for _ in flows]
            for flow, covariance in zip(flows, covariances, strict=True):
                flow.look(layer, index, covariance.names, covariance.see)
            seen, unseen = (covariance.means() for covariance in covariances)
            for linear in here:
                weight = original.get_parameter(f"{linear.name}.weight").float().clone()
                group = linear.group
                found.append(Subject(linear, weight, seen[group], unseen[group], statistics.fisher[linear.name]))
        if index == max(layers):
            break
        for flow in flows:
            flow.through(layer, index)
    return found


def loss(subject: Subject, decoded: Tensor) -> float:
    """Predicted by the other text, nats per token."""
    error = decoded - subject.weight
    return 0.5 * float((subject.fisher * ((error @ subject.unseen) * error).sum(1)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the project")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 14, 25])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--windows", type=int, default=64, help="of the calibration split that covariances are from")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a column's rows are few
    chosen = subjects(given.root, given.model, given.layers, given.windows)
    weights = sum(subject.weight.numel() for subject in chosen)
    for bits in given.bits:
        print(f"\n| {bits} bits | effective bits | error, nats | at the bits of the first row | against it |")
        print("|---|---|---|---|---|")
        first: tuple[float, float] | None = None
        for recipe in recipes(bits):
            found = [(subject, *quantized(subject, recipe)) for subject in chosen]
            error = sum(loss(subject, decoded) for subject, decoded, _ in found)
            size = sum(cost * subject.weight.numel() for subject, _, cost in found) / weights
            first = first or (error, size)
            equal = error * 4 ** (size - first[1])
            print(
                f"| {recipe.name} | {size:.3f} | {error:.4f} | {equal:.4f} | {equal / first[0] - 1:+.1%} |", flush=True
            )


if __name__ == "__main__":
    main()
