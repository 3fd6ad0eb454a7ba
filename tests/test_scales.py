"""Scales and offsets as codes: how far they are off, and what has none."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from windquant.scales import FLOOR, STEPS, ScaleCoder, decode_offset, encode_offset

#: A busy machine may stop a test for seconds.
quickly = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@quickly
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.001, 1.0), st.integers(0, 10**6))
def test_scales_are_off_by_half_a_step_at_most(rows: int, chunks: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp2(
        torch.randn(rows, 1, generator=generator) + spread * torch.randn(rows, chunks, generator=generator)
    )
    coder = ScaleCoder.fit(scales)
    step = float(coder.step)
    assert step == pytest.approx(min(STEPS, key=lambda known: abs(known - step)), rel=1e-3)
    for chunk in scales.T:
        codes, share = coder.encode(chunk)
        assert int(codes.max()) < 16
        error = (coder.decode(codes, share).log2() - chunk.log2()).abs()
        inside = (codes > 0) & (codes < 15)
        assert (error[inside] <= step / 2 + 1e-3).all()


@quickly
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.001, 1.0), st.floats(-9, 9), st.integers(0, 10**6))
def test_scales_that_may_not_get_smaller_do_not(
    rows: int, chunks: int, spread: float, outlier: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp2(
        spread * torch.randn(rows, chunks, generator=generator) - 20 * torch.rand(1, generator=generator)
    )
    scales[0, 0] *= 2**outlier  # of one row in one chunk
    coder = ScaleCoder.fit(scales)
    for chunk in scales.T:
        codes, share = coder.encode(chunk, least=True)
        ratio = (coder.decode(codes, share) / chunk).log2()
        assert int(codes.max()) < 16
        assert ratio.min() > -1e-4
        assert (ratio[codes > 0] <= float(coder.step) + 1e-3).all(), "nor larger than they must"


def test_a_row_of_zeros_has_a_scale() -> None:
    scales = torch.zeros(3, 2)
    coder = ScaleCoder.fit(scales)
    codes, share = coder.encode(scales[:, 0])
    decoded = coder.decode(codes, share)
    assert decoded.isfinite().all()
    assert (decoded <= 2 * FLOOR).all()


def test_offsets_take_a_byte() -> None:
    offset = torch.linspace(-2, 2, 50)
    for levels in (2, 4, 8, 16):
        inside = offset.abs() < levels * 127 / 256
        error = (decode_offset(encode_offset(offset, levels), levels) - offset).abs()
        assert (error[inside] <= levels / 512 + 1e-6).all()
