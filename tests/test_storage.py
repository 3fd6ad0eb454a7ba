"""Codes in bytes: nothing lost, nothing wasted, for every pattern and number of rows."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from windquant.storage import TERNARY, Pattern, pack, stream_bytes, unpack, unpack_rows, windows

#: A busy machine may stop a test for seconds.
quickly = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

PATTERNS: list[Pattern] = [(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4), (8, 8), TERNARY]


@st.composite
def streams(draw: st.DrawFn, patterns: list[Pattern] = PATTERNS) -> tuple[Pattern, Tensor]:
    """A pattern and random codes uint8 [columns, rows] that it can hold."""
    pattern = draw(st.sampled_from(patterns))
    columns, rows = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    even, odd = (3, 3) if pattern == TERNARY else (1 << pattern[0], 1 << pattern[1])
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    codes[:, ::2] = torch.randint(0, even, codes[:, ::2].shape, generator=generator, dtype=torch.uint8)
    codes[:, 1::2] = torch.randint(0, odd, codes[:, 1::2].shape, generator=generator, dtype=torch.uint8)
    return pattern, codes


@quickly
@given(streams())
def test_unpack_is_the_inverse_of_pack(stream: tuple[Pattern, Tensor]) -> None:
    pattern, codes = stream
    columns, rows = codes.shape
    packed = pack(codes, pattern)
    assert packed.shape == (columns, stream_bytes(rows, pattern))
    assert packed.dtype == torch.uint8
    found = unpack(packed, rows, pattern)
    assert found.dtype == torch.uint8
    assert torch.equal(found, codes)
    assert torch.equal(unpack_rows(packed, rows, pattern), codes.T)


@quickly
@given(streams([pattern for pattern in PATTERNS if pattern not in (TERNARY, (8, 8))]), st.integers(1, 17))
def test_windows_are_the_last_bits_of_the_stream(stream: tuple[Pattern, Tensor], length: int) -> None:
    pattern, codes = stream
    found = windows(pack(codes, pattern), codes.shape[1], pattern, (length, length))
    for column, row_codes in enumerate(codes.tolist()):
        whole = end = 0  # the stream so far as one number, first code lowest
        for row, code in enumerate(row_codes):
            whole |= code << end
            end += pattern[row & 1]
            expected = whole >> (end - length) if end >= length else whole << (length - end)
            assert int(found[row, column]) == expected & ((1 << length) - 1)


@pytest.mark.parametrize(
    ("codes", "pattern", "expected"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], (1, 1), [0b00001101, 1]),
        ([1, 2, 3, 0, 2], (2, 2), [0b00111001, 2]),
        ([1, 3, 0, 2], (1, 2), [0b100111]),
        ([2, 5, 1, 7], (2, 3), [0b10110110, 0b11]),
        ([5, 9, 3], (3, 4), [0b11001101, 1]),
        ([7, 1, 4], (3, 3), [0b00001111, 1]),
        ([5, 10], (4, 4), [0xA5]),
        ([255, 7], (8, 8), [255, 7]),
        ([2, 1, 0, 2, 1, 1], TERNARY, [2 + 3 * 1 + 9 * 0 + 27 * 2 + 81 * 1, 1]),
    ],
)
def test_the_bytes_are_those_of_the_format(codes: list[int], pattern: Pattern, expected: list[int]) -> None:
    assert pack(torch.tensor([codes], dtype=torch.uint8), pattern).tolist() == [expected]


@quickly
@given(st.sampled_from(PATTERNS), st.integers(1, 10_000))
def test_less_than_a_byte_is_wasted(pattern: Pattern, rows: int) -> None:
    bits = rows * 1.6 if pattern == TERNARY else (rows + 1) // 2 * pattern[0] + rows // 2 * pattern[1]
    assert 0 <= stream_bytes(rows, pattern) - bits / 8 < 1
