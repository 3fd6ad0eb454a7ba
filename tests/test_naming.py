"""Names of results, of budgets and of allocators: what they say, and what is refused."""

import importlib
from pathlib import Path

import pytest

from windquant import naming
from windquant.errors import WindquantError


def test_allocators_are_those_of_the_allocation() -> None:
    assert naming.ALLOCATORS == importlib.import_module("windquant.allocation").ALLOCATORS


def test_unknown_names_and_impossible_bits() -> None:
    with pytest.raises(WindquantError, match="unknown allocator lagrange, did you mean lagrangian"):
        naming.check_allocator("lagrange")
    for bits in ("0.99", "16.01", "-2", "0"):
        with pytest.raises(WindquantError, match=f"{bits} bits: impossible; give 1 to 16"):
            naming.check_bits(bits)
    assert naming.check_bits("2.0") == naming.named_bits("2.0") == 2.0
    for bits, right in (("2", "2.0"), ("2.50", "2.5"), ("02.0", "2.0")):
        with pytest.raises(WindquantError, match=f"^{bits}bits: .* have {right}bits"):
            naming.named_bits(bits)
    for name in ("ppo-01", "random-4294967296"):
        with pytest.raises(WindquantError, match=f"{name}: seeds go from 0 to 4294967295"):
            naming.variant(name, [])


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("m_2.0bits.json", "ppo"),
        ("qwen3-0.6b_2bits.greedy.json", "greedy"),
        ("m_2.0bits.ppo-chunk32.json", "ppo-chunk32"),
        ("m_2.0bits.ppo-1.json", "ppo-1"),
        ("m_2.0bits.layer-chunk32-1.json", "layer-chunk32-1"),
        ("result.json", None),
        ("m_2.0bits.copy.json", None),
    ],
)
def test_what_a_results_name_says(name: str, variant: str | None) -> None:
    found = naming.variant_of(Path("results") / name)
    assert (found and found.name) == variant
    if found:
        assert naming.variant(found.name, ["chunk32"]) == found
