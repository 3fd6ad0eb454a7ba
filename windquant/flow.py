"""Hidden states between decoder layers: in the host's memory, or in a file where that is too small.

The file has no name and goes with the process, however that ends. It is written and read plainly, not mapped: of a map,
every page that was touched counts as the process's memory.
"""

import tempfile
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from io import BufferedRandom
from pathlib import Path

import torch
from torch import Tensor, nn

from windquant import compute, decoder, memory

Precision = Callable[[], AbstractContextManager[object]]

#: Share of the free memory that hidden states may take before they go to a file.
SHARE = 0.25


class Activations:
    """Tensors by key. Those of one key always have the same shape and dtype."""

    def __init__(self, folder: Path | None = None) -> None:
        """In a file in `folder`, or in memory if there is none."""
        self._memory: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0
        self._file: BufferedRandom | None = None
        if folder is not None:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # of the object, not of a block

    def put(self, key: Hashable, value: Tensor) -> None:
        value = value.detach().cpu()
        if self._file is None:
            self._memory[key] = value
            return
        if key not in self._places:
            self._places[key] = (self._end, value.shape, value.dtype)
            self._end += value.nbytes
        self._file.seek(self._places[key][0])
        self._file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)

    def get(self, key: Hashable, device: torch.device) -> Tensor:
        if self._file is None:
            return self._memory[key].to(device)
        start, shape, dtype = self._places[key]
        data = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        self._file.seek(start)
        self._file.readinto(data.numpy().data)
        return data.view(dtype).view(shape).to(device)


class Flow:
    """The hidden states of every batch of token ids on their way through the decoder layers."""

    def __init__(
        self, model: nn.Module, ids: Tensor, batch: int, scratch: Path, precision: Precision = compute.autocast
    ) -> None:
        """Embed token ids [n, length].

        scratch: folder for hidden states that do not fit into memory; precision: of the products.
        """
        self.device = decoder.device_of(model)
        self.batch, self.precision = batch, precision
        self.calls: list[list[decoder.Call]] = []
        for place, part in enumerate(ids.split(batch)):
            with torch.no_grad(), self.precision():
                hidden, calls = decoder.embed(model, part.to(self.device))
            if place == 0:
                self.states = Activations(scratch if self.large(len(ids) * hidden[0].nbytes) else None)
            self.states.put(place, hidden)
            # masks and positions of equal batches are equal: one copy of them
            self.calls.append(self.calls[0] if self.calls and same(self.calls[0], calls) else calls)

    @staticmethod
    def large(size: int) -> bool:
        """Whether so many bytes of hidden states belong in a file."""
        return size > SHARE * memory.free()

    @torch.no_grad()
    def through(self, layer: nn.Module, index: int) -> None:
        """Run decoder layer `index` on every batch."""
        for place, calls in enumerate(self.calls):
            with self.precision():
                hidden = decoder.run_layer(layer, self.states.get(place, self.device), calls[index])
            self.states.put(place, hidden)

    @torch.no_grad()
    def look(self, layer: nn.Module, index: int, names: Collection[str], see: Callable[[str, Tensor], None]) -> None:
        """`see(name, input)` of these linears of decoder layer `index`, of every batch; the states stay what they are.

        The layer is left where the last of them has been seen.
        """
        with decoder.inputs(layer, names, see), self.precision():
            for place, calls in enumerate(self.calls):
                with suppress(decoder.Enough):
                    decoder.run_layer(layer, self.states.get(place, self.device), calls[index])

    def batches(self, samples: int | None = None) -> Iterator[Tensor]:
        """The hidden state [batch, length, hidden] of every batch, or of those that hold the first samples."""
        for place in range(len(self.calls) if samples is None else -(-samples // self.batch)):
            yield self.states.get(place, self.device)


def same(one: object, other: object) -> bool:
    """Whether two calls of decoder layers pass the same; what is no tensor or plain value never is."""
    if isinstance(one, decoder.Call) and isinstance(other, decoder.Call):
        return same(one.args, other.args) and same(one.kwargs, other.kwargs)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return isinstance(one, bool | int | float | str | None) and one == other
