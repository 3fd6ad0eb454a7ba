"""Seconds of an operation on the device, and the bandwidth of a copy to compare it with."""

import time
from collections.abc import Callable, Sequence

import torch

COLD = 256 << 20  # bytes that a measurement walks through, several times the L2 of any GPU so far


def copies_of(size: int, device: torch.device) -> int:
    """How many weights of so many bytes a measurement takes in turn, so that none is still in the cache."""
    return max(1, min(64, -(-COLD // size))) if device.type == "cuda" else 1


def seconds(operations: Sequence[Callable[[], object]], device: torch.device, repeats: int = 20) -> float:
    """Median over `repeats` of the mean time of the operations in a row; on a GPU they are one CUDA graph."""
    for operation in operations:  # compiles, and builds the tables
        operation()
    if device.type != "cuda":
        start = time.perf_counter()
        for operation in operations:
            operation()
        return (time.perf_counter() - start) / len(operations)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for operation in operations:
            operation()
    for _ in range(3):
        graph.replay()
    taken = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return sorted(taken)[len(taken) // 2] / len(operations)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of ten copies of 2 GiB (of 32 MiB on a CPU)."""
    size = 2 << 30 if device.type == "cuda" else 32 << 20
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds([lambda: target.copy_(source)], device, 1) for _ in range(10))
