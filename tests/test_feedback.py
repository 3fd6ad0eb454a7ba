"""Error feedback: the algebra, that it helps, and inputs that break naive versions of it."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.families import NAMES, WINDOW
from windquant import compute
from windquant.feedback import DAMPING, column_order, damping, factor, inverse_cholesky, quantize_linear, rotate
from windquant.packed import Format, Layout, dequantize, pack_order, unpack_order
from windquant.quantizers.rotation import rotation
from windquant.units import Linear, chunk_widths

ROWS, COLUMNS, CHUNK = 30, 75, 32


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = COLUMNS, seed: int = 1) -> Tensor:
    """H = E[x x^T] of inputs with unequal energies that express one another."""
    mixing = gaussian(columns, columns, seed=seed) / math.sqrt(columns)
    x = gaussian(400, columns, seed=seed + 1) @ (torch.eye(columns) + 2 * mixing) * torch.linspace(2, 0.1, columns)
    return x.T @ x / len(x)


def layout(names: str, protected: float = 0.0, group: str = "w", rows: int = ROWS, columns: int = COLUMNS) -> Layout:
    """Names separated by blanks, repeated until there is one per chunk."""
    form = Format(CHUNK, protected, WINDOW, torch.float16)
    made = Layout(Linear("w", "w", 0, group, rows, columns), (), form)
    cycle = names.split() * len(made.widths)
    return Layout(made.linear, tuple(cycle[: len(made.widths)]), form)


def quantized(
    weight: Tensor, covariance: Tensor, form: Layout, importance: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Stored tensors, decoded weight, column order."""
    order = column_order(covariance.diagonal(), "saliency", CHUNK, form.protected)
    fisher = torch.ones(len(weight)) if importance is None else importance
    return *quantize_linear(weight, order, covariance, form, fisher), order


def loss(weight: Tensor, decoded: Tensor, covariance: Tensor) -> float:
    """E |(W - Q) x|^2."""
    error = (weight - decoded).double()
    return ((error @ covariance.double()) * error).sum().item()


# -- the factor and the rotation


def test_factor_is_the_upper_root_of_the_inverse() -> None:
    covariance = correlated(40)
    u = factor(covariance, 0.3)
    damped = covariance.double() + 0.3 * torch.eye(40)
    assert u.dtype == torch.float32
    assert torch.equal(u, u.triu())
    assert (u.diagonal() > 0).all()
    torch.testing.assert_close(u.double().T @ u.double() @ damped, torch.eye(40).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [200, 700, 1536])  # less than a block, and more
def test_the_factor_has_the_same_bits_with_any_number_of_threads(size: int) -> None:
    matrix = correlated(size).double()
    matrix.diagonal().add_(0.1)
    found = []
    for count in (1, 2):
        with compute.threads(count):
            found.append(inverse_cholesky(matrix.clone()))
    assert torch.equal(*found)
    inverse = found[0]
    torch.testing.assert_close(inverse @ matrix @ inverse.T, torch.eye(size, dtype=matrix.dtype))
    assert torch.equal(inverse, inverse.tril())


def test_factor_leaves_its_argument_alone() -> None:
    covariance = correlated(8)
    before = covariance.clone()
    factor(covariance, 0.1)
    rotate(covariance, [(0, 8)])
    assert torch.equal(covariance, before)


def test_dead_inputs_take_no_part() -> None:
    covariance = correlated(20)
    dead = torch.tensor([0, 7, 19])
    covariance[dead] = 0
    covariance[:, dead] = 0
    u = factor(covariance, damping(covariance.diagonal()))
    assert u.isfinite().all()
    for column in dead:
        assert u[column, column + 1 :].abs().sum() == 0
        assert u[:column, column].abs().sum() == 0


def test_without_any_input_there_is_no_feedback() -> None:
    assert torch.equal(factor(torch.zeros(6, 6), damping(torch.zeros(6))), torch.eye(6))


def test_damping_follows_the_channels_that_most_are_like() -> None:
    """Neither one with a million times their energy nor the dead ones count."""
    energy = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert damping(energy) == pytest.approx(3 * DAMPING)
    assert damping(torch.cat([energy, torch.tensor([1e6, 0, 0, 0, 0, 1e-9])])) == pytest.approx(3 * DAMPING)


