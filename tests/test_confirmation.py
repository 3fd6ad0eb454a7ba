"""Plans are compared as really quantized models: as the functions of one linear give it, on text no search has seen."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import FullGpu, Prepared, in_float32, inputs_of, prepare, uniform
from windquant import calibration, confirmation, models, quantize
from windquant.bank import Bank
from windquant.divergence import kl_divergence
from windquant.errors import WindquantError
from windquant.feedback import column_order, quantize_linear
from windquant.plan import Plan
from windquant.quantize import layouts_of
from windquant.statistics import Statistics


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("confirmation"), tiny_model_folder)


def compared(
    prepared: Prepared, plans: list[Plan], tokens: int = 4096, update: Callable[[int], object] = int
) -> list[float]:
    with in_float32():
        return confirmation.divergences(
            prepared.model, prepared.calibration, prepared.statistics, plans, tokens, update
        )


def changed(prepared: Prepared, linear: int, action: str, other: str) -> Plan:
    """The uniform plan of an action, but for one linear."""
    bank = Bank.load(prepared.bank)
    choice = np.full(len(bank.linear), bank.actions.index(action), np.int64)
    choice[bank.linear == linear] = bank.actions.index(other)
    return bank.plan(choice, allocator="lagrangian", target_bits=16.5, seed=0)


def test_they_are_the_linears_quantized_on_the_originals_inputs(prepared: Prepared) -> None:
    statistics = Statistics.load(prepared.statistics)
    texts = calibration.load(prepared.calibration)
    plans = [uniform(prepared, "scalar-1.5"), uniform(prepared, "scalar-3")]
    seen: list[int] = []
    found = compared(prepared, plans, update=seen.append)
    assert seen == [1] * 2 * len(statistics.linears)
    assert found[1] < found[0]

    original = models.load(prepared.model)
    ids = texts.reward[4:].long()  # of 6, three quarters are measured
    with torch.no_grad():
        with inputs_of(original, statistics.linears) as inputs:
            original(texts.calibration.long())
        exact = original(ids).logits
        for plan, nats in zip(plans, found, strict=True):
            model = models.load(prepared.model)
            for name, layout in layouts_of(plan, statistics.linears).items():
                weight, group = model.get_parameter(f"{name}.weight"), layout.linear.group
                order = column_order(statistics.energy[group], "saliency", 32, layout.protected)
                matrix = inputs[name].T @ inputs[name] / len(inputs[name])
                weight.copy_(quantize_linear(weight, order, matrix, layout, statistics.fisher[name])[1])
            assert nats == pytest.approx(kl_divergence(model(ids).logits, exact).item(), rel=1e-3)


def test_what_plans_treat_alike_is_quantized_once(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    linears = Statistics.load(prepared.statistics).linears
    plans = [uniform(prepared, "scalar-2"), changed(prepared, 3, "scalar-2", "scalar-4")]
    alone = [*compared(prepared, plans[:1]), *compared(prepared, plans[1:])]

    done: list[str] = []

    def counted(*arguments: Any) -> Any:
        done.append(arguments[3].linear.name)
        return quantize_linear(*arguments)

    monkeypatch.setattr(quantize, "quantize_linear", counted)
    seen: list[int] = []
    assert compared(prepared, plans, update=seen.append) == alone, "as if each were the only one"
    assert sorted(done) == sorted([*(linear.name for linear in linears), linears[3].name])
    assert sum(seen) == 2 * len(linears)
    assert alone[1] < alone[0]
    assert compared(prepared, plans[::-1]) == alone[::-1]


def test_the_text_is_what_no_plan_is_measured_on(prepared: Prepared) -> None:
    texts = calibration.load(prepared.calibration)
    for tokens, measured in ((4096, 4), (100, 2), (1, 1)):
        parts = texts.measured_and_unseen(tokens)
        assert [len(part) for part in parts] == [measured, 6 - measured]
        assert torch.equal(torch.cat(parts), texts.reward.long())
    plan = [uniform(prepared, "scalar-2")]
    assert compared(prepared, plan, tokens=1) != compared(prepared, plan, tokens=100)


def test_a_full_gpu_compares_fewer_windows_at_a_time(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = [uniform(prepared, "scalar-3")]  # under fewer bits other sums turn more codes
    expected = compared(prepared, plans)
    gpu = FullGpu(monkeypatch, 2)
    assert compared(prepared, plans) == pytest.approx(expected, rel=1e-3)
    assert re.findall("again with a batch of ([0-9]+)", capsys.readouterr().err) == ["4", "2"]
    gpu.most = 0
    with pytest.raises(WindquantError, match="out of GPU memory with a batch of 1"):
        compared(prepared, plans)
