"""The loss meter: exact where nothing is lost, ordered by the bits, and close to real quantization."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.families import FullGpu, Prepared, in_float32, memory_for, prepare, uniform
from windquant import calibration, memory, models, streaming
from windquant.bank import Bank
from windquant.decoder import decoder_layers
from windquant.errors import WindquantError
from windquant.feedback import column_order
from windquant.measure import LossMeter
from windquant.quantize import layouts_of, quantized_linears
from windquant.statistics import Statistics


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("measure"), tiny_model_folder)


def make(prepared: Prepared, seed: int = 0, tokens: int = 4096, whole: bool | None = None) -> LossMeter:
    bank = Bank.load(prepared.bank)
    with in_float32():
        found = LossMeter(prepared.model, prepared.calibration, prepared.statistics, bank, tokens, seed, whole)
        found.prepare()
    return found


@pytest.fixture(scope="module")
def meter(prepared: Prepared) -> LossMeter:
    return make(prepared)


def choice(meter: LossMeter, action: str) -> np.ndarray:
    return np.full(len(meter.bank.linear), meter.bank.actions.index(action), np.int64)


def test_the_original_loss_is_the_models(meter: LossMeter, prepared: Prepared) -> None:
    model = models.load(prepared.model)
    ids = meter.ids
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert meter.original == pytest.approx(expected, rel=1e-5)


def test_the_dearest_plan_costs_nothing_and_cheaper_ones_more(meter: LossMeter) -> None:
    gaps = [meter.loss_gap(choice(meter, name)) for name in ("skip", "scalar-8", "scalar-4", "scalar-2", "scalar-1")]
    assert gaps[0] == 0
    assert abs(gaps[1]) < 1e-4
    assert gaps[2] < 0.5 * gaps[3] < 0.4 * gaps[4]
    assert gaps[4] > 0.05


def test_numbers_follow_from_the_seed_alone(meter: LossMeter, prepared: Prepared) -> None:
    plans = [
        np.random.default_rng(seed).integers(len(meter.bank.actions), size=len(meter.bank.linear)) for seed in (0, 1)
    ]
    first = [meter.loss_gap(plan) for plan in plans]
    again = make(prepared)
    assert [again.loss_gap(plan) for plan in reversed(plans)] == first[::-1], "whatever was measured before"
    other = make(prepared, seed=1)
    assert other.original == meter.original
    assert [other.loss_gap(plan) for plan in plans] != first


def dressed(meter: LossMeter, plan: np.ndarray) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of every linear its place in the bank, its weight under the plan (noise as drawn), and the original one."""
    relative = torch.from_numpy(np.append(meter.relative[np.arange(len(plan)), plan], 0.0)).float()
    for layer, _ in streaming.walk(meter.model):
        originals = {index: parameter.detach().clone() for index, parameter in meter.parameters(layer)}
        signs = meter.stand_ins(layer, relative)
        next(signs)
        yield from ((index, parameter.detach(), originals[index]) for index, parameter in meter.parameters(layer))
        assert list(signs) == [-1]
        for index, parameter in meter.parameters(layer):
            assert torch.equal(parameter, originals[index]), "what was lent comes back as it was"


def test_protected_columns_are_left_alone(meter: LossMeter, prepared: Prepared) -> None:
    statistics = Statistics.load(prepared.statistics)
    for index, weight, original in dressed(meter, choice(meter, "scalar-1")):
        linear = meter.bank.linears[index]
        protected = round(0.03 * linear.columns)
        order = column_order(statistics.energy[linear.group], "saliency", 32, protected)
        same = (weight == original).float().mean(0)
        assert protected > 0
        assert (same[order[:protected]] == 1).all()
        assert (same[order[protected:]] < 0.1).all()


def test_each_unit_is_shaken_by_its_own_action(meter: LossMeter) -> None:
    """A plan that is cheap for one unit only: its columns change, no others."""
    plan = choice(meter, "skip")
    unit = int(np.flatnonzero(meter.bank.linear == 2)[1])
    plan[unit] = 0
    for index, weight, original in dressed(meter, plan):
        changed = (weight != original).any(0)
        assert torch.equal(changed, meter.unit_of[index] == unit)
        assert changed.any() == (index == 2)


