"""Quantize a model under a plan, layer by layer, each on what the quantized layers before it really hand on.

    python -m windquant.quantize --model DIR --calibration DIR --statistics FILE --plan FILE --output DIR

For every decoder layer: one pass of the calibration set for the covariances of its linears' inputs, error feedback for
each linear (feedback.py), and one pass of the quantized layer for the next layer's inputs. Every layer is read from the
files once. Covariances of more text are better ones, and take longer: `--calibration-windows` takes a part of the
calibration split, `--recovery-windows` adds text that recovery trains on.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from windquant import calibration, checkpoint, compute, decoder, kernels, step, streaming
from windquant.errors import WindquantError
from windquant.feedback import column_order, quantize_linear
from windquant.packed import Layout
from windquant.plan import Plan
from windquant.quantizers.trellis import TILE
from windquant.settings import Count, Natural
from windquant.statistics import Covariance, Flow, Statistics, owners
from windquant.units import Linear, chunk_widths, protected_count


@dataclass(frozen=True)
class Settings:
    batch: Count = 16  # calibration samples at a time
    calibration_windows: Natural = 0  # how many of calibration's windows covariances are taken from (0 = all)
    recovery_windows: Natural = 0  # how many of recovery's windows (at most all) covariances are taken from too


def run(task: step.Task, settings: Settings) -> None:
    plan = Plan.load(task.inputs["plan"])
    statistics = Statistics.load(task.inputs["statistics"])
    statistics.check(streaming.open_source(task.inputs["model"]))
    texts = calibration.load(task.inputs["calibration"])
    own = texts.calibration[: settings.calibration_windows or None]
    given = own.long(), texts.recovery[: settings.recovery_windows].long()
    layouts = layouts_of(plan, statistics.linears)
    if (size := sum(layout.bytes() for layout in layouts.values())) != plan.bytes:
        raise WindquantError(
            f"the plan's actions take {size} bytes, it says {plan.bytes}: it was changed by hand, or is of another "
            "version; make it again"
        )

    def written(batch: int) -> checkpoint.Measured:
        model = streaming.load(task.inputs["model"])  # anew for a smaller batch: its weights are replaced as it goes
        found = quantized_linears(model, layouts, plan.units.order, statistics, given, batch, task.output.parent)
        others = streaming.parameters(model, layouts)
        counted = task.progress(found, total=len(layouts), label="quantize")
        return checkpoint.write(task.output, model, layouts, counted, others, plan, task.inputs["model"])

    measured = compute.with_smaller_batches(settings.batch, written)
    if measured.measured_bytes != plan.bytes:
        raise RuntimeError(f"the checkpoint takes {measured.measured_bytes} bytes, the plan predicted {plan.bytes}")
    task.note("effective_bits", measured.effective_bits)
    task.note("checkpoint_bits", measured.checkpoint_bits)
    task.note("measured_bytes", measured.measured_bytes)


def layouts_of(plan: Plan, linears: list[Linear]) -> dict[str, Layout]:
    """Layout of every linear under the plan; WindquantError if the plan was made for other shapes."""
    form = plan.units.format()
    if set(plan.actions) != {linear.name for linear in linears}:
        raise WindquantError("the plan names other linears than the statistics; make it again from these")
    layouts = {}
    for linear in linears:
        names = plan.actions[linear.name]
        chunks = len(chunk_widths(linear.columns, protected_count(linear.columns, form.protected), form.chunk))
        if len(names) != chunks:
            raise WindquantError(
                f"the plan has {len(names)} chunks for {linear.name}, which has {chunks}; make it again"
            )
        layouts[linear.name] = Layout(linear, tuple(names), form)
    return layouts


@torch.no_grad()
def quantized_linears(
    model: nn.Module,
    layouts: dict[str, Layout],
    order: str,
    statistics: Statistics,
    texts: Sequence[Tensor],
    batch: int,
    scratch: Path | None = None,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The linears one after another, and the stored tensors of each.

    The weights of a model in memory are replaced by what the codes stand for. texts: int64 [n, length] each, of which
    the covariances are taken; batch: samples of the first at a time, and as many tokens of the others. scratch: folder
    for hidden states that do not fit into memory; the system's own for temporary files otherwise.
    """
    prefix, layers = decoder.decoder_layers(model)
    linears = [layout.linear for layout in layouts.values()]
    tokens, folder = batch * texts[0].shape[1], scratch or Path(tempfile.gettempdir())
    flows = [Flow(model, ids, max(1, tokens // ids.shape[1]), folder) for ids in texts if len(ids)]
    for index, layer in streaming.walk(model):
        covariance = Covariance(owners(linears, index, prefix))
        for flow in flows:
            flow.look(layer, index, covariance.names, covariance.see)
        here = [layout for layout in layouts.values() if layout.linear.layer == index]
        found = quantized(model, here, order, statistics, covariance.means())
        for layout, (tensors, decoded) in zip(here, found, strict=True):
            model.get_parameter(f"{layout.linear.name}.weight").copy_(decoded)
            yield layout.linear.name, tensors
        for flow in flows if index + 1 < len(layers) else ():
            flow.through(layer, index)


def quantized(
    model: nn.Module, layouts: Sequence[Layout], order: str, statistics: Statistics, covariances: dict[str, Tensor]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Stored tensors and decoded weight of linears of one decoder layer, from the model's weights; in their order.

    covariances: by group. The same linear may be asked for under several layouts.
    """

    def one(layout: Layout) -> tuple[dict[str, Tensor], Tensor]:
        linear = layout.linear
        columns = column_order(statistics.energy[linear.group], order, layout.format.chunk, layout.protected)
        weight = model.get_parameter(f"{linear.name}.weight").float()
        return quantize_linear(weight, columns, covariances[linear.group], layout, statistics.fisher[linear.name])

    most = abreast([layout.linear for layout in layouts], decoder.device_of(model))
    return compute.in_turns(one, layouts, most=most)


def abreast(linears: list[Linear], device: torch.device) -> int:
    """How many linears are quantized side by side, so that every processor has about two streams of the trellis.

    One, where these are many, as each takes memory, and where a GPU searches.
    """
    if kernels.quantize_on(device):
        return 1
    streams = max((-(-linear.rows // TILE) for linear in linears), default=1)
    return 1 + 2 * torch.get_num_threads() // streams


if __name__ == "__main__":
    step.main("quantize", run, Settings, inputs=("model", "calibration", "statistics", "plan"))
