"""bitsandbytes, 4 bits in blocks of 64. Options: `type` (nf4, fp4), `double` (scales in 8 bits too)."""

from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers import frame


def quantize(folder: Path, tokens: Tensor, options: frame.Options) -> nn.Module:
    def make(name: str, linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_type=options["type"],
            compress_statistics=options["double"],
        )
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")  # this is what quantizes

    return frame.replace(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16), make)


def linears(model: nn.Module) -> Iterator[frame.Stored]:
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            state = weight.quant_state
            # The 16 values of the number format and the name of it are the same for every weight.
            nested = [state.state2.absmax, state.offset] if state.nested else []
            stored = frame.bytes_of([weight.data, state.absmax, *nested])
            yield frame.Stored(name, bnb.functional.dequantize_4bit(weight.data, state), stored)


if __name__ == "__main__":
    frame.main(quantize, linears)
