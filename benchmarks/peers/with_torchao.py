"""torchao, weights only. Options: `dtype` (int2, int3, int4 ...) and `group_size`."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM

from benchmarks.peers import frame


def quantize(folder: Path, tokens: Tensor, options: frame.Options) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, options["dtype"]),
        granularity=PerGroup(options["group_size"]),
        mapping_type=MappingType.ASYMMETRIC,
    )
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and ".layers." in name)
    return model


def linears(model: nn.Module) -> Iterator[frame.Stored]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "__tensor_flatten__"):
            yield frame.Stored(name, module.weight.dequantize(), frame.bytes_of([module.weight]))


if __name__ == "__main__":
    frame.main(quantize, linears)
