"""Compare plans as really quantized models, on text that no search has seen.

The stand-in of measure.py misleads a search that takes the best of many plans, so its winner is compared with the
Lagrangian plan once both are quantized. All plans go through the decoder layers together: every linear is quantized on
the covariances of what the *original* layers before it hand on, once for all plans that treat it alike. So plans
differ in what they do, not in the last bits of what came before, and half of the work is done once.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from windquant import calibration, compute, decoder, presets, streaming
from windquant.divergence import divergence_of
from windquant.flow import Flow
from windquant.packed import Layout
from windquant.plan import Plan
from windquant.quantize import layouts_of, quantized
from windquant.statistics import Covariance, Statistics, owners

BATCH = 8  # windows at a time; fewer once a GPU has had no room for them


def divergences(
    model: Path, texts: Path, statistics: Path, plans: list[Plan], tokens: int, update: Callable[[int], object]
) -> list[float]:
    """How far plans for one model are from the original, nats per token of the reward split behind its first `tokens`.

    Of two texts divergences tell nearly the same, where losses of single tokens scatter. model, texts (a calibration
    set): folders. `update` is called with the number of linears that are done, of all plans together.
    """
    found = Statistics.load(statistics)
    found.check(streaming.open_source(model))
    given = calibration.load(texts)
    samples = given.calibration[: max(1, presets.CONFIRM_TOKENS // given.calibration.shape[1])].long()
    _, ids = given.measured_and_unseen(tokens)

    def compared(batch: int) -> list[float]:
        return _compared(model, found, plans, samples, ids, batch, update)

    return compute.with_smaller_batches(BATCH, compared)


@torch.no_grad()
def _compared(
    folder: Path,
    statistics: Statistics,
    plans: list[Plan],
    samples: Tensor,
    ids: Tensor,
    batch: int,
    update: Callable[[int], object],
) -> list[float]:
    model = streaming.load(folder)
    prefix, _ = decoder.decoder_layers(model)
    scratch, order = Path(tempfile.gettempdir()), plans[0].units.order
    text = Flow(model, samples, batch, scratch)
    exact, *flows = (Flow(model, ids, batch, scratch) for _ in (None, *plans))
    layouts = [layouts_of(plan, statistics.linears) for plan in plans]
    for index, layer in streaming.walk(model):
        covariance = Covariance(owners(statistics.linears, index, prefix))
        with decoder.watch(layer, covariance.see):
            text.through(layer, index)
        exact.through(layer, index)
        names = [linear.name for linear in statistics.linears if linear.layer == index]
        wanted = list(dict.fromkeys(own[name] for name in names for own in layouts))
        weights: dict[Layout, Tensor] = {}
        found = quantized(model, wanted, order, statistics, covariance.means())
        for layout, (_, decoded) in zip(wanted, found, strict=True):
            weights[layout] = decoded
            update(sum(own[layout.linear.name] == layout for own in layouts))
        for flow, own in zip(flows, layouts, strict=True):
            for name in names:
                model.get_parameter(f"{name}.weight").copy_(weights[own[name]])
            flow.through(layer, index)
    return [divergence_of(model, flow, model, exact, ids) for flow in flows]
