"""Perplexity of a checkpoint on the held-out windows of the calibration artifact.

    python -m windquant.evaluation.perplexity --checkpoint DIR --calibration DIR --output FILE.json

Perplexity = exp(mean negative log-likelihood of the predicted tokens). Windows do not overlap, and the first token of
each is given, as in the GPTQ papers.
"""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from windquant import calibration, compute, decoder, step, streaming
from windquant.errors import WindquantError
from windquant.flow import Flow
from windquant.progress import Progress
from windquant.settings import Count, Natural

POSITIONS = 256  # logits that are widened to float32 at a time


@dataclass(frozen=True)
class Settings:
    windows: Natural = 16  # how many, evenly spread over the text (0 = all)
    batch: Count = 1  # windows per forward pass
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # auto: float32; as stored for a large model on a GPU
    )


@dataclass(frozen=True)
class Score:
    """Perplexity over n windows of L tokens, n * (L - 1) of them predicted."""

    perplexity: float
    nll: float  # mean over the predicted tokens, nats
    standard_error: float  # of nll, from the spread between the windows; 0 for a single one
    tokens: int  # predicted
    context: int  # L
    windows: list[float]  # mean nll of each


def run(task: step.Task, settings: Settings) -> None:
    texts = calibration.load(task.inputs["calibration"])
    ids = spread(texts.test, settings.windows)
    model = streaming.load(task.inputs["checkpoint"], settings.device, settings.dtype)

    def scored(batch: int) -> Score:
        progress: Progress[int]
        with task.progress(total=len(decoder.decoder_layers(model)[1]), label="perplexity") as progress:
            return perplexity(model, ids, batch, progress.update, task.output.parent)

    score = compute.with_smaller_batches(settings.batch, scored)
    if not math.isfinite(score.nll):
        raise WindquantError(f"{task.inputs['checkpoint']}: the model's loss on {texts.test_name} is not finite")
    task.metrics({f"perplexity.{texts.test_name}": score.perplexity, f"nll.{texts.test_name}": score.nll})
    entry = {
        "perplexity": score.perplexity,
        "nll": score.nll,
        "standard_error": score.standard_error,
        "tokens": score.tokens,
        "context": score.context,
        "windows": score.windows,
    }
    task.output.write_text(json.dumps({texts.test_name: entry}, indent=1) + "\n")


def spread(ids: Tensor, count: int) -> Tensor:
    """`count` windows [count, length] evenly spread over ids [n, length]; all of them if count is 0 or too large."""
    if count <= 0 or count >= len(ids):
        return ids
    return ids[torch.arange(count) * len(ids) // count]


def perplexity(
    model: nn.Module,
    ids: Tensor,
    batch: int = 1,
    update: Callable[[int], object] | None = None,
    scratch: Path | None = None,
) -> Score:
    """Score of token ids [n, length]; `update(1)` is called after every decoder layer.

    scratch: folder for hidden states that do not fit into memory; the system's own for temporary files otherwise.
    """
    windows = token_losses(model, ids, batch, update, scratch).mean(dim=1)
    nll = windows.mean().item()
    error = windows.std().item() / math.sqrt(len(windows)) if len(windows) > 1 else 0.0
    value = math.exp(nll) if nll < 700 else math.inf
    return Score(value, nll, error, len(ids) * (ids.shape[1] - 1), ids.shape[1], windows.tolist())


@torch.no_grad()
def token_losses(
    model: nn.Module,
    ids: Tensor,
    batch: int = 1,
    update: Callable[[int], object] | None = None,
    scratch: Path | None = None,
) -> Tensor:
    """Negative log-likelihood [n, length - 1] in nats, float64 on the CPU, of every token but the first of each row.

    Layer by layer, all windows through one before the next is read.
    """
    flow = Flow(model, ids.long(), batch, scratch or Path(tempfile.gettempdir()), compute.products_by_onednn)
    for index, layer in streaming.walk(model):
        flow.through(layer, index)
        if update is not None:
            update(1)
    rows = []
    for part, hidden in zip(ids.split(batch), flow.batches(len(ids)), strict=True):
        tokens = part.to(device=hidden.device, dtype=torch.long)
        with compute.products_by_onednn():
            logits = decoder.head(model, tokens, hidden)[:, :-1]
        targets = tokens[:, 1:]
        losses = [
            F.cross_entropy(some.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
            for some, target in zip(logits.split(POSITIONS, 1), targets.split(POSITIONS, 1), strict=True)
        ]
        rows.append(torch.cat(losses, dim=1).double().cpu())
    return torch.cat(rows)


if __name__ == "__main__":
    step.main("perplexity", run, Settings, inputs=("checkpoint", "calibration"))
