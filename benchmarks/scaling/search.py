"""Seconds of the PPO search on a synthetic bank: units and episodes as asked, measured losses free.

    python -m benchmarks.scaling.search --units 2400,24000 --episodes 16

The bank has the units of a 70B model at chunks of 256 columns (80 layers of 304), or a part of its layers. A plan's
measured loss is here the bank's own prediction: what is timed is the search alone.
"""

import argparse
import time

import numpy as np

from windquant.allocation.ppo import search
from windquant.allocation.settings import SearchSettings
from windquant.bank import Bank
from windquant.packed import unit_bytes
from windquant.plan import Units
from windquant.quantizers import action, menu
from windquant.units import Linear

KINDS = {"q_proj": (8192, 8192), "k_proj": (1024, 8192), "v_proj": (1024, 8192), "o_proj": (8192, 8192),
         "gate_proj": (28672, 8192), "up_proj": (28672, 8192), "down_proj": (8192, 28672)}  # fmt: skip
CHUNK = 256


def bank(units: int, seed: int = 0) -> Bank:
    """At least `units` units: whole layers of a Llama-3-70B."""
    chance = np.random.default_rng(seed)
    names = menu("trellis")
    form = Units(chunk=CHUNK).format()
    entries = [action(name, form.window, form.dtype) for name in names]
    linears: list[Linear] = []
    linear: list[int] = []
    position: list[int] = []
    sizes: list[list[int]] = []
    while len(linear) < units:
        layer = len(linears) // len(KINDS)
        for kind, (rows, columns) in KINDS.items():
            name = f"model.layers.{layer}.{kind}"
            for place in range(columns // CHUNK):
                linear.append(len(linears))
                position.append(place)
                sizes.append([unit_bytes(entry, rows, CHUNK) for entry in entries])
            linears.append(Linear(name, kind, layer, name, rows, columns))
    energy = np.exp(chance.normal(size=len(linear))) / (1 + np.array(position))
    bits = np.array([entry.bits for entry in entries])
    errors = energy[:, None] * 4.0**-bits * 1e-4
    return Bank("synthetic", names, linears, np.array(linear, np.int32), np.array(position, np.int32),
                np.full(len(linear), CHUNK, np.int32), energy, errors, np.array(sizes, np.int64), 0,
                Units(chunk=CHUNK))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling.search", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--units", default="2400,24000")
    parser.add_argument("--episodes", type=int, default=16)
    options = parser.parse_args()
    for count in map(int, options.units.split(",")):
        made = bank(count)
        settings = SearchSettings(episodes=options.episodes, evaluations=2)
        start = time.monotonic()
        search(made, 0, settings, made.predicted_loss)
        seconds = time.monotonic() - start
        print(f"{len(made.linear)} units, {options.episodes} episodes: {seconds:.1f} s, ", end="")
        print(f"{seconds / options.episodes / len(made.linear) * 1e6:.0f} us a unit and episode", flush=True)


if __name__ == "__main__":
    main()
