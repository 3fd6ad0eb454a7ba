"""Where and how precisely the heavy passes run: the device, and BF16 where the processor multiplies it natively."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from windquant.errors import WindquantError

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def move(model: M) -> M:
    """The model on the device."""
    nn.Module.to(model, device())
    return model


def native_bfloat16() -> bool:
    """Whether BF16 matrix products are faster than FP32 ones here (two to three times, where they are native)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast() -> AbstractContextManager[object]:
    """BF16 products with FP32 parameters for passes whose noise averages out: statistics, search and distillation.

    Perplexity is never measured under it.
    """
    return torch.autocast(device().type, torch.bfloat16) if native_bfloat16() else nullcontext()


def with_smaller_batches(batch: int, compute: Callable[[int], T]) -> T:
    """`compute(batch)`; where the GPU's memory does not suffice, again with half the batch, and says so.

    Raises WindquantError where a batch of one does not fit.
    """
    while True:
        try:
            return compute(batch)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
        if batch == 1:
            raise WindquantError(f"out of GPU memory with a batch of 1 ({reason}); use a GPU with more, or the CPU")
        batch //= 2  # outside of `except`: the error's traceback holds what filled the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"out of GPU memory ({reason}): again with a batch of {batch}", file=sys.stderr, flush=True)
