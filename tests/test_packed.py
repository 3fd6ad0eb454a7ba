"""The layout of a packed linear: exact bytes before and after, column orders, and the decoded weight."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from windquant.errors import WindquantError
from windquant.feedback import column_order, quantize_linear
from windquant.packed import (
    Format,
    Layout,
    chunk_order,
    dequantize,
    fixed_bytes,
    order_bytes,
    pack_order,
    segments,
    tensor_bytes,
    unit_bytes,
    unpack_order,
)
from windquant.quantizers import actions
from windquant.quantizers.base import Fit
from windquant.quantizers.rotation import rotation
from windquant.scales import ScaleCoder, decode_offset
from windquant.storage import unpack
from windquant.units import Linear, chunk_widths, protected_count

#: A busy machine may stop a test for seconds.
quickly = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

WINDOW = 8
WITHOUT_SEARCH = [name for name in actions() if not name.startswith("trellis")]


def layout_of(rows: int, columns: int, chunk: int, protected: float, names: list[str], owner: bool = True) -> Layout:
    """A layout whose chunks take the actions in turn."""
    group = "layer.q" if owner else "layer.other"
    count = len(chunk_widths(columns, protected_count(columns, protected), chunk))
    chosen = tuple(itertools.islice(itertools.cycle(names), count))
    form = Format(chunk, protected, WINDOW, torch.float16)
    return Layout(Linear("layer.q", "q", 0, group, rows, columns), chosen, form)


def quantized(layout: Layout, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Random weight, column order, stored tensors, and the weight that `quantize_linear` says they stand for."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = layout.linear.rows, layout.linear.columns
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    inputs = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    covariance = inputs.T @ inputs / len(inputs)
    order = column_order(covariance.diagonal(), "saliency", layout.format.chunk, layout.protected)
    tensors, decoded = quantize_linear(weight, order, covariance, layout, torch.ones(rows))
    return weight, order, tensors, decoded


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    columns = draw(st.integers(1, 90))
    protected = draw(st.sampled_from([0.0, 0.03, 0.1, 0.5]))
    if protected_count(columns, protected) == columns:
        protected = 0.0
    names = draw(st.lists(st.sampled_from(list(actions())), min_size=1, max_size=8))
    return layout_of(draw(st.integers(1, 70)), columns, draw(st.integers(1, 40)), protected, names, draw(st.booleans()))


@quickly
@given(layouts())
def test_bytes_are_known_before_anything_is_made(layout: Layout) -> None:
    units = [
        unit_bytes(entry, layout.linear.rows, width) for entry, width in zip(layout.actions, layout.widths, strict=True)
    ]
    assert fixed_bytes(layout.linear, layout.format) + sum(units) == layout.bytes() == tensor_bytes(layout.shapes)
    assert sum(layout.widths) + layout.protected == layout.linear.columns


@quickly
@given(layouts(), st.integers(0, 1000))
def test_tensors_have_the_shapes_and_bytes_of_the_layout(layout: Layout, seed: int) -> None:
    names = tuple(name if name in WITHOUT_SEARCH else "skip" for name in layout.names)  # the search takes longer
    layout = Layout(layout.linear, names, layout.format)
    _, order, tensors, decoded = quantized(layout, seed)
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == layout.shapes
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == layout.bytes()
    torch.testing.assert_close(dequantize(layout, tensors, order), decoded)


@pytest.mark.parametrize("rows", [5, 64, 1100])  # 1100 rows are three streams
@pytest.mark.parametrize("protected", [0.0, 0.03])
def test_the_decoded_weight_is_the_quantized_one(rows: int, protected: float) -> None:
    layout = layout_of(rows, 15 * 16 + 9, 16, protected, list(actions()))
    _, order, tensors, decoded = quantized(layout)
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == layout.shapes
    unpacked = unpack_order(tensors["order"], layout.linear.columns, layout.widths, layout.protected)
    assert torch.equal(unpacked, order)
    found = dequantize(layout, tensors, unpacked)
    torch.testing.assert_close(found, decoded, rtol=1e-5, atol=1e-5)


def test_skipped_weights_keep_their_precision() -> None:
    layout = layout_of(7, 33, 8, 0.0, ["skip"])
    weight, order, tensors, _ = quantized(layout)
    assert torch.equal(dequantize(layout, tensors, order), weight.half().float())


def test_decode_is_the_reference_of_the_fast_path() -> None:
    """Codes unpacked one chunk at a time and decoded by their treatment are what `segments` gives for many."""
    layout = layout_of(75, 16 * 16 + 9, 16, 0.03, [*actions(), "trellis-2", "scalar-3"])
    _, order, tensors, _ = quantized(layout)
    chunks = [(c, values[:, i].T) for run, values in segments(layout, tensors) for i, c in enumerate(run.chunks)]
    assert [chunk for chunk, _ in chunks] == layout.storage_order
    coder = ScaleCoder(*tensors["scale_grid"], tensors["row_scales"])
    whole = dequantize(layout, tensors, order)
    place = scales = offsets = 0
    for chunk, found in chunks:
        entry, width = layout.actions[chunk], layout.widths[chunk]
        length = 75 * 2 if entry.name == "skip" else 75
        size = unit_bytes(entry, 75, width) - 38 * entry.has_scale - 75 * entry.has_offset
        codes = unpack(tensors["codes"][place : place + size].view(width, -1), length, entry.pattern)
        place += size
        scale, offset = torch.ones(75), None
        if entry.has_scale:
            scale = coder.decode(unpack(tensors["scales"][scales][None], 75, (4, 4))[0], tensors["chunk_scales"][chunk])
            scales += 1
        if entry.has_offset:
            offset = decode_offset(tensors["offsets"][offsets], round(2**entry.bits))
            offsets += 1
        expected = entry.decode(codes, Fit(scale, offset))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # exp2 of the scales: its last bit may differ
        start = layout.protected + layout.starts[chunk]
        rotated = expected.T @ rotation(width).T if entry.rotated else expected.T
        torch.testing.assert_close(whole[:, order[start : start + width]], rotated)
    assert place == len(tensors["codes"])


def test_chunks_lie_sorted_by_action() -> None:
    layout = layout_of(8, 64, 8, 0.0, ["skip", "scalar-2", "trellis-2", "scalar-2"])
    names = [layout.names[chunk] for chunk in layout.storage_order]
    ranks = [list(actions()).index(name) for name in names]
    assert ranks == sorted(ranks)
    same = [chunk for chunk in layout.storage_order if layout.names[chunk] == "scalar-2"]
    assert same == sorted(same)


@quickly
@given(st.integers(1, 700), st.integers(1, 64), st.sampled_from([0.0, 0.03, 0.5]), st.integers(0, 10**6))
def test_an_order_comes_back(columns: int, chunk: int, fraction: float, seed: int) -> None:
    protected = protected_count(columns, fraction)
    widths = chunk_widths(columns, protected, chunk)
    random = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    order = chunk_order(random, widths, protected)
    packed = pack_order(order, widths, protected)
    assert packed.dtype == torch.uint8
    assert len(packed) == order_bytes(columns, len(widths), protected)
    found = unpack_order(packed, columns, widths, protected)
    assert torch.equal(found, order)
    assert torch.equal(found.sort().values, torch.arange(columns))
    for part, before in zip(found.split([protected, *widths]), random.split([protected, *widths]), strict=True):
        assert torch.equal(part, before.sort().values), "a chunk keeps its columns, in natural order"


def test_a_damaged_order_is_refused() -> None:
    widths = chunk_widths(100, 3, 32)
    packed = pack_order(torch.arange(100), widths, 3)
    packed[0] ^= 1
    with pytest.raises(WindquantError, match="damaged"):
        unpack_order(packed, 100, widths, 3)


def test_many_chunks_take_two_bytes_a_column() -> None:
    widths = chunk_widths(600, 0, 2)
    order = torch.arange(600).flip(0)
    assert order_bytes(600, 300, 0) == 1200
    packed = pack_order(chunk_order(order, widths, 0), widths, 0)
    assert torch.equal(unpack_order(packed, 600, widths, 0), chunk_order(order, widths, 0))


def test_a_damaged_order_of_many_chunks_is_refused() -> None:
    """Above 256 chunks their numbers are int16, which a damaged file can make negative."""
    order = torch.randperm(300)
    packed = pack_order(order, [1] * 300, 0)
    assert torch.equal(unpack_order(packed, 300, [1] * 300, 0), order)
    packed[1] = 0xFF
    with pytest.raises(WindquantError, match="column order"):
        unpack_order(packed, 300, [1] * 300, 0)
