"""What Linux says about a processor decides whether products are rounded to BF16."""

import pytest

from windquant import processor

CPUINFO = """processor\t: 0
vendor_id\t: {maker}
model name\t: Some Processor
flags\t\t: fpu sse2 {flags}

processor\t: 1
vendor_id\t: {maker}
flags\t\t: fpu sse2 {flags}
"""


@pytest.mark.parametrize(
    ("maker", "flags", "fast"),
    [
        ("GenuineIntel", "avx2 avx512f avx512_bf16", False),  # there BF16 products take twice as long as FP32 ones
        ("GenuineIntel", "avx2 avx512f avx512_bf16 amx_bf16", True),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_bfloat16_is_used_where_it_is_fast(maker: str, flags: str, fast: bool) -> None:
    found = processor.described(CPUINFO.format(maker=maker, flags=flags))
    assert found.maker == maker.lower()
    assert found.instructions == flags.split()
    assert found.fast_bfloat16 is fast


def test_a_processor_that_nobody_describes_has_nothing_special() -> None:
    assert processor.described("").instructions == []
    assert not processor.described("").fast_bfloat16
