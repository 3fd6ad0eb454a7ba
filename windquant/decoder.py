"""Walk a causal language model decoder layer by decoder layer, whatever its architecture.

Every causal model of transformers computes embeddings, a list of decoder layers, and a head. `embed` runs the model's
own code with the layers replaced by recorders, so that masks, rotary embeddings and whatever else the architecture
passes to each layer come from the model itself; `head` does the same with the last hidden state put in their place.
Memory: the activations of one batch; the caller decides what it keeps.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from windquant.errors import WindquantError
from windquant.units import Linear

#: Share of the decoder layers' weights that must be of nn.Linear: a result's bits are about these alone.
QUANTIZABLE = 0.8


@dataclass(frozen=True)
class Call:
    """What the model passes to one decoder layer besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the longest ModuleList whose entries all hold linears.

    A multimodal model has such lists for pictures or sounds too; those of its text model count.
    """
    text = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_has_linears, module))
    ]
    own = set(text.modules()) if isinstance(text, nn.Module) else set()
    found = [item for item in found if item[1] in own] or found
    if not found:
        raise WindquantError(
            f"{type(model).__name__}: no decoder layers with nn.Linear weights; WINDQuant quantizes causal language "
            "models whose layers hold nn.Linear"
        )
    return max(found, key=lambda item: len(item[1]))


def check_share(model: nn.Module) -> None:
    """WindquantError if much of the decoder layers is in tensors that are no nn.Linear, as experts often are.

    Also for weights that several layers share: each layer is quantized by what it reads itself.
    """
    prefix, layers = decoder_layers(model)
    for name in getattr(model, "all_tied_weights_keys", ()):
        if name.startswith(f"{prefix}."):
            raise WindquantError(
                f"{type(model).__name__}: its decoder layers share {name}: WINDQuant quantizes no such model; give one "
                "whose layers have weights of their own"
            )
    if isinstance(model, PreTrainedModel) and vars(model.config.get_text_config()).get("num_kv_shared_layers"):
        raise WindquantError(
            f"{type(model).__name__}: some of its decoder layers read the keys and values of others "
            "(num_kv_shared_layers), so they cannot be computed one by one: WINDQuant quantizes no such model"
        )
    linears = {f"{name}.weight" for name in _linears(layers)}
    sizes = {name: weight.numel() for name, weight in layers.named_parameters() if weight.dim() > 1}
    whole = sum(sizes.values())
    if sum(size for name, size in sizes.items() if name in linears) < QUANTIZABLE * whole:
        name = max(sizes.keys() - linears, key=lambda name: sizes[name])
        share = sum(size for other, size in sizes.items() if other.split(".")[1:] == name.split(".")[1:]) / whole
        raise WindquantError(
            f"{type(model).__name__}: {prefix}.{name} and its like hold {share:.0%} of the decoder layers and are no "
            "nn.Linear (experts of a mixture mostly are not): WINDQuant cannot quantize them; give a dense model"
        )


def _has_linears(layer: nn.Module) -> bool:
    """Whether a layer holds an nn.Linear, or what stands for one in a packed model (checkpoint/linear.py)."""
    return any(hasattr(module, "in_features") for module in layer.modules())


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


class _Output(Tensor):
    """What stands for a layer's output: some architectures take it as the hidden state, others take its [0]."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is computed from it are plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]


@contextmanager
def _forwards(layers: nn.ModuleList, forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Replace the layers' forward for the duration of the block."""
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def embed(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Call]]:
    """First hidden state [batch, length, hidden] of token ids [batch, length], and each layer's call.

    Raises WindquantError for a token that the model does not have.
    """
    _, layers = decoder_layers(model)
    words = len(cast(nn.Embedding, cast(PreTrainedModel, model).get_input_embeddings()).weight)
    if (highest := int(ids.max())) >= words:
        raise WindquantError(
            f"--calibration: it has the token {highest}, the model's vocabulary has {words}; make the calibration set "
            "with this model's tokenizer"
        )
    calls: list[Call] = []
    first: list[Tensor] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first.append(hidden.as_subclass(Tensor))
        calls.append(Call(args, kwargs))
        return hidden.as_subclass(_Output)

    with _forwards(layers, [record] * len(layers)):
        _backbone(model)(input_ids=ids, use_cache=False)
    if first[0].dim() != 3:
        raise WindquantError(
            f"{type(model).__name__}: its decoder layers hand on tensors of {tuple(first[0].shape)}, not one state a "
            "token: WINDQuant quantizes no such model"
        )
    return first[0], calls


def run_layer(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Hidden state after one decoder layer."""
    out = layer(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


class Enough(Exception):
    """A decoder layer need not run to its end: what was to be seen has been seen."""


@contextmanager
def inputs(layer: nn.Module, names: Collection[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` for these linears of the layer whenever it runs inside the block.

    Once a run has reached all of them it raises Enough; the last linear is not computed.
    """
    reached: set[str] = set()

    def begin(*_: Any) -> None:
        reached.clear()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, args[0])
            reached.add(name)
            if len(reached) == len(names):
                raise Enough

        return seen

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    handles.append(layer.register_forward_pre_hook(begin))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head(model: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of the last decoder layer's output, by the model's own norm and head."""
    _, layers = decoder_layers(model)

    def inject(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.as_subclass(_Output)

    with _forwards(layers, [inject] * len(layers)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _backbone(model: nn.Module) -> nn.Module:
    """The model without its head, so that recording costs no logits."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def quantizable(model: nn.Module) -> list[Linear]:
    """The linears inside the decoder layers of a model in memory, in model order, grouped by the input they read."""
    prefix, layers = decoder_layers(model)
    probe = Probe(model)
    return [linear for index, layer in enumerate(layers) for linear in probe.linears(prefix, index, layer)]


class Probe:
    """Walks two tokens through the decoder layers and tells which linears of a layer read the same input.

    Two linears share a group when the layer hands both the same tensor (q/k/v, gate/up). Linears that the probe never
    reaches keep a group of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
        with torch.no_grad():
            self.hidden, self.calls = embed(model, ids)

    @torch.no_grad()
    def linears(self, prefix: str, index: int, layer: nn.Module) -> list[Linear]:
        """The linears of decoder layer `index`; layers come in their order."""
        inputs: dict[str, Tensor] = {}  # holding the tensors keeps their identities distinct

        def see(name: str, x: Tensor, _: Tensor) -> None:
            inputs[name] = x

        with watch(layer, see):
            self.hidden = run_layer(layer, self.hidden, self.calls[index])
        first: dict[int, str] = {}
        result = []
        for name, linear in _linears(layer).items():
            full = f"{prefix}.{index}.{name}"
            group = first.setdefault(id(inputs[name]), full) if name in inputs else full
            rows, columns = linear.weight.shape
            result.append(Linear(full, name.rsplit(".", 1)[-1], index, group, rows, columns))
        return result


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: the device of its embeddings; decoder layers may have no memory (streaming.py)."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


@contextmanager
def watch(layer: nn.Module, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input, output)` for every linear of the layer that runs inside the block."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, args, out: see(name, args[0], out)

    handles = [linear.register_forward_hook(hook(name)) for name, linear in _linears(layer).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
