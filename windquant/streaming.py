"""A model whose decoder layers come from its files when they are needed, one at a time.

    model = streaming.load(folder)
    for index, layer in streaming.walk(model): ...

`load` builds the whole model, but gives memory only to what lies outside the decoder layers (embeddings, norm, head).
`walk` lends the layers one after another: while one computes, a thread reads the next one's bytes (into pinned memory
where there is a GPU). So a pass over a model takes the memory of one layer in the computing precision and one as it is
stored, whatever the model's depth. A packed checkpoint is decoded layer by layer.

`walk` also takes a model that is in memory as a whole: then it only lends. `on_call` lets other code call a streamed
model (lm-eval): a layer's weights come when it is called.
"""

import ctypes
import math
from collections.abc import Collection, Container, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from windquant import kernels, models
from windquant.checkpoint import files as packed_files
from windquant.decoder import decoder_layers, device_of
from windquant.errors import WindquantError
from windquant.header import Entry, entries, weight_files
from windquant.packed import Layout

SOURCE = "windquant_source"  # attribute of a streamed model


@dataclass
class Source:
    """The tensors of a Hugging Face folder by name, original or packed."""

    folder: Path
    entries: dict[str, Entry]
    layouts: dict[str, Layout]  # of the packed linears; none for an original model
    dtype: torch.dtype  # of the floating-point tensors once they are used

    @property
    def parameters(self) -> int:
        """How many the model has; tied ones once."""
        packed = {f"{name}.{part}" for name, layout in self.layouts.items() for part in layout.shapes}
        others = sum(math.prod(entry.shape) for name, entry in self.entries.items() if name not in packed)
        return others + sum(layout.linear.weights for layout in self.layouts.values())

    def names(self, name: str) -> list[str]:
        """The stored tensors that make up a parameter or buffer of the model."""
        linear, _, key = name.rpartition(".")
        if linear in self.layouts and key == "weight":
            return [f"{linear}.{part}" for part in self.layouts[linear].shapes]
        return [name]

    def holds(self, name: str, shape: torch.Size) -> bool:
        """Whether the files have what a parameter or buffer of this shape is made of."""
        stored = [self.entries.get(part) for part in self.names(name)]
        if any(entry is None or entry.dtype is None for entry in stored):
            return False
        if stored[0] is not None and self.names(name) == [name]:
            return stored[0].shape == tuple(shape)
        linear = self.layouts[name.rpartition(".")[0]].linear
        return (linear.rows, linear.columns) == tuple(shape)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers as they are stored, by the name of each stored tensor."""
        return {part: self.tensor(part) for name in names for part in self.names(name)}

    def parameter(self, name: str) -> Tensor:
        """One parameter on the CPU; WindquantError if the files do not have it."""
        for part in self.names(name):
            if part not in self.entries:
                raise WindquantError(f"{self.folder}: the checkpoint lacks {part}; get it again")
        return self.weight(name, self.read([name]), torch.device("cpu"))

    def tensor(self, name: str) -> Tensor:
        """One stored tensor as it is; WindquantError if its file went away or has changed."""
        # Plain reads, not a memory map: of a map every page that was touched counts as the process's memory.
        entry = self.entries[name]
        if entry.dtype is None:
            raise WindquantError(f"{entry.file}: {name} has a type that windquant does not read; convert it to BF16")
        data = torch.empty(entry.size, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.start)
                got = file.readinto(data.numpy().data)
        except FileNotFoundError as error:
            raise WindquantError(f"{entry.file}: went away while the model was read; get it again") from error
        if got != entry.size:
            raise WindquantError(f"{entry.file}: truncated while the model was read; get it again")
        return data.view(entry.dtype).view(entry.shape)

    def weight(self, name: str, stored: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """A parameter or buffer on the device, made of its stored tensors; WindquantError for NaN and Inf."""
        linear, _, key = name.rpartition(".")
        if linear not in self.layouts or key != "weight":
            value = stored[name].to(device, non_blocking=True)
            models.check_finite([(name, value)], self.entries[name].file)
            return value.to(self.dtype) if value.is_floating_point() else value
        layout = self.layouts[linear]
        parts = {part: stored[f"{linear}.{part}"].to(device, non_blocking=True) for part in layout.shapes}
        return kernels.decode(layout, parts, self._order(linear, stored).to(device), self.dtype)

    def packed(self, linears: Collection[str]) -> Iterator[tuple[str, Layout, dict[str, Tensor], Tensor]]:
        """Names, layouts, stored tensors and column orders of packed linears, on the CPU.

        The owner of a group stands among `linears` with the others.
        """
        stored = self.read(f"{linear}.weight" for linear in linears)
        for linear in linears:
            layout = self.layouts[linear]
            tensors = {part: stored[f"{linear}.{part}"] for part in layout.shapes}
            yield linear, layout, tensors, self._order(linear, stored)

    def _order(self, linear: str, stored: Mapping[str, Tensor]) -> Tensor:
        """Column order of a packed linear, int64 [columns]; `stored` has the one of its group's owner."""
        owner = self.layouts[linear].linear.group
        return packed_files.unpacked_order(self.layouts[owner], stored[f"{owner}.order"])


