"""Random-sign Hadamard rotation inside a chunk: it makes the weights of a chunk look Gaussian.

R = diag(signs) Hadamard / sqrt(n), applied as W' = W R and x' = x R, so that W' x'^T = W x^T. The rotation never
crosses a chunk: saliency stays between chunks, where the allocation uses it (incoherence processing of QuIP#,
arXiv 2402.04396, kept local). A width that is no power of two is a row of Hadamard blocks, e.g. 47 = 32+8+4+2+1.
"""

from functools import lru_cache

import torch
from torch import Tensor

SEED = 0x57494E44  # part of the format: every reader draws the same signs


def blocks(width: int) -> list[int]:
    """Powers of two that add up to the width, largest first."""
    return [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]


@lru_cache(maxsize=64)
def rotation(width: int) -> Tensor:
    """The orthogonal matrix R [width, width], float32, the same for every chunk of that width."""
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(SEED)).float() * 2 - 1
    matrices = []
    for size in blocks(width):
        hadamard = torch.ones(1, 1)
        while len(hadamard) < size:  # Sylvester's construction
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        matrices.append(hadamard / size**0.5)
    return signs[:, None] * torch.block_diag(*matrices)
