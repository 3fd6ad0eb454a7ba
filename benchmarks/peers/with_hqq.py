"""HQQ: half-quadratic quantization, without calibration. Options: `bits`, `group_size`, `axis`."""

from collections.abc import Iterator
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers import frame


def quantize(folder: Path, tokens: Tensor, options: frame.Options) -> nn.Module:
    config = BaseQuantizeConfig(nbits=options["bits"], group_size=options["group_size"], axis=options["axis"])

    def make(name: str, linear: nn.Linear) -> nn.Module:
        return HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")

    return frame.replace(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16), make)


def linears(model: nn.Module) -> Iterator[frame.Stored]:
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            # Not its state_dict: that encodes every Python number as a tensor of eight bytes.
            stored = frame.bytes_of([module.W_q, module.meta["scale"], module.meta["zero"]])
            yield frame.Stored(name, module.dequantize(), stored)


if __name__ == "__main__":
    frame.main(quantize, linears)
