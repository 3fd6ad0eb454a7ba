"""Where and how precisely the heavy passes run: the device, and BF16 where the processor multiplies it natively."""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


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
