"""Names of results: a model, a budget, and behind it an allocator, a change of the settings and a seed.

results/smollm2-135m_2.0bits.ppo-chunk32-1.json
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from windquant.errors import WindquantError, did_you_mean

ALLOCATORS = ("ppo", "uniform", "greedy", "lagrangian", "random", "layer", "evolution")
LEARNED = ("ppo", "layer")  # those that take a policy
MEASURING = (*LEARNED, "evolution")  # those that spend measurements
SEEDLESS = ("uniform", "greedy", "lagrangian")  # those that draw nothing: the same plan with every seed
HIGHEST_SEED = 2**32 - 1  # numpy takes no other
LOWEST_BITS, HIGHEST_BITS = 1.0, 16.0  # the bank knows the exact lowest ones: they depend on the metadata


@dataclass(frozen=True)
class Variant:
    """What stands behind the budget in the name of a result: an allocator, a change of the settings, a seed."""

    allocator: str
    change: str = ""  # of an ablation
    seed: int | None = None  # none: the configuration's

    @property
    def name(self) -> str:
        """As files are called, e.g. "ppo-chunk32-1"."""
        seed = "" if self.seed is None else str(self.seed)
        return "-".join(filter(None, (self.allocator, self.change, seed)))


NAME = re.compile(r"(?P<allocator>[a-z]+)(-(?P<change>[a-z][a-z0-9]*))?(-(?P<seed>\d+))?")
RESULT = re.compile(rf"[^/_]+_\d+(\.\d+)?bits(\.{NAME.pattern})?\.json")


def variant(text: str, known: Iterable[str]) -> Variant:
    """ "ppo-chunk32-1": PPO under the change `chunk32` with seed 1; raises WindquantError for what is not `known`."""
    found = NAME.fullmatch(text)
    if found is None:
        raise WindquantError(
            f"{text}: give an allocator, a change and a seed, as in ppo-chunk32-1; the last two may miss"
        )
    parsed = _variant(found)
    if parsed.seed is not None and (parsed.seed > HIGHEST_SEED or parsed.name != text):
        raise WindquantError(f"{text}: seeds go from 0 to {HIGHEST_SEED}, without zeros before them")
    if parsed.change and parsed.change not in known:
        hint = did_you_mean(parsed.change, known)
        raise WindquantError(f"unknown change {parsed.change}{hint}; the ablations have {', '.join(known) or 'none'}")
    check_allocator(parsed.allocator)
    return parsed


def result_name(model: str, bits: float | str, name: str) -> str:
    """File of a result by a variant's name: PPO's has none."""
    return f"{model}_{bits}bits{'' if name == 'ppo' else f'.{name}'}.json"


def variant_of(result: Path) -> Variant | None:
    """What the name of a result's file says (an empty one is PPO); None for a name that the workflow does not give."""
    found = RESULT.fullmatch(result.name)
    return _variant(found) if found and (found["allocator"] or "ppo") in ALLOCATORS else None


def _variant(found: re.Match[str]) -> Variant:
    """Of a match of NAME."""
    seed = found["seed"]
    return Variant(found["allocator"] or "ppo", found["change"] or "", None if seed is None else int(seed))


def check_bits(text: str) -> float:
    """Target bits per weight from a file name; raises WindquantError if they cannot be."""
    bits = float(text)
    if not LOWEST_BITS <= bits <= HIGHEST_BITS:
        raise WindquantError(f"{text} bits: impossible; give {LOWEST_BITS:g} to {HIGHEST_BITS:g} bits per weight")
    return bits


def named_bits(text: str) -> float:
    """`check_bits` of a file name, in which every number has one spelling, so that nothing is made twice."""
    bits = check_bits(text)
    if text != str(bits):
        raise WindquantError(f"{text}bits: the names of this budget's files have {bits}bits")
    return bits


def check_allocator(name: str) -> str:
    """Raise WindquantError for a name that is no allocator."""
    if name not in ALLOCATORS:
        hint = did_you_mean(name, ALLOCATORS)
        raise WindquantError(f"unknown allocator {name}{hint}; there are {', '.join(ALLOCATORS)}")
    return name
