"""How far a model's next-token distributions are from another's: the Kullback-Leibler divergence.

Logits of a whole window are large (a vocabulary of 50,000 tokens makes 100 MB of 512 positions), and each of the dozen
operations of a divergence would go through the memory for them. So heads and divergences are computed a slice of
positions at a time, in the processor's cache.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

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
    loss: Tensor = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2))
    return loss


class _Divergence(torch.autograd.Function):
    """With the teacher's p and the student's q: sum p (log p - log q), whose gradient for the logits is q - p.

    Written in place: logits are the largest tensors of a step, and autograd would go through them twice as often.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        log_q = F.log_softmax(student, -1, dtype=torch.float32)
        log_p = F.log_softmax(teacher, -1, dtype=torch.float32)
        p = log_p.exp()
        loss = log_p.sub_(log_q).mul_(p).sum(-1).mean()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_q.exp_().sub_(p).div_(len(p)).to(student.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradients[0], None


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
