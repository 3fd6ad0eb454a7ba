"""Time the attention of short windows against torch's own on the CPU; docs/decisions.md says what came out.

python -m benchmarks.kernels.attention --threads 1
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.timing import seconds
from windquant.attention import causal_attention

#: Batch, heads, key heads, length and head size: SmolLM2-135M's, then LLaMA 3's.
SHAPES = [(1, 9, 3, length, 64) for length in (128, 256, 512, 1024, 2048)] + [(1, 32, 8, 512, 128)]


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def call(function: Callable[[Tensor, Tensor, Tensor], Tensor], states: list[Tensor], backward: bool) -> None:
    """With or without the gradients of query, key and value."""
    with torch.set_grad_enabled(backward):
        found = function(*states)
    if backward:
        torch.autograd.grad(found, states, torch.ones_like(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print("batch, heads, key heads, length, size | torch's, ours, ms forward | ... with gradients")
    for batch, heads, key_heads, length, size in SHAPES:
        shapes = [(batch, count, length, size) for count in (heads, key_heads, key_heads)]
        states = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
        times = [
            1000 * seconds([partial(call, function, states, backward)] * 10, torch.device("cpu"))
            for backward in (False, True)
            for function in (torchs, causal_attention)
        ]
        print(batch, heads, key_heads, length, size, "| {:.1f}, {:.1f} | {:.1f}, {:.1f}".format(*times), flush=True)


if __name__ == "__main__":
    main()
