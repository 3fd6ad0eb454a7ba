"""Triton kernels for packed weights; docs/performance.md says what they do and how fast.

    decoding.py, product.py, dequantize.py, quantize.py    the kernels
    launches.py, chunks.py                                 what calls them, with tensors in and out

This file decides where they run, and imports neither Triton nor a GPU.
"""

import os

import torch

from windquant.errors import WindquantError

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
