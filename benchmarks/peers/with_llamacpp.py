"""llama.cpp's own quantization functions, called in the library that the package xllamacpp ships.

Option: `type`, e.g. iq2_xxs. All matrices get that type, as with `llama-quantize --pure`; rows that its block does not
divide get iq4_nl, as there. The importance matrix is llama.cpp's: the mean squared activation of every column.
"""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import xllamacpp.xllamacpp as library
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers import frame

LIBRARY = ctypes.CDLL(library.__file__)
LIBRARY.ggml_type_name.restype = ctypes.c_char_p
LIBRARY.ggml_blck_size.restype = ctypes.c_int64
LIBRARY.ggml_row_size.restype = ctypes.c_size_t
LIBRARY.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
LIBRARY.ggml_quantize_chunk.restype = ctypes.c_size_t
LIBRARY.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
TYPES = {LIBRARY.ggml_type_name(number).decode().lower(): number for number in range(43)}
FALLBACK = "iq4_nl"


def quantize(folder: Path, tokens: Tensor, options: frame.Options) -> list[frame.Stored]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    }
    energies = energy(model, modules, tokens)
    return [pack(name, module.weight, energies[name], options["type"]) for name, module in modules.items()]


@torch.no_grad()
def energy(model: nn.Module, modules: dict[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    """Mean squared activation [columns] of every linear's input."""
    sums = {name: torch.zeros(module.in_features) for name, module in modules.items()}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            sums[name] += arguments[0].flatten(0, -2).square().sum(0)

        return add

    for name, module in modules.items():
        module.register_forward_pre_hook(hook(name))
    for batch in tokens.split(8):
        model(batch, use_cache=False)
    return {name: total / tokens.numel() for name, total in sums.items()}


@torch.no_grad()
def pack(name: str, weight: Tensor, importance: Tensor, kind: str) -> frame.Stored:
    rows, columns = weight.shape
    if columns % LIBRARY.ggml_blck_size(TYPES[kind]):
        kind = FALLBACK
    number = TYPES[kind]
    weight, importance = weight.contiguous(), importance.contiguous()
    packed = torch.empty(rows * LIBRARY.ggml_row_size(number, columns), dtype=torch.uint8)
    size = LIBRARY.ggml_quantize_chunk(
        number, weight.data_ptr(), packed.data_ptr(), 0, rows, columns, importance.data_ptr()
    )
    decoded = torch.empty_like(weight)
    decode = getattr(LIBRARY, f"dequantize_row_{kind.replace('_k', '_K')}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(packed.data_ptr(), decoded.data_ptr(), weight.numel())
    return frame.Stored(name, decoded, size)


def linears(quantized: list[frame.Stored]) -> Iterator[frame.Stored]:
    yield from quantized


if __name__ == "__main__":
    frame.main(quantize, linears)
