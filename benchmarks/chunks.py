"""What the size of a chunk is worth, and whether sizes that adapt would pay: losses that the bank predicts.

    python -m benchmarks.chunks                                       # after `make run`; a minute
    python -m benchmarks.chunks --sizes 32 64 128 --budgets 2.0 3.0

For every size a bank and its Lagrangian plans. `adaptive` lets every chunk of the largest size be split into chunks of
the next smaller one where that lowers error + price x bytes, and these again: the best plan there is for these sizes,
as the bank sees it. It pays for the smallest size's column orders, but for no table that says what was split.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from windquant import streaming
from windquant.allocation import lagrangian
from windquant.bank import Bank, make
from windquant.plan import Units
from windquant.quantizers import menu
from windquant.statistics import Statistics

Values = NDArray[np.float64]


def made(root: Path, model: str, size: int) -> Bank:
    """The bank of a model for chunks of `size` columns, from what the workflow has left."""
    statistics = Statistics.load(root / "data" / "statistics" / f"{model}.safetensors")
    source = streaming.open_source(root / "resources" / "models" / model)
    weights = ((linear, source.parameter(f"{linear.name}.weight")) for linear in statistics.linears)
    return make(model, weights, statistics, Units(chunk=size), menu("trellis"))


def cheapest(bank: Bank, price: float) -> tuple[Values, Values]:
    """Error and bytes [U] of what every unit takes at a price in nats per byte."""
    units = np.arange(len(bank.linear))
    chosen = (bank.errors + price * bank.bytes).argmin(1)
    return bank.errors[units, chosen], bank.bytes[units, chosen].astype(float)


def places(bank: Bank, size: int) -> NDArray[np.int64]:
    """[U] the chunk of `size` columns that each unit lies in, numbered through the model in its order."""
    longest = max(linear.columns for linear in bank.linears)
    start = bank.linear.astype(np.int64) * longest + bank.position.astype(np.int64) * bank.units.chunk // size
    return np.unique(start, return_inverse=True)[1]


def split(banks: list[Bank], price: float) -> tuple[float, float, float]:
    """Predicted loss, bytes and the share of the largest chunks that are split at a price; banks: smallest first."""
    error, size = cheapest(banks[0], price)
    share = 0.0
    for smaller, larger in pairwise(banks):
        inside = places(smaller, larger.units.chunk)
        error, size = (np.bincount(inside, values).astype(np.float64) for values in (error, size))
        whole_error, whole_size = cheapest(larger, price)
        better = error + price * size < whole_error + price * whole_size
        error, size = np.where(better, error, whole_error), np.where(better, size, whole_size)
        share = float(better.mean())
    return float(error.sum()), float(size.sum()), share


def adaptive(banks: list[Bank], bits: float) -> tuple[float, float]:
    """Predicted loss of the best plan that may split, and the share of the largest chunks that it splits."""
    budget = banks[0].budget(bits)
    low, high = 1e-16, 1.0  # nats per byte
    for _ in range(100):
        price = (low * high) ** 0.5
        if split(banks, price)[1] <= budget:
            high = price
        else:
            low = price
    error, _, share = split(banks, high)
    return error, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the project")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 192], help="each divides the next")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.6, 2.0, 2.5, 3.0])
    given = parser.parse_args()
    sizes = sorted(given.sizes)
    if any(large % small for small, large in pairwise(sizes)):
        parser.error(f"--sizes {' '.join(map(str, sizes))}: each has to divide the next")
    banks = [made(given.root, given.model, size) for size in sizes]
    print("| columns | units |" + "".join(f" {bits:g} bits |" for bits in given.budgets))
    print("|---|---|" + "---|" * len(given.budgets))
    for size, one in zip(sizes, banks, strict=True):
        losses = [one.predicted_loss(lagrangian.allocate(one, bits)) for bits in given.budgets]
        print(f"| {size} | {len(one.linear)} |" + "".join(f" {loss:.4f} |" for loss in losses))
    found = [adaptive(banks, bits) for bits in given.budgets]
    print("| adaptive | |" + "".join(f" {loss:.4f} ({100 * share:.0f} % split) |" for loss, share in found))


if __name__ == "__main__":
    main()
