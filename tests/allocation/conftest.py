"""Synthetic banks, and a hidden loss that the bank's additive model misses the way a real model does."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from windquant.bank import Bank
from windquant.plan import Units
from windquant.units import Linear, chunk_widths, protected_count

#: Nominal bits and relative error (of the chunk's energy) of every action.
ACTIONS = {
    "trellis-1": (1.0, 0.301),
    "trellis-1.5": (1.625, 0.16),
    "trellis-2": (2.0, 0.087),
    "trellis-3": (3.0, 0.024),
    "trellis-4": (4.0, 0.007),
    "int-8": (8.0, 3e-5),
    "skip": (16.0, 0.0),
}


def make_bank(
    layers: int = 30, hidden: int = 576, inner: int = 1536, key: int = 192, chunk: int = 64, seed: int = 0
) -> Bank:
    """A bank shaped like the embedded model's (2,340 units by default): predicted loss 3 to 4 nats at 2 bits."""
    random = np.random.default_rng(seed)
    shapes = {
        "q_proj": (hidden, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    linears, linear, position, width, energy = [], [], [], [], []
    sensitivity = []
    for layer in range(layers):
        for kind, (rows, columns) in shapes.items():
            block = "self_attn" if kind[0] in "qkvo" and kind != "up_proj" else "mlp"
            name = f"model.layers.{layer}.{block}.{kind}"
            group = "qkv" if kind[0] in "qkv" else "gateup" if kind in ("gate_proj", "up_proj") else kind
            linears.append(Linear(name, kind, layer, f"model.layers.{layer}.{group}", rows, columns))
            own = rows * np.exp(random.normal(0, 0.6) + 1.5 * (kind == "v_proj") + 1.0 * (layer in (0, layers - 1)))
            widths = chunk_widths(columns, protected_count(columns, 0.03), chunk)
            for index, columns_here in enumerate(widths):
                level = np.exp(-2.5 * index / len(widths) + 1.5 * (index == 0) + random.normal(0, 0.1))
                linear.append(len(linears) - 1)
                position.append(index)
                width.append(columns_here)
                energy.append(level)
                sensitivity.append(own * columns_here * level)
    base = np.array(sensitivity)
    rows_of = np.array([item.rows for item in linears])[np.array(linear)]
    weights = rows_of * np.array(width)
    bits = np.array([item[0] for item in ACTIONS.values()])
    noise = np.array([item[1] for item in ACTIONS.values()])
    size = np.ceil(weights[:, None] * bits / 8).astype(np.int64) + rows_of[:, None] * (bits < 16)
    errors = base[:, None] * noise * np.exp(random.normal(0, 0.05, (len(base), len(bits))))
    errors *= 3.5 / (base * 0.08).sum()
    protected = sum(protected_count(item.columns, 0.03) * item.rows + item.columns // 4 for item in linears)
    return Bank(
        model="synthetic", actions=list(ACTIONS), linears=linears, linear=np.array(linear, np.int32),
        position=np.array(position, np.int32), width=np.array(width, np.int32), energy=np.array(energy),
        errors=errors, bytes=size, fixed_bytes=protected, units=Units(chunk=chunk),
    )  # fmt: skip


@dataclass
class HiddenLoss:
    """A measured loss gap: hidden multipliers of the predicted errors, saturating in every layer and overall.

    The multipliers have a part per kind of linear, a part that bends with depth, one for the first chunk (all of them
    learnable from few measurements), and noise per linear and per unit (not learnable from few).
    """

    bank: Bank
    seed: int = 0
    noise: float = 0.3
    calls: int = 0

    def __post_init__(self) -> None:
        random = np.random.default_rng(1000 + self.seed)
        bank = self.bank
        kinds = sorted({item.kind for item in bank.linears})
        kind = np.array([kinds.index(item.kind) for item in bank.linears])[bank.linear]
        layer = np.array([item.layer for item in bank.linears])[bank.linear]
        depth = 2 * layer / max(1, layer.max()) - 1
        log = random.normal(0, 0.6, len(kinds))[kind]
        log += random.normal(0, 0.5) * depth + random.normal(0, 0.5) * depth**2
        log += random.normal(0, 0.6) * (bank.position == 0) + random.normal(0, 0.4) * (layer == 0)
        log += random.normal(0, self.noise, len(bank.linears))[bank.linear]
        log += random.normal(0, self.noise / 2, len(bank.linear))
        self.true = bank.errors * np.exp(log)[:, None] * np.exp(random.normal(0, 0.1, len(bank.actions)))
        self.layer = layer

    def __call__(self, choice: NDArray[np.int64]) -> float:
        """Loss gap in nats per token of the plan [U]."""
        self.calls += 1
        units = self.true[np.arange(len(choice)), choice]
        layers = np.bincount(self.layer, units)
        return float(1.1 * np.log1p(layers / 0.6).sum() ** 0.8)


@pytest.fixture(name="make_bank", scope="session")
def _make_bank() -> Callable[..., Bank]:
    return make_bank


@pytest.fixture(name="hidden_loss", scope="session")
def _hidden_loss() -> type[HiddenLoss]:
    return HiddenLoss


@pytest.fixture(scope="session")
def small_bank() -> Bank:
    """80 units of 2 layers."""
    return make_bank(layers=2, hidden=64, inner=160, key=32, chunk=16)


@pytest.fixture(scope="session")
def tiny_bank() -> Bank:
    """20 units of 1 layer."""
    return make_bank(layers=1, hidden=32, inner=64, key=16, chunk=12)
