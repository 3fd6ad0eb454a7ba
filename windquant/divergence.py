"""How far a model's next-token distributions are from another's: the Kullback-Leibler divergence.

Logits of a whole window are large (a vocabulary of 50,000 tokens makes 100 MB of 512 positions), and each of the dozen
operations of a divergence would go through the memory for them. So heads and divergences are computed a slice of
positions at a time, in the processor's cache.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from windquant import compute, decoder, presets, streaming
from windquant.flow import Flow

BATCH = 4  # windows at a time


def slices(model: nn.Module, length: int) -> Iterator[slice]:
    """The positions of a window, as many at a time as `presets.DIVERGENCE_LOGITS` allows the model's vocabulary."""
    embeddings = cast(nn.Embedding, cast(PreTrainedModel, model).get_input_embeddings())
    size = max(1, presets.DIVERGENCE_LOGITS // len(embeddings.weight))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


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
    """Mean divergence of the student from the teacher on ids [n, length], layer by layer, nats per token."""
    scratch = Path(tempfile.gettempdir())
    found, exact = (Flow(model, ids, BATCH, scratch) for model in (student, teacher))
    for (index, layer), (_, original) in zip(streaming.walk(student), streaming.walk(teacher), strict=True):
        found.through(layer, index)
        exact.through(original, index)
    return divergence_of(student, found, teacher, exact, ids)


@torch.no_grad()
def divergence_of(student: nn.Module, found: Flow, teacher: nn.Module, exact: Flow, ids: Tensor) -> float:
    """The same from the hidden states behind the last layers, in equal batches."""
    total = 0.0
    for part, mine, theirs in zip(ids.split(found.batch), found.batches(), exact.batches(), strict=True):
        part = part.to(mine.device)
        for window in range(len(part)):
            for some in slices(teacher, ids.shape[1]):
                place = (slice(window, window + 1), some)
                with compute.autocast():
                    logits = (
                        decoder.head(student, part[place], mine[place]),
                        decoder.head(teacher, part[place], theirs[place]),
                    )
                total += kl_divergence(*logits).item() * logits[0].shape[1]
    return total / ids.numel()
