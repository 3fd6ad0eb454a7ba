"""Read and measure the folder of a packed checkpoint.

A folder is checked from the headers of its files before any tensor is read: a file that is truncated, of another
version or at odds with its plan is refused in one line, never loaded as something else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from windquant.checkpoint import description
from windquant.errors import WindquantError
from windquant.header import Entry, entries, tensors, weight_files
from windquant.packed import Layout, unpack_order
from windquant.plan import Plan
from windquant.quantizers import actions

AGAIN = "quantize the model again"


@dataclass(frozen=True)
class Measured:
    """What the files of a checkpoint really take, from their headers."""

    effective_bits: float  # 8 * measured_bytes / weights
    checkpoint_bits: float  # 8 * bytes of all weight files / all parameters, embeddings and head included
    measured_bytes: int  # all stored tensors of the quantized linears but their biases
    weights: int  # of the quantized linears


@dataclass(frozen=True)
class Packed:
    """The parts of a checkpoint, as a step needs them."""

    layouts: dict[str, Layout]  # by linear
    tensors: dict[str, dict[str, Tensor]]  # by linear: the names, shapes and dtypes of `Layout.shapes`
    parameters: dict[str, Tensor]  # every other tensor of the file: embeddings, norms, biases
    plan: Plan
    config: dict[str, Any]  # config.json

    def order(self, name: str) -> Tensor:
        """Column order of a linear, int64 [columns]: that of its group's owner."""
        owner = self.layouts[name].linear.group
        return unpacked_order(self.layouts[owner], self.tensors[owner]["order"])


def unpacked_order(layout: Layout, packed: Tensor) -> Tensor:
    """`unpack_order` of a group's owner: int64 [columns], where the packed one is."""
    return unpack_order(packed, layout.linear.columns, layout.widths, layout.protected)


def read(folder: Path) -> Packed:
    """The parts of a checkpoint; WindquantError naming the file that is damaged, of another version or off its plan."""
    config, layouts = read_config(folder)
    files = weight_files(folder)
    check(layouts, files)
    plan = Plan.load(folder / "plan.json")
    check_plan(layouts, plan, folder / "plan.json")
    layouts = {name: layouts[name] for name in plan.actions}  # in model order, which config.json has lost
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in layouts}
    parameters = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                linear, _, key = name.rpartition(".")
                if linear in layouts and key != "bias":
                    tensors[linear][key] = opened.get_tensor(name)
                else:
                    parameters[name] = opened.get_tensor(name)
    return Packed(layouts, tensors, parameters, plan, config)


def measure(folder: Path) -> Measured:
    """Sizes from the headers of the files; WindquantError as `read`."""
    _, layouts = read_config(folder)
    files = weight_files(folder)
    found = check(layouts, files)
    weights = sum(layout.linear.weights for layout in layouts.values())
    packed = {
        name: entry
        for name, entry in found.items()
        if name.rpartition(".")[0] in layouts and not name.endswith(".bias")
    }
    measured = sum(entry.size for entry in packed.values())
    others = sum(torch.Size(entry.shape).numel() for name, entry in found.items() if name not in packed)
    return Measured(
        effective_bits=8 * measured / weights,
        checkpoint_bits=8 * sum(file.stat().st_size for file in files) / (weights + others),
        measured_bytes=measured,
        weights=weights,
    )


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Layout]]:
    """config.json and the layouts in it."""
    path = folder / "config.json"
    if not path.is_file():
        raise WindquantError(f"{path}: missing; give the folder of a packed checkpoint")
    try:
        config = json.loads(path.read_text())
        quantization = config["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WindquantError(f"{path}: not the configuration of a windquant checkpoint ({error!r})") from error
    return config, description.layouts(quantization, path)


def check(layouts: Mapping[str, Layout], files: list[Path]) -> dict[str, Entry]:
    """`check_headers` and `check_contents`; the headers' entries by tensor."""
    found = check_headers(layouts, files)
    check_contents(layouts, found)
    return found


def check_headers(layouts: Mapping[str, Layout], files: list[Path]) -> dict[str, Entry]:
    """Compare headers with the layouts; their entries by tensor. Raises WindquantError."""
    found: dict[str, Entry] = {}
    for file in files:
        found |= entries(file)
    where = files[0] if len(files) == 1 else files[0].parent
    for name, layout in layouts.items():
        for key, (shape, dtype) in layout.shapes.items():
            entry = found.get(f"{name}.{key}")
            if entry is None:
                raise WindquantError(f"{where}: lacks {name}.{key}; {AGAIN}")
            if entry.shape != shape or entry.dtype != dtype:
                raise WindquantError(
                    f"{entry.file}: {name}.{key} is {entry}, but config.json asks for "
                    f"{description.dtype_name(dtype)} {list(shape)}; {AGAIN}"
                )
    return found


def check_contents(layouts: Mapping[str, Layout], found: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Compare the action tables with the layouts; the column orders by owner, unpacked. Raises WindquantError."""
    ids = {name: index for index, name in enumerate(actions())}
    tables = [found[f"{name}.actions"] for name in layouts]
    for (name, layout), entry, table in zip(layouts.items(), tables, tensors(tables), strict=True):
        if bytes(table.numpy()) != bytes(ids[action] for action in layout.names):
            raise WindquantError(f"{entry.file}: the actions of {name} are not those of config.json; {AGAIN}")
    owners = {name: layout for name, layout in layouts.items() if layout.owner}
    stored = [found[f"{name}.order"] for name in owners]
    orders = {}
    for (name, layout), entry, order in zip(owners.items(), stored, tensors(stored), strict=True):
        try:
            orders[name] = unpacked_order(layout, order)
        except WindquantError as error:
            raise WindquantError(f"{entry.file}: {name}.order: {error}") from error
    return orders


def check_plan(layouts: Mapping[str, Layout], plan: Plan, path: Path) -> None:
    """Refuse a plan that is not the one that the checkpoint was made from."""
    if plan.actions.keys() != layouts.keys():
        odd = sorted(plan.actions.keys() ^ layouts.keys())[0]
        raise WindquantError(f"{path}: plan and config.json do not have the same linears (e.g. {odd}); {AGAIN}")
    for name, layout in layouts.items():
        if tuple(plan.actions[name]) != layout.names:
            raise WindquantError(f"{path}: the actions of {name} are not those of config.json; {AGAIN}")
    predicted = sum(layout.bytes() for layout in layouts.values())
    if plan.bytes != predicted:
        raise WindquantError(f"{path}: the plan predicts {plan.bytes} bytes, the tensors take {predicted}; {AGAIN}")
