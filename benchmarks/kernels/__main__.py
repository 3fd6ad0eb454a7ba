"""Time the kernels and their public peers on this GPU; docs/performance.md says what came out.

    python -m benchmarks.kernels --output benchmarks/kernels/h200.json
    python -m benchmarks.kernels.draw benchmarks/kernels/h200.json docs/kernels.svg

Needs torch, triton, numpy, safetensors and this checkout; weights are random, made in packed form. --tiny runs it all
on small shapes, also without a GPU (TRITON_INTERPRET=1): its times mean nothing.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.kernels import peers
from benchmarks.kernels.decoder import Decoder, Shape, dense_layer, packed_layer
from benchmarks.kernels.random_weights import layout_of, random_order, random_tensors
from benchmarks.kernels.timing import copies_of, copy_bandwidth, seconds
from windquant.kernels.launches import Launch
from windquant.packed import Format, Layout, dequantize

FORM = Format(chunk=64, protected=0.0, window=12, dtype=torch.bfloat16)
SHAPES = {  # rows, columns
    "8192 x 28672": (8192, 28672),  # Llama-3-70B down
    "28672 x 8192": (28672, 8192),  # Llama-3-70B gate and up
    "8192 x 8192": (8192, 8192),  # Llama-3-70B q and o
    "4096 x 4096": (4096, 4096),  # Llama-2-7B q, k, v and o; Llama-3-8B q and o
    "11008 x 4096": (11008, 4096),  # Llama-2-7B gate and up
    "4096 x 11008": (4096, 11008),  # Llama-2-7B down
    "1024 x 4096": (1024, 4096),  # Llama-3-8B k and v
    "14336 x 4096": (14336, 4096),  # Llama-3-8B gate and up
    "4096 x 14336": (4096, 14336),  # Llama-3-8B down
}
PLANS = {
    "scalar 1.6": ["scalar-1.5"],
    "scalar 2": ["scalar-2"],
    "scalar 3": ["scalar-3"],
    "scalar 4": ["scalar-4"],
    "trellis 1.6": ["trellis-2", "trellis-1", "trellis-2", "trellis-1", "trellis-2"],
    "trellis 2": ["trellis-2"],
    "trellis 2.5": ["trellis-2.5"],
    "trellis 3": ["trellis-3"],
    "trellis 3.5": ["trellis-3.5"],
    "trellis 4": ["trellis-4"],
    "mixed 2": ["trellis-3", "trellis-2", "trellis-2", "trellis-1.5", "trellis-1.5"],
}
BATCHES = (1, 4, 16)
TINY = {"96 x 160": (96, 160)}


def packed(rows: int, columns: int, names: list[str], generator: torch.Generator) -> tuple[Launch, Layout, Any]:
    layout = layout_of(rows, columns, FORM, names)
    order = random_order(layout, torch.Generator().manual_seed(0))
    tensors = random_tensors(layout, order, generator)
    return Launch([layout], [tensors], order.to(generator.device), [None]), layout, (tensors, order)


def error(launch: Launch, layout: Layout, made: Any, x: Tensor) -> float:
    """Relative error of the product to one in float64 with the weight of the torch reference."""
    tensors, order = made
    weight = dequantize(layout, tensors, order.to(x.device))
    expected = x.double() @ weight.double().T
    return ((launch(x)[0].double() - expected).norm() / expected.norm()).item()


def rows(
    shapes: dict[str, tuple[int, int]], generator: torch.Generator, left: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """One measurement after the other, ours and the peers', while there is time left."""
    device = generator.device
    for shape, (count, columns) in shapes.items():
        inputs = {
            batch: torch.randn(batch, columns, generator=generator, device=device).bfloat16() for batch in BATCHES
        }
        for plan, names in PLANS.items():
            row: dict[str, Any] = {"shape": shape, "what": f"windquant {plan}"}
            if not left():
                yield row | {"reason": "out of time"}
                continue
            try:
                many = copies_of(layout_of(count, columns, FORM, names).bytes(), device)
                made = [packed(count, columns, names, generator) for _ in range(many)]
                launch, layout, stored = made[0]
                row |= {"bytes": layout.bytes(), "effective_bits": 8 * layout.bytes() / layout.linear.weights}
                for batch, x in inputs.items():
                    wrong = error(launch, layout, stored, x) if count * columns <= 1 << 26 else None
                    taken = seconds([partial(launch, x) for launch, _, _ in made], device)
                    yield row | {"batch": batch, "seconds": taken, "error": wrong}
            except Exception as reason:  # the others are still worth measuring
                yield row | {"reason": f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"}
        for name, (make, bits) in peers.PEERS.items():
            row = {"shape": shape, "what": name, "effective_bits": bits}
            if not left():
                yield row | {"reason": "out of time"}
                continue
            try:
                many = copies_of(int(count * columns * bits / 8), device)
                weights = [
                    torch.randn(count, columns, generator=generator, device=device).bfloat16() / columns**0.5
                    for _ in range(many)
                ]
                made_peers = [make(weight) for weight in weights]
                for batch, x in inputs.items():
                    taken = seconds([partial(peer, x) for peer in made_peers], device)
                    yield row | {"batch": batch, "seconds": taken}
            except Exception as reason:
                yield row | {"reason": f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"}


def decoders(shape: Shape, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Tokens a second of a whole decoder: BF16, and packed at several plans."""
    for what, names in {"cuBLAS BF16": [], **PLANS}.items():
        if what not in ("cuBLAS BF16", "scalar 2", "trellis 2", "mixed 2"):
            continue
        try:
            taken = seconds_of_token(shape, names, generator)
            yield {"what": f"windquant {what}" if names else what, "tokens_per_second": 1 / taken}
        except Exception as reason:
            yield {"what": what, "reason": f"{type(reason).__name__}: {reason}"}
        finally:
            if generator.device.type == "cuda":
                torch.cuda.empty_cache()


def seconds_of_token(shape: Shape, names: list[str], generator: torch.Generator) -> float:
    """What a decoder with these actions takes for a token; without any, one with BF16 weights."""
    device = generator.device
    layers = [
        packed_layer(shape, device, FORM, names, generator) if names else dense_layer(shape, device)
        for _ in range(shape.layers)
    ]
    decoder = Decoder(shape, layers, device)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    place = torch.ones(1, dtype=torch.int64, device=device)
    return seconds([partial(decoder, token, place)], device)


def machine(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else f"{platform.processor()} (Triton's interpreter: the times mean nothing)",
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "peers": {name: peers.found(name) for name in peers.PEERS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--seconds", type=float, default=420, help="start nothing new after these (default %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    start = time.monotonic()
    result = machine(device) | {"copy_bandwidth": copy_bandwidth(device)}
    shape = Shape(1, 64, 96, 2, 32, 16) if options.tiny else Shape()
    result["decoders"] = list(decoders(shape, generator))
    result["products"] = []
    for row in rows(TINY if options.tiny else SHAPES, generator, lambda: time.monotonic() - start < options.seconds):
        if "bytes" in row and "seconds" in row:
            row["share_of_copy"] = row["bytes"] / row["seconds"] / result["copy_bandwidth"]
        result["products"].append(row)
        print(json.dumps(row), flush=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")  # after every row: a time limit loses nothing
    print(json.dumps(result["decoders"], indent=1))


if __name__ == "__main__":
    main()
