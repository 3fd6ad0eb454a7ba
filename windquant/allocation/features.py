"""What is known about a unit before any decision: features for the policy and for the loss model's corrections."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windquant.allocation.budget import prices
from windquant.bank import Bank

#: Version of the observation: a policy reads only observations of its own version.
VERSION = 2
#: Logarithms of an action's error in the policy's observation are cut here: beyond, the choice is clear.
REACH = 8.0


@dataclass(frozen=True)
class Geometry:
    """Where every unit sits; all arrays are [U]."""

    kinds: list[str]  # kinds of linear, sorted
    kind: NDArray[np.int64]  # index into `kinds`
    layer: NDArray[np.int64]  # 0 = first
    depth: NDArray[np.float64]  # -1 first layer .. 1 last layer
    rank: NDArray[np.float64]  # -0.5 most salient chunk of its linear .. 0.5 least salient
    first: NDArray[np.bool_]  # most salient chunk of its linear
    above: NDArray[np.int64]  # the same chunk of the same linear one layer earlier, -1: there is none


def geometry(bank: Bank) -> Geometry:
    kinds = sorted({linear.kind for linear in bank.linears})
    kind = np.array([kinds.index(linear.kind) for linear in bank.linears])[bank.linear]
    layer = np.array([linear.layer for linear in bank.linears])[bank.linear]
    chunks = np.bincount(bank.linear, minlength=len(bank.linears))[bank.linear]
    # in its layer by its path: two linears of one layer may be of one kind (StarCoder's attn.c_proj and mlp.c_proj)
    paths = [linear.name.partition(f".{linear.layer}.")[2] for linear in bank.linears]
    places = [(bank.linears[i].layer, paths[i], p) for i, p in zip(bank.linear, bank.position.tolist(), strict=True)]
    where = {place: unit for unit, place in enumerate(places)}
    above = [where.get((before - 1, path, position), -1) for before, path, position in places]
    return Geometry(
        kinds=kinds,
        kind=kind,
        layer=layer,
        depth=2 * layer / max(1, layer.max()) - 1,
        rank=bank.position / np.maximum(1, chunks - 1) - 0.5,
        first=bank.position == 0,
        above=np.array(above),
    )


def corrections(bank: Bank) -> tuple[list[str], NDArray[np.float64]]:
    """Directions in which the bank's errors are believed to be wrong: names [d] and values [U, d].

    The logarithm of an error's multiplier is values @ w with w ~ N(0, 1) before any measurement: every column is scaled
    by how wrong the bank is expected to be in its direction (0.5: a factor of 1.6 either way).
    """
    place = geometry(bank)
    kind = np.eye(len(place.kinds))[place.kind]
    last = place.layer.max()
    columns: list[tuple[str, NDArray[Any]]] = [
        *((f"kind {name}", 0.5 * kind[:, i]) for i, name in enumerate(place.kinds)),
        ("depth", 0.4 * place.depth),
        ("depth squared", 0.5 * (place.depth**2 - 1 / 3)),
        ("first layer", 0.4 * (place.layer == 0)),
        ("last layer", 0.4 * (place.layer == last)),
        ("first chunk", 0.5 * place.first),
        ("rank", 0.5 * place.rank),
        *((f"depth x kind {name}", 0.3 * kind[:, i] * place.depth) for i, name in enumerate(place.kinds)),
    ]
    return [name for name, _ in columns], np.stack([values for _, values in columns], axis=1)


def unit_features(bank: Bank) -> tuple[list[str], NDArray[np.float32]]:
    """What the policy sees of a unit and what no decision changes: names [F] and values [U, F], all of order one."""
    place = geometry(bank)
    errors = prices(bank)
    kind = np.eye(len(place.kinds))[place.kind]
    worst = np.where(np.isfinite(errors), errors, 0.0).max(axis=1)
    columns: list[tuple[str, NDArray[Any]]] = [
        *((f"kind {name}", kind[:, i]) for i, name in enumerate(place.kinds)),
        *((f"depth x kind {name}", kind[:, i] * place.depth) for i, name in enumerate(place.kinds)),
        ("depth", place.depth),
        ("depth squared", place.depth**2 - 1 / 3),
        ("first layer", place.layer == 0),
        ("last layer", place.layer == place.layer.max()),
        ("rank", place.rank),
        ("first chunk", place.first),
        *(
            (name, standard(np.log(positive(values))))
            for name, values in (("energy", bank.energy), ("worst error", worst), ("weights", bank.unit_weights))
        ),
    ]
    return [name for name, _ in columns], np.stack([values for _, values in columns], axis=1).astype(np.float32)


def positive(values: NDArray[Any]) -> NDArray[np.float64]:
    """`values` with zeros (and anything that is no number) replaced by the smallest positive one, for a logarithm."""
    good = np.isfinite(values) & (values > 0)
    floor = values[good].min() if good.any() else 1.0
    return np.where(good, values, floor)


def standard(values: NDArray[Any]) -> NDArray[np.float64]:
    """Mean 0, standard deviation 1, cut at 3; zeros where all values are equal."""
    spread = values.std()
    return np.clip((values - values.mean()) / spread, -3, 3) if spread > 1e-12 else np.zeros_like(values)
