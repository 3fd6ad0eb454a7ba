"""A packed linear layer: stored tensors as they lie on disk, and the product with what they stand for."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from windquant import kernels
from windquant.checkpoint.files import unpacked_order
from windquant.checkpoint.fused import Fused
from windquant.packed import Layout


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` of the original model stood.

    The stored tensors are buffers named as in `Layout.shapes`, and keep their dtypes and bits whatever the model is
    cast to. `connect` hands them and the column order over once the model is loaded. Where Triton's kernels run, a call
    reads the packed tensors themselves (fused.py); elsewhere the weight is decoded once, or at every call where
    `low_memory` is set.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        layout: Layout,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        allocated: Iterable[str] = (),
    ) -> None:
        """dtype: of bias and decoded weight. allocated: names of stored tensors for others to fill before `connect`."""
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.linear.columns, layout.linear.rows
        self.dtype = dtype  # of the decoded weight
        for name in allocated:
            shape, stored = layout.shapes[name]
            self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))
        rows = torch.empty(self.out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(rows, requires_grad=False) if bias else None)
        self.register_buffer("column_order", None, persistent=False)  # int64 [columns], shared by the group
        self.register_buffer("dense", None, persistent=False)  # [rows, columns]
        self.fused: Fused | None = None
        self.low_memory = False
        self.register_load_state_dict_post_hook(_reloaded)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name: all of them, once connected."""
        return {name: getattr(self, name) for name in self.layout.shapes if name in self._buffers}

    def connect(self, tensors: Mapping[str, Tensor], order: Tensor, fused: "Fused", low_memory: bool) -> None:
        """Take the stored tensors that were not allocated, the column order, int64 [columns], and the group's part.

        All go where the codes are.
        """
        allocated = self.tensors
        device = allocated.get("codes", order).device
        for name in self.layout.shapes:
            if name not in allocated:
                self.register_buffer(name, tensors[name].to(device))
        self.column_order, self.fused, self.low_memory = order.to(device), fused, low_memory
        fused.add(self)

    def settle(self, threads: int | None = None) -> None:
        """Hold a decoded weight if, and only if, it is needed where the tensors are now."""
        if self.fused is None or self.get_buffer("codes").is_meta:
            return
        device = self.get_buffer("codes").device
        kernels.check(device)
        if self.low_memory or kernels.serve(device, self.dtype):
            self.dense = None
        elif self.dense is None:
            self.dense = self._decode(threads)

    def _decode(self, threads: int | None = None) -> Tensor:
        order = self.get_buffer("column_order")
        return kernels.decode(self.layout, self.tensors, order, self.dtype, threads)

    @property
    def weight(self) -> Tensor:
        """The decoded weight [rows, columns], natural column order; without memory until `connect`: some models look
        at it, when they are made.
        """
        if self.fused is None:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return self._decode() if self.dense is None else self.get_buffer("dense")

    def forward(self, x: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled() and x.requires_grad  # which the kernels are not
        packed = self.dense is None and x.dtype == self.dtype and kernels.serve(x.device, x.dtype)
        if packed and self.fused is not None and not differentiable:
            return self.fused(self, x)
        return functional.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """`.to`, `.half()` and the like: they move the stored tensors, and cast only the decoded weight and bias."""
        before = self.tensors
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        if self.fused is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["actions"].device)).dtype
            self.fused.forget()
        self.settle()
        return self

    def reload(self) -> None:
        """The stored tensors are others, of the same layout: what was made of them is void."""
        if self.fused is None:
            return
        self.fused.forget()
        members = [self]
        if self.layout.owner:  # of the column order of the whole group
            order = unpacked_order(self.layout, self.get_buffer("order")).to(self.get_buffer("codes").device)
            if not torch.equal(order, self.get_buffer("column_order")):
                members = self.fused.members
            for member in members:
                member.column_order = order
        for member in members:
            member.dense = None
            member.settle()

    def extra_repr(self) -> str:
        bits = 8 * self.layout.bytes() / self.layout.linear.weights
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits:.2f}"


def _reloaded(module: nn.Module, _: object) -> None:
    """A hook of load_state_dict."""
    if isinstance(module, PackedLinear):
        module.reload()
