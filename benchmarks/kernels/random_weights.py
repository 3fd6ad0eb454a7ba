"""Packed weights made directly in packed form: random codes, scales and orders, no search."""

import itertools

import torch
from torch import Tensor

from windquant.packed import Format, Layout, chunk_order, code_bytes, pack_order
from windquant.quantizers import actions
from windquant.units import Linear, chunk_widths, protected_count


def layout_of(
    rows: int, columns: int, form: Format, names: list[str], name: str = "linear", group: str = "linear"
) -> Layout:
    """A layout whose chunks take the actions in turn."""
    count = len(chunk_widths(columns, protected_count(columns, form.protected), form.chunk))
    chosen = tuple(itertools.islice(itertools.cycle(names), count))
    return Layout(Linear(name, name, 0, group, rows, columns), chosen, form)


def random_order(layout: Layout, generator: torch.Generator) -> Tensor:
    """A column order, int64 [columns], on the CPU."""
    order = torch.randperm(layout.linear.columns, generator=generator)
    return chunk_order(order, layout.widths, layout.protected)


def random_tensors(layout: Layout, order: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Stored tensors of a weight whose entries are about 1 / sqrt(columns); on the generator's device.

    Every code is as likely as any other, but what is no code stays out: bytes above 242 of ternary chunks, and skipped
    weights that are not finite.
    """
    device = generator.device
    numbers = {name: number for number, name in enumerate(actions())}
    rows = layout.linear.rows
    tensors = {}
    for key, (shape, dtype) in layout.shapes.items():
        if dtype.is_floating_point:
            tensors[key] = torch.rand(shape, generator=generator, device=device).to(dtype)
        else:
            low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
            tensors[key] = torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.int16).to(
                dtype
            )
    tensors["actions"] = torch.tensor([numbers[name] for name in layout.names], dtype=torch.uint8, device=device)
    tensors["scale_grid"] = torch.tensor([-9.0 - layout.linear.columns.bit_length() / 2, 0.2], device=device).half()
    if layout.protected:
        tensors["protected_scales"] *= 2.0**-7 / layout.linear.columns**0.5
    place = 0
    for chunk in layout.storage_order:
        entry = layout.actions[chunk]
        size = code_bytes(entry, rows, layout.widths[chunk])
        codes = tensors["codes"][place : place + size]
        if entry.name == "scalar-1.5":
            codes.remainder_(243)
        elif entry.name == "skip":
            weights = torch.randn(size // 2, generator=generator, device=device) / layout.linear.columns**0.5
            codes.copy_(weights.to(layout.format.dtype).view(torch.uint8))
        place += size
    if layout.owner:
        tensors["order"] = pack_order(order, layout.widths, layout.protected).to(device)
    return tensors