def test_what_is_not_positive_definite_is_damped_until_it_is() -> None:
    """As sums in FP32 can be, where one channel dwarfs the others."""
    covariance = correlated(12)
    values, vectors = torch.linalg.eigh(covariance.double())
    values[0] = -0.5
    indefinite = (vectors * values @ vectors.T).float()
    assert torch.equal(factor(indefinite, 0.01), factor(indefinite, 1.0)), "0.01 and 0.1 were too little"
    indefinite[3, 3] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        factor(indefinite, 0.01)


def test_a_channel_that_dwarfs_the_others_leaves_them_their_feedback() -> None:
    covariance = correlated(20)
    covariance[0] *= 1e3
    covariance[:, 0] *= 1e3
    alone, beside = (factor(matrix, damping(matrix.diagonal())) for matrix in (covariance[1:, 1:], covariance))
    assert (beside[1:, 1:] - alone).norm() < 0.02 * alone.norm()
    assert alone.triu(1).norm() > 0.1 * alone.norm()


def test_rotation_of_blocks() -> None:
    covariance = correlated(30)
    r = torch.eye(30)
    r[3:16, 3:16] = rotation(13)
    r[20:28, 20:28] = rotation(8)
    found = rotate(covariance, [(3, 13), (20, 8)])
    torch.testing.assert_close(found, r.T @ covariance @ r, rtol=1e-4, atol=1e-5)
    assert torch.equal(rotate(covariance, []), covariance)


# -- the column order


@pytest.mark.parametrize(("columns", "protected"), [(75, 0), (75, 2), (64, 3), (20, 0)])
def test_saliency_order(columns: int, protected: int) -> None:
    energy = torch.rand(columns, generator=torch.Generator().manual_seed(0))
    order = column_order(energy, "saliency", CHUNK, protected)
    assert sorted(order.tolist()) == list(range(columns))
    parts = order.split([protected, *chunk_widths(columns, protected, CHUNK)])
    for part, following in pairwise(parts):
        if len(part):
            assert energy[part].min() >= energy[following].max()
    for part in parts:
        assert torch.equal(part, part.sort().values), "inside a chunk the natural order stays"
    widths = chunk_widths(columns, protected, CHUNK)
    assert torch.equal(unpack_order(pack_order(order, widths, protected), columns, widths, protected), order)


def test_all_columns_may_be_protected() -> None:
    weight, covariance, form = gaussian(ROWS, 48), correlated(48), layout("", 0.99, columns=48)
    tensors, decoded, order = quantized(weight, covariance, form)
    assert form.protected == 48
    assert tensors["codes"].numel() == 0
    assert loss(weight, decoded, covariance) < 1e-3 * loss(weight, 0 * weight, covariance)
    torch.testing.assert_close(dequantize(form, tensors, order), decoded, rtol=0, atol=1e-5)


def test_natural_order_takes_out_only_the_protected_columns() -> None:
    energy = torch.rand(75, generator=torch.Generator().manual_seed(0))
    order = column_order(energy, "natural", CHUNK, 3)
    assert set(order[:3].tolist()) == set(energy.topk(3).indices.tolist())
    assert order[3:].tolist() == sorted(order[3:].tolist())
    assert torch.equal(column_order(energy, "natural", CHUNK, 0), torch.arange(75))


# -- the quantized linear


@pytest.mark.parametrize("names", ["scalar-1", "scalar-2", "trellis-2", "scalar-4", "trellis-1.5 scalar-2 scalar-3"])
def test_feedback_beats_no_feedback(names: str) -> None:
    weight, covariance, form = gaussian(ROWS, COLUMNS), correlated(), layout(names)
    _, with_feedback, _ = quantized(weight, covariance, form)
    # a rotated diagonal is not diagonal: only equal energies switch the feedback off inside rotated chunks too
    alike = torch.eye(COLUMNS) if "trellis" in names else covariance.diagonal().diag()
    order = column_order(covariance.diagonal(), "saliency", CHUNK, 0)
    _, without = quantize_linear(weight, order, alike, form, torch.ones(ROWS))
    assert loss(weight, with_feedback, covariance) < 0.8 * loss(weight, without, covariance)


