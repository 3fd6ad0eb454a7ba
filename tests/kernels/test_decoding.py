"""What the kernels know about the actions is what the registry says, by the numbers that are on disk."""

import pytest

from windquant.kernels import decoding
from windquant.kernels.launches import GROUP, IDS, PROTECTED
from windquant.quantizers import actions
from windquant.quantizers.scalar import Scalar
from windquant.storage import TERNARY, stream_bytes

ENTRIES = actions()


@pytest.mark.parametrize("name", ENTRIES)
def test_an_action(name: str) -> None:
    entry, number = ENTRIES[name], IDS[name]
    assert decoding.is_trellis(number) == name.startswith("trellis")
    assert decoding.is_trellis(number) == entry.rotated
    assert decoding.is_ternary(number) == (entry.pattern == TERNARY)
    assert decoding.has_scale(number) == entry.has_scale
    assert decoding.has_offset(number) == entry.has_offset
    assert decoding.middle(number) == (entry.middle if isinstance(entry, Scalar) else 0)
    codes = 2 if name == "skip" else 1  # of a weight
    if entry.pattern != TERNARY:
        assert decoding.pair_bits(number) == stream_bytes(codes * GROUP, entry.pattern), "a group is whole bytes"
        assert decoding.pair_bits(number) / 2 == entry.bits
    if entry.rotated:
        assert decoding.pair_bits(number) <= 8, "a group is read as one number of 64 bits"


def test_protected_columns_come_behind_the_actions() -> None:
    assert decoding.ACTIONS.value == len(ENTRIES) + 1
    assert len(ENTRIES) == PROTECTED
    assert (decoding.pair_bits(PROTECTED), decoding.middle(PROTECTED)) == (16, 128)
    assert not decoding.has_scale(PROTECTED), "their scales belong to columns, not to rows"
