"""The trellis' mean squared error on unit Gaussian streams, and the scale of the table that makes it smallest.

    python -m benchmarks.distortion --actions trellis-2.5,trellis-3.5 --windows 8,10,12

The numbers are those of DISTORTION and SHRINK in windquant/quantizers/trellis.py. Streams have the most rows of one
stream, so that their beginning, where no code has filled the state yet, counts as little as it does in a large weight.
"""

import argparse

import torch
from scipy.optimize import minimize_scalar

from windquant.quantizers import Fit, action, actions
from windquant.quantizers.trellis import SHRINK, TILE


def distortion(name: str, window: int, scale: float, columns: int, seed: int = 0) -> float:
    """Mean squared error of `columns` streams, which are the same for every action, window and scale."""
    entry = action(name, window, torch.float16)
    values = torch.randn(columns, TILE, generator=torch.Generator().manual_seed(seed))
    values /= values.square().mean().sqrt()
    coded = entry.encode(values.clone(), Fit(torch.full((TILE,), scale)), torch.ones(TILE), torch.eye(columns))
    return float((coded.decoded - values).double().square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distortion", description=(__doc__ or "").split("\n")[0])
    trellises = [name for name in actions() if name.startswith("trellis")]
    parser.add_argument("--actions", default=",".join(trellises))
    parser.add_argument("--windows", default="8,10,12,14")
    parser.add_argument("--columns", type=int, default=512, help=f"streams of {TILE} values")
    options = parser.parse_args()
    for name in options.actions.split(","):
        for window in map(int, options.windows.split(",")):
            scale = SHRINK[action(name, window, torch.float16).bits]
            error = distortion(name, window, scale, options.columns)
            best = minimize_scalar(
                lambda scale, name=name, window=window: distortion(name, window, scale, max(1, options.columns // 4)),
                bounds=(0.7, 1.3),
                method="bounded",
                options={"xatol": 0.005},
            )
            print(f"{name} window {window}: error {error:.5f} at scale {scale}, best scale {best.x:.2f}", flush=True)


if __name__ == "__main__":
    main()
