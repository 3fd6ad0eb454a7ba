"""Kernels for packed weights, Triton's for a GPU and numba's for a CPU; docs/performance.md says how fast they are.

    decoding.py, product.py, dequantize.py, quantize.py    Triton's
    launches.py, chunks.py                                 what calls those, with tensors in and out
    cpu.py, compiled.py, machine_code.py                   numba's: what calls it, what it compiles, where that is kept

This file decides where they run, by the type of the device alone, and imports neither Triton nor numba nor a GPU.
"""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from windquant.errors import WindquantError
from windquant.packed import Layout
from windquant.quantizers import Coded, Fit, Treatment
from windquant.quantizers.scalar import Scalar
from windquant.quantizers.trellis import Trellis
from windquant.storage import Pattern, pack as pack_on_cpu

OLDEST = (8, 0)  # compute capability: the first with bfloat16
DTYPES = (torch.bfloat16, torch.float16)  # of activations
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter: slow, for tests on a CPU


def check(device: torch.device) -> None:
    """Refuse a GPU that is too old; WindquantError names it."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < OLDEST:
        raise WindquantError(
            f"{torch.cuda.get_device_name(device)}: compute capability {found[0]}.{found[1]}, packed checkpoints need "
            f'{OLDEST[0]}.{OLDEST[1]} or newer; load with device_map="cpu"'
        )


def serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels multiply activations of that dtype there."""
    return dtype in DTYPES and (device.type == "cuda" or INTERPRETED)


def decode(
    layout: Layout, tensors: Mapping[str, Tensor], order: Tensor, dtype: torch.dtype, threads: int | None = None
) -> Tensor:
    """The weight [rows, columns] that stored tensors stand for, where they are; `packed.dequantize` is the reference.

    threads: on a CPU, as many as torch uses unless given.
    """
    if order.device.type == "cpu":
        from windquant.kernels import cpu

        return cpu.decode(layout, tensors, order, dtype, threads or torch.get_num_threads())
    from windquant.kernels.launches import Launch

    found = Launch([layout], [tensors], order, [None]).weight(0, dtype)
    return found.index_select(1, torch.argsort(order))


def quantize_on(device: torch.device) -> bool:
    """Whether chunks are fitted, encoded and packed by Triton's kernels there; else by their treatments, on the CPU."""
    return device.type == "cuda"


def fit(entry: Treatment, columns: Tensor, energy: Tensor) -> Fit:
    """`Treatment.fit` of a chunk given as its columns [width, rows], where they are."""
    if isinstance(entry, Scalar) and quantize_on(columns.device):
        from windquant.kernels import chunks

        return chunks.fit(entry, columns, energy)
    found = entry.fit(columns.T.cpu(), energy.cpu())
    offset = found.offset
    return Fit(found.scale.to(columns.device), None if offset is None else offset.to(columns.device))


def encode(entry: Treatment, columns: Tensor, found: Fit, importance: Tensor, feedback: Tensor) -> Coded:
    """`Treatment.encode` of columns [width, rows], where they are; they are left as they were."""
    if isinstance(entry, Scalar | Trellis) and quantize_on(columns.device):
        from windquant.kernels import chunks

        return chunks.encode(entry, columns, found, importance, feedback)
    near = Fit(found.scale.cpu(), None if found.offset is None else found.offset.cpu())
    coded = entry.encode(columns.to("cpu", copy=True), near, importance.cpu(), feedback.cpu().contiguous())
    return Coded(*(part.to(columns.device) for part in (coded.codes, coded.decoded, coded.errors)))


def pack(codes: Tensor, pattern: Pattern) -> Tensor:
    """`storage.pack` of codes uint8 [columns, rows], where they are."""
    if quantize_on(codes.device):
        from windquant.kernels import chunks

        return chunks.pack(codes, pattern)
    return pack_on_cpu(codes, pattern)