def test_the_stand_in_has_the_banks_error(meter: LossMeter) -> None:
    """E |w' - w|^2 = q |w|^2: what is taken away and what is shaken make up the unit's relative error together."""
    for index, weight, original in dressed(meter, choice(meter, "scalar-1")):
        for unit in np.flatnonzero(meter.bank.linear == index)[:2]:  # whole chunks
            columns = meter.unit_of[index] == int(unit)
            error = (weight - original)[:, columns].square().sum() / original[:, columns].square().sum()
            assert error.item() == pytest.approx(meter.relative[unit, 0], rel=0.25)


def test_a_streamed_model_measures_the_same_to_the_last_bit(prepared: Prepared, meter: LossMeter) -> None:
    """Its noise is drawn anew for every plan, and one layer has weights at a time."""
    streamed = make(prepared, whole=False)
    assert hasattr(streamed.model, streaming.SOURCE)
    assert streamed.original == meter.original
    assert np.array_equal(streamed.relative, meter.relative)
    for name in ("scalar-1", "scalar-3"):
        assert streamed.loss_gap(choice(meter, name)) == meter.loss_gap(choice(meter, name))
    assert not streamed.noise.kept
    assert len(meter.noise.kept) == len(meter.bank.linears)
    _, layers = decoder_layers(streamed.model)
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_a_full_gpu_measures_fewer_windows_at_a_time(
    whole: bool,
    prepared: Prepared,
    meter: LossMeter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with in_float32():
        expected = meter.loss_gap(choice(meter, "scalar-1"))

    gpu = FullGpu(monkeypatch, 2)
    other = make(prepared, whole=whole)
    gpu.most = 1  # another process takes some while the search runs
    with in_float32():
        found = other.loss_gap(choice(meter, "scalar-1"))
    assert found == pytest.approx(expected, rel=1e-4)
    assert other.loss_gap(choice(meter, "skip")) == 0, "what was lent when it broke has come back"
    said = re.findall("again with a batch of ([0-9]+)", capsys.readouterr().err)
    assert said == ["4", "2", "1"]
    gpu.most = 0
    with pytest.raises(WindquantError, match="out of GPU memory with a batch of 1"):
        other.loss_gap(choice(meter, "skip"))


def test_where_model_and_noise_do_not_fit_they_are_streamed(
    prepared: Prepared, meter: LossMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * 4 * sum(parameter.numel() for parameter in meter.model.parameters())  # weights and noise, float32
    for room, whole in ((1.1 * size, True), (0.9 * size, False)):
        monkeypatch.setenv(memory.LIMIT, memory_for(room))
        assert hasattr(make(prepared).model, streaming.SOURCE) != whole


def test_tokens_bound_the_text(prepared: Prepared, meter: LossMeter) -> None:
    assert meter.ids.shape == (4, 48)  # of 6: the others confirm a search's plan, however many tokens are asked for
    assert make(prepared, tokens=100).ids.shape == (2, 48)
    assert make(prepared, tokens=1).ids.shape == (1, 48)


def test_a_loss_that_is_not_finite_is_infinite(prepared: Prepared) -> None:
    broken = make(prepared)
    broken.model.get_output_embeddings().weight.mul_(torch.inf)
    assert broken.loss_gap(choice(broken, "scalar-2")) == math.inf


@pytest.mark.parametrize("action", ["scalar-1.5", "scalar-2"])
def test_the_measured_gap_is_about_that_of_real_quantization(meter: LossMeter, prepared: Prepared, action: str) -> None:
    statistics = Statistics.load(prepared.statistics)
    texts = calibration.load(prepared.calibration)
    model = models.load(prepared.model)
    layouts = layouts_of(uniform(prepared, action), statistics.linears)
    ids = texts.reward.long()
    with in_float32(), torch.no_grad():
        dict(quantized_linears(model, layouts, "saliency", statistics, [texts.calibration.long()], 4))
        real = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() - meter.original
    assert 0.5 < meter.loss_gap(choice(meter, action)) / real < 2
