"""optimum-quanto, weights only, with the group size that it picks itself. Option: `weights`, e.g. qint2."""

from collections.abc import Iterator
from pathlib import Path

import optimum.quanto as quanto
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers import frame


def quantize(folder: Path, tokens: Tensor, options: frame.Options) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    quanto.quantize(model, weights=getattr(quanto, options["weights"]), exclude="lm_head")
    quanto.freeze(model)
    return model


def linears(model: nn.Module) -> Iterator[frame.Stored]:
    for name, module in model.named_modules():
        if isinstance(module, quanto.QLinear):
            yield frame.Stored(name, module.weight.dequantize(), frame.bytes_of([module.weight]))


if __name__ == "__main__":
    frame.main(quantize, linears)
