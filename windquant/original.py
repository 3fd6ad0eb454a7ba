"""The original model as what recovery aims at: walked through once, of which hidden states and head remain."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from windquant import compute, decoder, streaming
from windquant.divergence import divergence_of, kl_divergence, slices
from windquant.flow import Flow


class Original:
    """What the original model makes of texts; no more than one of its layers is in memory."""

    def __init__(self, folder: Path, windows: Tensor, held_out: Tensor, batch: int, scratch: Path) -> None:
        """windows, held_out: int64 [n, length], taken one and `batch` at a time; scratch: folder for hidden states that
        do not fit into memory. `walk` comes before anything is asked.
        """
        self.windows, self.held_out, self.batch, self.scratch = windows, held_out, batch, scratch
        self.model = streaming.load(folder)
        self.depth = len(decoder.decoder_layers(self.model)[1])
        self.device = decoder.device_of(self.model)
        self.exact, self.target = (
            Flow(self.model, ids, size, scratch) for ids, size in ((windows, 1), (held_out, batch))
        )

    def walk(self) -> Iterator[int]:
        """Lead the texts through the decoder layers; yields the index of each behind it."""
        for index, layer in streaming.walk(self.model):
            self.exact.through(layer, index)
            self.target.through(layer, index)
            yield index

    def gradient(self, student: nn.Module, place: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The student's divergence on window `place`, nats per token, and its gradient for the last hidden state.

        hidden: [1, length, hidden], behind the student's last layer. The gradients of trained parameters after it are
        added to theirs; of a divergence that is not finite there are none.
        """
        ids = self.windows[place][None].to(self.device)
        exact = self.exact.states.get(place, self.device)
        total, gradient = torch.zeros((), device=self.device), torch.empty_like(hidden)
        for part in slices(self.model, ids.shape[1]):
            given = hidden[:, part].detach().requires_grad_(True)
            with compute.autocast():
                with torch.no_grad():
                    target = decoder.head(self.model, ids[:, part], exact[:, part])
                found = decoder.head(student, ids[:, part], given)
                loss = kl_divergence(found, target) * (given.shape[1] / ids.shape[1])
            total += loss.detach()
            if not total.isfinite():
                break
            torch.autograd.backward(loss)
            assert given.grad is not None
            gradient[:, part] = given.grad
        return total, gradient

    def flow(self, student: nn.Module) -> Flow:
        """The held-out windows before the student's first layer."""
        return Flow(student, self.held_out, self.batch, self.scratch)

    def divergence(self, student: nn.Module, found: Flow) -> float:
        """Mean divergence of a student that has led the held-out windows through its layers."""
        return divergence_of(student, found, self.model, self.target, self.held_out)