def load(folder: Path, device_name: str = "auto", dtype_name: str = "float32") -> PreTrainedModel:
    """The model of a local Hugging Face folder for `walk`, in eval mode, without gradients.

    Device and dtype are chosen as `models.place` says. The files are checked against the configuration before anything
    is read. A model whose files have other names than its parameters is loaded as a whole (`models.load`). Raises
    WindquantError as `models.load` does.
    """
    config = models.configuration(folder)
    device, dtype = models.place(config, device_name, dtype_name)
    source = open_source(folder, dtype)
    if source.layouts:
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    prefix, _ = decoder_layers(model)
    state = model.state_dict()
    tied = model.all_tied_weights_keys
    needed = {name: tensor.shape for name, tensor in state.items() if name not in tied}
    # transformers ties no weight that the files hold with values of its own, whatever config.json says
    own = any(
        source.holds(name, state[name].shape) and not torch.equal(source.parameter(name), source.parameter(twin))
        for name, twin in tied.items()
        if name in state and twin in state
    )
    if own or not all(source.holds(name, shape) for name, shape in needed.items()):
        whole: Any = models.load(folder, dtype)  # which names what is missing, or knows the older names
        moved: PreTrainedModel = whole.to(device)
        return moved
    outside = [name for name in needed if not name.startswith(f"{prefix}.")]
    for name in outside:  # one at a time: the embeddings are the largest of all
        _put(model, name, source.weight(name, source.read([name]), device))
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
    setattr(model, SOURCE, source)
    return model


def open_source(folder: Path, dtype: torch.dtype = torch.float32) -> Source:
    """The tensors of a folder, original or packed; only headers are read. WindquantError names a bad file."""
    config = models.configuration(folder)
    layouts: dict[str, Layout] = {}
    quantization = getattr(config, "quantization_config", None)
    found = weight_files(folder)
    if quantization is not None:
        models.check_method(folder, quantization)
        _, layouts = packed_files.read_config(folder)
        packed_files.check(layouts, found)
    return Source(folder, {name: entry for file in found for name, entry in entries(file).items()}, layouts, dtype)


def parameters(model: nn.Module, without: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The model's state on the CPU, one after another, but the weights of linears `without`.

    What has no memory is read from the files of a streamed model, and nothing of it stays.
    """
    source: Source | None = getattr(model, SOURCE, None)
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in without:
            yield name, source.parameter(name) if source is not None and tensor.is_meta else tensor.cpu()


def walk(model: nn.Module, order: Iterable[int] | None = None) -> Generator[tuple[int, nn.Module], None, None]:
    """Lend the decoder layers in `order` (all of them, first to last): index and layer, its weights on the device.

    A streamed layer loses its weights when the next one is asked for.
    """
    prefix, layers = decoder_layers(model)
    wanted = iter(range(len(layers)) if order is None else order)
    source: Source | None = getattr(model, SOURCE, None)
    if source is None:
        yield from ((index, layers[index]) for index in wanted)
        return
    device = device_of(model)

    def names(index: int) -> list[str]:
        return [f"{prefix}.{index}.{name}" for name in layers[index].state_dict()]

    def ask(index: int | None) -> tuple[int, Future[dict[str, Tensor]]] | None:
        return None if index is None else (index, reader.submit(source.read, names(index)))

    with ThreadPoolExecutor(1) as reader:
        coming = ask(next(wanted, None))
        while coming is not None:
            index, stored = coming[0], coming[1].result()
            coming = ask(next(wanted, None))
            empty = {name: _find(model, name) for name in names(index)}
            for name in empty:
                _put(model, name, source.weight(name, stored, device))
            del stored
            try:
                yield index, layers[index]
            finally:
                for name, tensor in empty.items():
                    _put(model, name, tensor)
                _trim()


def _trim() -> None:
    """Give freed memory back: glibc keeps what lies between other blocks, and peaks would grow with the depth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


@contextmanager
def on_call(model: nn.Module) -> Iterator[None]:
    """Inside the block a streamed model can be called as any other: a layer has its weights until the next is called.

    Every call of the model reads all of it, so batches should be large. Nothing happens to a model in memory.
    """
    _, layers = decoder_layers(model)
    lent = walk(model, cycle(range(len(layers))))

    def fetch(index: int) -> None:
        while next(lent)[0] != index:  # after a call that ended half-way
            pass

    handles = []
    if hasattr(model, SOURCE):
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(lambda *_, index=index: fetch(index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        lent.close()


def _find(model: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    found: Tensor = getattr(module, key)
    return found


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[key] = value
