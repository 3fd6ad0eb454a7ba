"""The loss meter: exact where nothing is lost, ordered by the bits, and close to real quantization."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.families import Prepared, in_float32, prepare, uniform
from windquant import calibration, models
from windquant.bank import Bank
from windquant.feedback import column_order
from windquant.measure import LossMeter
from windquant.quantize import layouts_of, quantize_model
from windquant.statistics import Statistics


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("measure"), tiny_model_folder)


def make(prepared: Prepared, seed: int = 0, tokens: int = 4096) -> LossMeter:
    bank = Bank.load(prepared.bank)
    with in_float32():
        return LossMeter(prepared.model, prepared.calibration, prepared.statistics, bank, tokens, seed)


@pytest.fixture(scope="module")
def meter(prepared: Prepared) -> LossMeter:
    return make(prepared)


def choice(meter: LossMeter, action: str) -> np.ndarray:
    return np.full(len(meter.bank.linear), meter.bank.actions.index(action), np.int64)


def test_the_original_loss_is_the_models(meter: LossMeter, prepared: Prepared) -> None:
    model = models.load(prepared.model)
    ids = calibration.load(prepared.calibration).reward.long()
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


def test_protected_columns_are_left_alone(meter: LossMeter, prepared: Prepared) -> None:
    meter.loss_gap(choice(meter, "scalar-1"))
    statistics = Statistics.load(prepared.statistics)
    original = models.load(prepared.model)
    for linear, (parameter, *_) in zip(meter.bank.linears, meter.parts, strict=True):
        protected = round(0.03 * linear.columns)
        order = column_order(statistics.energy[linear.group], "saliency", 32, protected)
        same = (parameter.cpu() == original.get_parameter(f"{linear.name}.weight")).float().mean(0)
        assert protected > 0
        assert (same[order[:protected]] == 1).all()
        assert (same[order[protected:]] < 0.1).all()


def test_each_unit_is_shaken_by_its_own_action(meter: LossMeter) -> None:
    """A plan that is cheap for one unit only: its columns change, no others."""
    plan = choice(meter, "skip")
    unit = int(np.flatnonzero(meter.bank.linear == 2)[1])
    plan[unit] = 0
    meter.loss_gap(plan)
    for index, (parameter, weight, _, unit_of) in enumerate(meter.parts):
        changed = (parameter != weight).any(0)
        assert torch.equal(changed, unit_of == unit)
        assert changed.any() == (index == 2)


def test_the_stand_in_has_the_banks_error(meter: LossMeter) -> None:
    """E |w' - w|^2 = q |w|^2: what is taken away and what is shaken make up the unit's relative error together."""
    meter.loss_gap(choice(meter, "scalar-1"))
    for index, (parameter, weight, _, unit_of) in enumerate(meter.parts):
        for unit in np.flatnonzero(meter.bank.linear == index)[:2]:  # whole chunks
            columns = unit_of == int(unit)
            error = (parameter - weight)[:, columns].square().sum() / weight[:, columns].square().sum()
            assert error.item() == pytest.approx(meter.relative[unit, 0], rel=0.25)


def test_tokens_bound_the_text(prepared: Prepared, meter: LossMeter) -> None:
    assert meter.ids.shape == (6, 48)
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
        quantize_model(model, layouts, "saliency", statistics, texts.calibration.long(), 4, int)
        real = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() - meter.original
    assert 0.5 < meter.loss_gap(choice(meter, action)) / real < 2