@pytest.mark.parametrize("treatment", ["scalar", "trellis"])
def test_more_bits_cost_less(treatment: str) -> None:
    weight, covariance = gaussian(ROWS, COLUMNS), correlated()
    names = [name for name in [*NAMES, "skip"] if name.startswith(treatment)]
    losses = [loss(weight, quantized(weight, covariance, layout(name))[1], covariance) for name in names]
    assert len(losses) > 1
    assert all(dearer < 0.9 * cheaper for cheaper, dearer in pairwise(losses)), losses


@pytest.mark.parametrize("protected", [0.0, 0.04])
@pytest.mark.parametrize("names", [*NAMES, "skip trellis-2 scalar-1", "scalar-2 scalar-1.5 trellis-3.5"])
def test_the_stored_tensors_stand_for_the_returned_weight(names: str, protected: float) -> None:
    weight, covariance, form = gaussian(ROWS, COLUMNS), correlated(), layout(names, protected)
    tensors, decoded, order = quantized(weight, covariance, form)
    assert {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == form.shapes
    found = dequantize(form, tensors, order)
    # The last bit of a scale depends on how many torch computes at once; a rotated chunk sums it up.
    rotated = any(entry.rotated for entry in form.actions)
    torch.testing.assert_close(found, decoded, rtol=2e-7, atol=2e-6 if rotated else 0)


def test_a_linear_that_shares_an_order_stores_none() -> None:
    weight, covariance = gaussian(ROWS, COLUMNS), correlated()
    tensors, decoded, order = quantized(weight, covariance, layout("scalar-2", group="other"))
    assert "order" not in tensors
    owner, same, _ = quantized(weight, covariance, layout("scalar-2"))
    assert torch.equal(decoded, same)
    assert torch.equal(unpack_order(owner["order"], COLUMNS, chunk_widths(COLUMNS, 0, CHUNK), 0), order)


def test_skip_keeps_the_original_bits() -> None:
    weight = gaussian(ROWS, COLUMNS).half().float()
    _, decoded, _ = quantized(weight, correlated(), layout("skip"))
    assert torch.equal(decoded, weight)


def test_the_chunks_behind_make_up_for_a_cheap_one() -> None:
    weight, covariance = gaussian(ROWS, COLUMNS), correlated()
    form = layout("scalar-1 skip skip")
    _, decoded, order = quantized(weight, covariance, form)
    behind = order[CHUNK:]
    assert not torch.equal(decoded[:, behind], weight[:, behind].half().float()), "skipped, but compensated"
    alone = weight.half().float()
    alone[:, order[:CHUNK]] = decoded[:, order[:CHUNK]]
    assert loss(weight, decoded, covariance) < 0.8 * loss(weight, alone, covariance)


def test_protected_columns_are_8_bit_whatever_the_action() -> None:
    weight, covariance = gaussian(ROWS, COLUMNS), correlated()
    form = layout("scalar-1", protected=0.04)
    tensors, decoded, order = quantized(weight, covariance, form)
    salient = order[: form.protected]
    assert set(salient.tolist()) == set(covariance.diagonal().topk(3).indices.tolist())
    step = weight[:, salient].abs().amax(0) / 127
    assert ((decoded - weight)[:, salient].abs() <= 2 * step).all()
    assert tensors["protected"].abs().max() == 127
    assert (decoded - weight)[:, order[form.protected :]].abs().mean() > 10 * step.max()


def test_importance_decides_where_a_trellis_errs() -> None:
    """Rows share a stream, so that the search can trade one row's error for another's."""
    weight, covariance, form = gaussian(ROWS, COLUMNS), correlated(), layout("trellis-1.5")
    importance = torch.ones(ROWS)
    importance[::2] = 100
    errors = [
        (weight - quantized(weight, covariance, form, fisher)[1])[::2].square().mean()
        for fisher in (importance, torch.ones(ROWS))
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("names", ["scalar-1 trellis-2 scalar-1.5", "trellis-1.5 scalar-2 skip", "scalar-8 scalar-3"])
@pytest.mark.parametrize("case", ["dead", "silent", "rows", "constant", "zeros", "fisher", "single"])
def test_degenerate_inputs_give_finite_results(names: str, case: str) -> None:
    rows = 1 if case == "single" else ROWS
    weight, covariance, importance = gaussian(rows, COLUMNS), correlated(), torch.ones(rows)
    match case:
        case "dead":
            covariance[::3] = 0
            covariance[:, ::3] = 0
        case "silent":
            covariance.zero_()
        case "rows":
            weight[[0, 5, ROWS - 1]] = 0
        case "constant":
            weight[:] = 0.25
        case "zeros":
            weight.zero_()
        case "fisher":
            importance.zero_()
    form = layout(names, protected=0.04, rows=rows)
    tensors, decoded, order = quantized(weight, covariance, form, importance)
    assert decoded.isfinite().all()
    assert all(value.float().isfinite().all() for value in tensors.values() if value.is_floating_point())
    torch.testing.assert_close(dequantize(form, tensors, order), decoded, rtol=0, atol=1e-5)
    assert loss(weight, decoded, covariance) <= 1e-6 + loss(weight, torch.zeros_like(weight), covariance)
    if case == "rows":
        assert decoded[[0, 5, ROWS - 1]].abs().max() < 0.01
    if case == "zeros":
        assert decoded.abs().max() < 1e-6


def test_skipped_chunks_have_no_say_in_the_scales() -> None:
    """Rows of very unequal size: their scales must be stored as well as if there were no skipped chunk."""
    weight, covariance = gaussian(ROWS, COLUMNS) * torch.logspace(0, 3, ROWS)[:, None], correlated()
    _, decoded, order = quantized(weight, covariance, layout("scalar-8 skip skip"))
    chunk = order[:CHUNK]
    error = (decoded - weight)[:, chunk].abs().amax(1) / weight[:, chunk].abs().amax(1)
    assert error.max() < 0.02


@pytest.mark.parametrize("dead", ["rows", "most rows", "blocks"])
@pytest.mark.parametrize("names", ["scalar-2", "trellis-2", "scalar-4", "scalar-8"])
def test_zeros_do_not_hurt_the_rest(names: str, dead: str) -> None:
    """Scales are stored against what rows and chunks share: those of zeros must not drag that along."""
    weight, covariance, form = gaussian(ROWS, COLUMNS), correlated(), layout(names)
    order = column_order(covariance.diagonal(), "saliency", CHUNK, 0)
    zero = torch.zeros_like(weight, dtype=torch.bool)
    match dead:
        case "rows":
            zero[[0, 5, ROWS - 1]] = True
        case "most rows":
            zero[ROWS // 3 :] = True
        case "blocks":
            zero[: ROWS // 3, order[CHUNK : 2 * CHUNK]] = True
            zero[ROWS // 2 :, order[:CHUNK]] = True
    expected = loss(weight, quantized(weight, covariance, form)[1], covariance)
    pruned = weight.masked_fill(zero, 0)
    found = loss(pruned, quantized(pruned, covariance, form)[1], covariance)
    assert found < 1.1 * expected


@pytest.mark.parametrize("names", ["scalar-8 trellis-4", "scalar-8 scalar-8", "scalar-8 scalar-4"])
def test_8_bits_do_not_cut_off_a_single_large_weight(names: str) -> None:
    """Forty times the others in one row and chunk, as the weight that makes a model's attention sink."""
    weight, covariance = 0.1 * gaussian(ROWS, COLUMNS), torch.eye(COLUMNS)
    weight[3, 5] = 4.0
    covariance[5, 5] = 1e4
    _, decoded, order = quantized(weight, covariance, layout(names))
    assert decoded[3, 5].item() == pytest.approx(4.0, rel=0.02)
    error = (decoded - weight)[:, order[:CHUNK]]
    assert error.square().mean().sqrt() < 0.01, "and the others keep most of their 8 bits"
