"""A decoder of LLaMA's shape with random weights, one token at a time over a static cache, for CUDA graphs.

As little as there can be around the linears, the same for BF16 and packed weights, so that their times compare.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kernels.random_weights import layout_of, random_order, random_tensors
from windquant.checkpoint.fused import Fused
from windquant.checkpoint.linear import PackedLinear
from windquant.packed import Format


@dataclass(frozen=True)
class Shape:
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    context: int = 256

    @property
    def groups(self) -> list[tuple[int, dict[str, int]]]:
        """Columns, and rows by name, of the linears of a layer that read one input."""
        return [
            (self.hidden, dict.fromkeys("qkv", self.hidden)),
            (self.hidden, {"o": self.hidden}),
            (self.hidden, {"gate": self.intermediate, "up": self.intermediate}),
            (self.intermediate, {"down": self.hidden}),
        ]


def dense_layer(shape: Shape, device: torch.device) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    for columns, rows in shape.groups:
        for name, count in rows.items():
            made[name] = nn.Linear(columns, count, bias=False, dtype=torch.bfloat16, device=device)
    return made


def packed_layer(
    shape: Shape, device: torch.device, form: Format, names: list[str], generator: torch.Generator
) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    for columns, rows in shape.groups:
        owner = next(iter(rows))
        layouts = [layout_of(count, columns, form, names, name, owner) for name, count in rows.items()]
        order = random_order(layouts[0], torch.Generator().manual_seed(0))
        fused = Fused(layouts)
        for layout in layouts:
            module = PackedLinear(layout, False, torch.bfloat16, device)
            tensors = {key: tensor.to(device) for key, tensor in random_tensors(layout, order, generator).items()}
            module.connect(tensors, order.to(device), fused, low_memory=False)
            made[layout.linear.name] = module
    return made


class Decoder(nn.Module):
    """`forward(token [1], place [1])` -> the next token [1]; keys and values of earlier places stay in the cache."""

    def __init__(self, shape: Shape, layers: list[dict[str, nn.Module]], device: torch.device) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(nn.ModuleDict(layer) for layer in layers)
        size = (shape.layers, shape.heads, shape.context, shape.hidden // shape.heads)
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self.keys, self.values = nn.Buffer(torch.zeros(size, **kind)), nn.Buffer(torch.zeros(size, **kind))
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden, **kind)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, **kind)
        turns = torch.arange(shape.context)[:, None] * 1e4 ** -torch.linspace(0, 1, size[-1] // 2 + 1)[:-1]
        self.angles = nn.Buffer(torch.stack([turns.cos(), turns.sin()], 1).to(device))

    @torch.no_grad()
    def forward(self, token: Tensor, place: Tensor) -> Tensor:
        shape = self.shape
        x = self.embedding(token)
        mask = torch.arange(shape.context, device=x.device) <= place
        for index, layer in enumerate(self.layers):
            linears = dict(layer.named_children())
            normal = functional.rms_norm(x, x.shape[-1:])
            q, k, v = (linears[name](normal).view(shape.heads, 1, -1) for name in "qkv")
            self.keys[index].index_copy_(1, place, self._turn(k, place))
            self.values[index].index_copy_(1, place, v)
            seen = functional.scaled_dot_product_attention(
                self._turn(q, place)[None], self.keys[index][None], self.values[index][None], mask[None, None, None]
            )
            x = x + linears["o"](seen.reshape(1, -1))
            normal = functional.rms_norm(x, x.shape[-1:])
            x = x + linears["down"](functional.silu(linears["gate"](normal)) * linears["up"](normal))
        return self.head(functional.rms_norm(x, x.shape[-1:])).argmax(-1)

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        """Rotary embedding of [heads, 1, size]."""
        cosine, sine = self.angles[place][0]
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)
