"""Public kernels beside ours: from a BF16 weight [rows, columns] on the GPU to a function of the activations.

A peer that cannot be imported, or does not take the shape, leaves its reason in the results.
"""

from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.nn import functional

Product = Callable[[Tensor], Tensor]


def cublas(weight: Tensor) -> Product:
    return lambda x: functional.linear(x, weight)


def _linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    module.weight.data.copy_(weight)
    return module


def bitsandbytes(weight: Tensor) -> Product:
    from bitsandbytes.nn import Linear4bit, Params4bit

    module = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    module.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    return module.to(weight.device)


def torchao(weight: Tensor) -> Product:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    module = _linear(weight)
    quantize_(module, Int4WeightOnlyConfig(group_size=64))
    return module


def hqq(weight: Tensor) -> Product:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(_linear(weight), config, compute_dtype=weight.dtype, device=str(weight.device))


def gemlite(weight: Tensor) -> Product:
    from gemlite.helper import A16W4_HQQ_INT

    return A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype).from_weights(weight, bias=None)


PEERS: dict[str, tuple[Callable[[Tensor], Product], float]] = {  # name: what makes it, bits a weight of its codes
    "cuBLAS BF16": (cublas, 16),
    "gemlite int4": (gemlite, 4),
    "torchao int4": (torchao, 4),
    "bitsandbytes nf4": (bitsandbytes, 4),
    "hqq int4": (hqq, 4),
}


def found(name: str) -> str:
    """Version of a peer's package, or why there is none."""
    package = name.split()[0]
    if package == "cuBLAS":
        return f"CUDA {torch.version.cuda}"
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"
