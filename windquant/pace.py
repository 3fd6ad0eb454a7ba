"""How fast this machine's processor multiplies: measured in a moment, for estimates."""

import time
from functools import cache

import torch

from windquant import processor

SIDE = 512  # of the matrices: small enough that a core finishes some products undisturbed


@cache
def products(seconds: float = 0.2) -> tuple[float, float]:
    """Operations a second of one core, of FP32 products and of those that may be BF16.

    The fastest of many products counts: the others waited for what else the machine does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounded = torch.bfloat16 if processor.this().fast_bfloat16 else torch.float32
    rates = _rate(torch.float32, seconds), _rate(rounded, seconds)
    torch.set_num_threads(threads)
    return rates


def _rate(dtype: torch.dtype, seconds: float) -> float:
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    times = [float("inf")]
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times)
