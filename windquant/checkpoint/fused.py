"""Packed linears that read the same input (q/k/v, gate/up) are multiplied by Triton's kernels in one launch.

The first of them that is called computes the products of all; the others find theirs waiting if they are called with
the very same tensor, unchanged. More than 16 activations are multiplied by a decoded weight, which is let go.
"""

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from windquant.packed import Layout

if TYPE_CHECKING:
    from windquant.checkpoint.linear import PackedLinear
    from windquant.kernels.launches import Launch


class Waiting(threading.local):
    """Of each thread: products that their linears have not asked for yet, and the input of those with its version."""

    def __init__(self) -> None:
        self.products: dict[int, Tensor] = {}
        self.source: tuple[weakref.ref[Tensor], int] | None = None


class Fused:
    """A group of packed linears; `layouts` are those of the whole model, whose actions one compiled kernel serves."""

    def __init__(self, layouts: Iterable[Layout]) -> None:
        self.layouts = list(layouts)
        self.members: list[PackedLinear] = []
        self.forget()

    def add(self, member: "PackedLinear") -> None:
        self.members.append(member)

    def forget(self) -> None:
        """The tensors have moved: tables that hold their addresses are void."""
        self._launches: dict[tuple[int, ...], Launch] = {}
        self._waiting = Waiting()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own, and makes tables of their addresses when it needs them."""
        return {"layouts": self.layouts, "members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    @torch.compiler.disable
    def __call__(self, member: "PackedLinear", x: Tensor) -> Tensor:
        """x [..., columns] times the member's weight, plus its bias: [..., rows]."""
        from windquant.kernels.launches import BATCH

        number = self.members.index(member)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if len(flat) > BATCH:
            weight = self._launch((number,)).weight(0, x.dtype)
            y = functional.linear(flat[:, member.get_buffer("column_order")], weight, member.bias)
        elif len(flat) == 0:
            y = x.new_empty(0, member.out_features)
        elif x.is_inference():  # has no version: a change between two calls would not be seen
            y = self._launch((number,))(flat)[0]
        else:
            waiting = self._waiting
            if waiting.source is None or waiting.source[0]() is not x or waiting.source[1] != x._version:
                waiting.products.clear()
            if number not in waiting.products:
                waiting.products = dict(enumerate(self._launch(tuple(range(len(self.members))))(flat)))
                waiting.source = weakref.ref(x), x._version
            y = waiting.products.pop(number)
        return y.view(*x.shape[:-1], member.out_features)

    def _launch(self, numbers: tuple[int, ...]) -> "Launch":
        if numbers not in self._launches:
            from windquant.kernels.launches import Launch, present

            chosen = [self.members[number] for number in numbers]
            self._launches[numbers] = Launch(
                [member.layout for member in chosen],
                [member.tensors for member in chosen],
                chosen[0].get_buffer("column_order"),
                [member.bias for member in chosen],
                present(self.layouts),
            )
        return self._launches[numbers]
