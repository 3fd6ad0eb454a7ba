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
    matrices = []
    for size in blocks(width):
        hadamard = torch.ones(1, 1)
        while len(hadamard) < size:  # Sylvester's construction
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        matrices.append(hadamard / size**0.5)
    return _signs(width)[:, None] * torch.block_diag(*matrices)


@lru_cache(maxsize=64)
def _signs(width: int) -> Tensor:
    return torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(SEED)).float() * 2 - 1


@lru_cache(maxsize=64)
def unrotation(width: int) -> Tensor:
    """What every column is multiplied by once `unrotate` has added and subtracted, float32 [width]."""
    return _signs(width) * torch.cat([torch.full((size,), size**-0.5) for size in blocks(width)])


def unrotate(values: Tensor) -> Tensor:
    """W' R^T, that is W, for W' float32 [..., width]: Hadamard's butterflies, log2(width) sums for each value.

    The order of the sums is part of the reference: the compiled decoder (kernels/cpu.py) has the same.
    """
    parts = []
    for part in values.split(blocks(values.shape[-1]), -1):
        half = 1
        while half < part.shape[-1]:
            pairs = part.unflatten(-1, (-1, 2, half))
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            part = torch.stack([first + second, first - second], -2).flatten(-3)
            half *= 2
        parts.append(part)
    return torch.cat(parts, -1) * unrotation(values.shape[-1]).to(values.device)
