"""The registration with transformers: `AutoModelForCausalLM.from_pretrained` of a packed checkpoint.

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WindquantConfig(low_memory=True))

Loading checks the headers of the files, swaps the linears of config.json for `PackedLinear`, lets transformers load all
but the packed tensors, maps those, and decodes the weights, all processors at once. With a `device_map`, transformers
loads the codes too, to the device that it chooses.

transformers spends a tenth of a millisecond on every name that it loads, and a few microseconds on every operation of
torch while it builds a model (under `torch.device`): hence the order.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from windquant.checkpoint import description
from windquant.checkpoint.description import METHOD
from windquant.checkpoint.files import check_contents, check_headers, check_plan, unpacked_order
from windquant.checkpoint.fused import Fused
from windquant.checkpoint.linear import PackedLinear
from windquant.errors import WindquantError
from windquant.header import Entry, tensors
from windquant.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = tuple(description.DTYPES.values())  # that a packed model is loaded in


class WindquantConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint (description.py), and how to load it.

    low_memory: keep only the packed tensors and decode each weight when it is used: slower, and the model takes
    little more than its file. It is an option of loading, never stored.
    """

    def __init__(self, low_memory: bool = False, **description: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self.low_memory = low_memory
        self.description = {"quant_method": METHOD, **description}

    def to_dict(self) -> dict[str, Any]:
        return dict(self.description)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of `from_pretrained` may set although the checkpoint has a configuration of its own."""
        return {"low_memory": self.low_memory}


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is looked for meanwhile: there is hardly any, and thousands of new objects that stay.

    They would make Python look through all modules once, which takes as long as half of all else.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class WindquantQuantizer(HfQuantizer):
    """Loads packed checkpoints; it does not quantize (the steps do)."""

    requires_calibration = True  # a model that is not packed already is refused
    quantization_config: WindquantConfig
    entries: dict[str, Entry]  # of the tensors in the files, while a model is loaded

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise WindquantError(
                "device_map: packed weights cannot be offloaded to disk; load with low_memory=True instead"
            )

    @_uncollected()
    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> "PreTrainedModel":
        files = [Path(file) for file in checkpoint_files or ()]
        folder = files[0].parent if files else None
        layouts = description.layouts(
            self.quantization_config.description, folder / "config.json" if folder else METHOD
        )
        self.entries = {}
        if folder is not None:
            self.entries = check_headers(layouts, files)
            if (folder / "plan.json").is_file():  # save_pretrained and the Hub may leave it out
                check_plan(layouts, Plan.load(folder / "plan.json"), folder / "plan.json")
        for name, layout in layouts.items():
            parent = model.get_submodule(name.rpartition(".")[0])
            linear = getattr(parent, layout.linear.kind, None)
            shape = (layout.linear.rows, layout.linear.columns)
            if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
                raise WindquantError(
                    f"{folder or METHOD}: {name} of {type(model).__name__} is no linear of {shape[0]} x {shape[1]}, as "
                    "quantization_config has it; config.json does not belong to these weights"
                )
            if linear.weight.dtype not in DTYPES:
                raise WindquantError(
                    f"{folder or METHOD}: dtype {linear.weight.dtype} is not supported; load it in "
                    "float16, bfloat16 or float32"
                )
            biased, weight = linear.bias is not None, linear.weight
            allocated: Iterable[str] = ()
            if folder is None:  # a frame without weights
                allocated = layout.shapes
            elif device_map is not None:  # transformers chooses where they go
                allocated = ("codes",)
            setattr(parent, layout.linear.kind, PackedLinear(layout, biased, weight.dtype, weight.device, allocated))
        taken = "|".join(sorted({key for layout in layouts.values() for key in layout.shapes}))
        model._keys_to_ignore_on_load_unexpected = {
            rf"\.({taken})$",
            *(model._keys_to_ignore_on_load_unexpected or ()),
        }
        return model

    @_uncollected()
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        for name, module in packed.items():
            for key, tensor in module.tensors.items():
                if tensor.is_meta or tensor.dtype != module.layout.shapes[key][1]:
                    raise WindquantError(
                        f"{name}.{key} was offloaded or loaded as {tensor.dtype}; give a device_map that holds the "
                        "whole model, or load with low_memory=True on the CPU"
                    )
        layouts = {name: module.layout for name, module in packed.items()}
        if self.entries:
            orders = check_contents(layouts, self.entries)
        else:
            owners = {name: module for name, module in packed.items() if module.layout.owner}
            orders = {name: unpacked_order(module.layout, module.tensors["order"]) for name, module in owners.items()}
        groups = {name: Fused(layouts.values()) for name in orders}
        places = [(name, key) for name in packed for key in layouts[name].shapes if f"{name}.{key}" in self.entries]
        read: dict[str, dict[str, Tensor]] = {name: {} for name in packed}
        for (name, key), tensor in zip(places, tensors(self.entries[f"{n}.{k}"] for n, k in places), strict=True):
            read[name][key] = tensor
        del self.entries
        for name, module in packed.items():
            group = module.layout.linear.group
            module.connect(read[name], orders[group], groups[group], self.quantization_config.low_memory)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(lambda module: module.settle(threads=1), packed.values()):
                pass
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the other parameters in the dtype they were stored in, however loaded."""
        dtype = description.DTYPES[self.quantization_config.description["dtype"]]
        packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
        state = model.state_dict()
        keep = {name for name in state if name.rpartition(".")[0] in set(packed) and not name.endswith(".bias")}
        return stored(state, dtype, keep), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def stored(state: Mapping[str, Tensor], dtype: torch.dtype, keep: Iterable[str] = ()) -> dict[str, Tensor]:
    """Floating-point tensors in the dtype that they have on disk; tied ones stay tied. `keep`: names left alone."""
    kept = set(keep)
    cast: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != dtype and name not in kept:
            tensor = cast.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), tensor.to(dtype))
        result[name] = tensor
    return result


def register() -> None:
    """Make transformers know the format; a second call does nothing."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(WindquantConfig)
        auto.register_quantizer(METHOD)(WindquantQuantizer)
        # without it, an argument of from_pretrained gives way to config.json as a whole
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (WindquantConfig,)  # type: ignore[assignment]  # a longer tuple


register()
