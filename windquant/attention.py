"""Attention of short windows on a CPU in BF16, about twice as fast as torch's own kernel, or more.

That kernel goes through the keys block by block, so that no more than a block of scores is kept, and its small products
leave most of the processor's BF16 units unused. Scores of up to 512 tokens stay in the cache anyway: here they are one
product, with the heads that share keys as rows of one matrix. From 1024 tokens on torch's kernel is as fast, as it
leaves out what lies after a token (`python -m benchmarks.kernels.attention`).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from windquant import compute

LONGEST = 512  # tokens
SPECIAL = ("softcap", "position_bias", "cache")  # what else transformers may ask of an attention


def register() -> None:
    """Make it part of what transformers calls "sdpa", for all models of this process."""
    AttentionInterface.register("sdpa", forward)


def forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """[batch, length, heads, size] of query, key and value [batch, heads, length, size], as transformers asks."""
    causal = others.get("is_causal")
    if (
        (getattr(module, "is_causal", True) if causal is None else causal)
        and attention_mask is None
        and not others.get("dropout")
        and all(others.get(name) is None for name in SPECIAL)
        and 1 < query.shape[2] == key.shape[2] <= LONGEST
        and _in_bfloat16(query)
    ):
        return causal_attention(query, key, value, others.get("scaling")).transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    return result


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """softmax(query key^T scaling) value in BF16, where no token sees a later one.

    query: [batch, heads, length, size]; key, value: [batch, key heads, length, size], of consecutive heads each;
    scaling: 1 / sqrt(size) if there is none. Returns BF16 [batch, heads, length, size of value].
    """
    batch, heads, length, size = query.shape
    shared = heads // key.shape[1]
    rows = query.bfloat16().reshape(-1, shared * length, size)
    keys, values = (tensor.bfloat16().reshape(-1, *tensor.shape[2:]) for tensor in (key, value))
    later = torch.full((length, length), -math.inf, dtype=torch.bfloat16).triu(1).repeat(shared, 1)
    scale = 1 / math.sqrt(size) if scaling is None else scaling
    scores = torch.baddbmm(later, rows, keys.transpose(1, 2), alpha=scale)
    return (scores.softmax(-1) @ values).view(batch, heads, length, -1)


def _in_bfloat16(query: Tensor) -> bool:
    """Whether torch's kernel would compute this on a CPU in BF16, and the processor multiplies BF16."""
    if query.device.type != "cpu" or not compute.native_bfloat16():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return dtype == torch.bfloat16
