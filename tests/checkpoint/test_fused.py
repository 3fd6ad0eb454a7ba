"""Linears that share a launch: each thread of a server gets the products of its own input."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from windquant.checkpoint.fused import Fused

SECONDS = 1.0


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads take turns as often as Python allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("impatient")
def test_threads_do_not_take_each_others_products() -> None:
    generator = torch.Generator().manual_seed(0)
    fused: Any = Fused([])  # of plain linears, with torch's products: the kernels need a GPU
    fused._launch = lambda numbers: lambda x: [nn.functional.linear(x, fused.members[n].weight) for n in numbers]
    for _ in range(3):
        member = nn.Linear(8, 4, bias=False)
        member.weight = nn.Parameter(torch.randn(4, 8, generator=generator), requires_grad=False)
        fused.add(member)

    def wrong(seed: int) -> int:
        own, count = torch.Generator().manual_seed(seed), 0
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            x = torch.randn(1, 8, generator=own)
            for member in fused.members:
                count += not torch.allclose(fused(member, x), x @ member.weight.T)
        return count

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(wrong, range(4))) == 0
