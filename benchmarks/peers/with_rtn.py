"""Round to nearest, the trivial peer: per row and group, minimum and maximum become the lowest and highest code.

Options: `bits`, `group_size`, `minimum`. Stored are the codes, an FP16 scale, and a zero point of as many bits as a
code or, with `minimum`, the minimum in FP16.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers import frame


def quantize(folder: Path, tokens: Tensor, options: frame.Options) -> list[frame.Stored]:
    tensors = load_file(folder / "model.safetensors")
    return [
        round_to_nearest(name.removesuffix(".weight"), tensors[name].float(), **options)
        for name in sorted(frame.decoder_weights(tensors))
    ]


def round_to_nearest(name: str, weight: Tensor, bits: int, group_size: int, minimum: bool = False) -> frame.Stored:
    groups = weight.reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    if not minimum:  # a zero point stands for 0, so 0 has to be in the range
        low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float16).smallest_normal).half().float()
    zero = -low.half().float() / scale if minimum else (-low / scale).round().clamp(0, top)
    codes = (groups / scale + zero).round().clamp(0, top)
    stored_bits = codes.numel() * bits + scale.numel() * (16 + (16 if minimum else bits))
    return frame.Stored(name, ((codes - zero) * scale).view_as(weight), -(-stored_bits // 8))


def linears(quantized: list[frame.Stored]) -> Iterator[frame.Stored]:
    yield from quantized


if __name__ == "__main__":
    frame.main(quantize, linears)
