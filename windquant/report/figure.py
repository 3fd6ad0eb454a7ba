"""What every picture of the report has: a sentence that says what it shows, its numbers, and the command for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from windquant.naming import ALLOCATORS
from windquant.report.svg import SERIES, legend

Row = Sequence[str]
PEERS = SERIES - 1  # the series that other tools' points have
SMOOTH = 8  # updates or steps that a running mean is taken over


@dataclass(frozen=True)
class Figure:
    title: str
    svg: str
    caption: str  # plain text
    commands: tuple[str, ...]  # what makes its numbers again
    table: tuple[Row, ...] = ()  # the numbers, a header first
    legend: str = ""  # HTML
    wide: bool = False


def make(*targets: object) -> str:
    """The command that makes files; many with one beginning and ending in the shell's short form, a_{1,2}.json."""
    names = list(dict.fromkeys(map(str, targets)))
    if len(names) > 3:
        start = names[0].rpartition("_")[0]
        if start and all(name.startswith(f"{start}_") and name.endswith(".json") for name in names):
            middles = [name.removeprefix(f"{start}_").removesuffix(".json") for name in names]
            return f"snakemake --cores all {start}_{{{','.join(middles)}}}.json"
    return f"snakemake --cores all {' '.join(names)}"


def series(names: Iterable[str]) -> dict[str, int]:
    """Colour and mark of every variant, in the order of a legend.

    An allocator has its own in all pictures; with a change or another seed it gets one that none of these has, as long
    as there are any.
    """
    found = set(names)
    own = {name: place % PEERS for place, name in enumerate(ALLOCATORS) if name in found}
    free = [place for place in range(PEERS) if place not in own.values()] or list(range(PEERS))
    others = {name: free[place % len(free)] for place, name in enumerate(sorted(found - own.keys()))}
    return own | others


def key(marks: Mapping[str, int], names: Iterable[str], extra: Sequence[tuple[str, int]] = ()) -> str:
    """The legend of those `names` that a picture shows, out of `series`."""
    shown = set(names)
    return legend([(name, mark) for name, mark in marks.items() if name in shown] + list(extra))


def running(values: Sequence[float]) -> list[float]:
    """Mean of up to SMOOTH values that end with each one."""
    windows = (values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def show(r: float | None) -> str:
    return "not defined" if r is None else f"{r:.3f}"
