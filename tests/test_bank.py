"""The bank: its bytes are those on disk, its errors those that quantization makes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tests.checkpoint.making import ARCHITECTURES, save_tokenizer, tiny
from tests.families import NAMES, WINDOW, Prepared, family, prepare, run, statistics_of, token_ids
from windquant import bank as module, checkpoint, models, streaming
from windquant.bank import Bank, join, lowest_bits, make, unit_errors
from windquant.decoder import quantizable
from windquant.errors import WindquantError
from windquant.feedback import column_order, factor, quantize_linear
from windquant.packed import tensor_bytes, unit_bytes
from windquant.plan import Units
from windquant.quantize import layouts_of, quantized_linears
from windquant.quantizers import action, menu
from windquant.quantizers.trellis import DISTORTION
from windquant.statistics import DAMPING, Statistics
from windquant.units import Linear


def linear(name: str = "w", rows: int = 30, columns: int = 75, group: str = "w") -> Linear:
    return Linear(name, name, 0, group, rows, columns)


def covariance_of(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5)
    x *= torch.linspace(2, 0.2, columns)
    return x.T @ x / len(x)


def statistics_for(linears: list[Linear], covariance: Tensor, fisher: Tensor | None = None) -> Statistics:
    """Statistics of linears that read one input."""
    energy = covariance.diagonal().clone()
    order = energy.argsort(descending=True, stable=True)
    conditional = torch.empty_like(energy)
    conditional[order] = factor(covariance[order][:, order], DAMPING * energy.mean().item()).diagonal() ** -2
    group = linears[0].group
    weights = {one.name: torch.ones(one.rows) if fisher is None else fisher for one in linears}
    return Statistics(linears, {group: energy}, {group: conditional}, weights)


def tiny_bank(protected: float = 0.04, order: str = "saliency", names: list[str] = NAMES) -> Bank:
    """Two linears over one input, and one action of every kind."""
    linears = [linear("q", 30, 75, "q"), linear("k", 12, 75, "q")]
    generator = torch.Generator().manual_seed(3)
    weights = [(one, torch.randn(one.rows, one.columns, generator=generator)) for one in linears]
    units = Units(32, protected, WINDOW, order)
    return make("tiny", weights, statistics_for(linears, covariance_of(75)), units, names)


def any_choice(bank: Bank, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(len(bank.actions), size=len(bank.linear))


# -- parts


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 12))
def test_parts_are_the_whole(rows: list[int], jobs: int) -> None:
    linears = [linear(f"w{i}", count, 75) for i, count in enumerate(rows)]
    statistics = statistics_for(linears, covariance_of(75))
    weights = {one.name: torch.randn(one.rows, 75) for one in linears}

    def bank(some: list[Linear]) -> Bank:
        return make("tiny", [(one, weights[one.name]) for one in some], statistics, Units(32, 0.04, WINDOW), NAMES)

    shares = [module.share(linears, part, jobs) for part in range(1, jobs + 1)]
    assert [one for some in shares for one in some] == linears
    joined = module.join([bank(some) for some in shares], linears)
    assert joined.sha256 == bank(linears).sha256
    if len(set(rows)) == 1 and jobs <= len(rows):  # linears that are alike
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_parts_of_other_banks_are_refused() -> None:
    linears = [linear("q", 30, 75, "q"), linear("k", 12, 75, "q")]
    bank = tiny_bank()
    with pytest.raises(WindquantError, match="--parts: not all parts of one bank"):
        module.join([bank, bank], linears)
    with pytest.raises(WindquantError, match="--parts"):
        module.join([tiny_bank(order="natural"), tiny_bank()], linears * 2)
    with pytest.raises(WindquantError, match="--part 3: give 1 to --jobs, 2"):
        module.share(linears, 3, 2)


# -- geometry


def test_units_stand_in_model_order() -> None:
    bank = tiny_bank()
    assert bank.linear.tolist() == [0, 0, 0, 1, 1, 1]
    assert bank.position.tolist() == [0, 1, 2] * 2
    assert bank.width.tolist() == [32, 32, 8] * 2  # 3 of 75 columns are protected
    assert bank.weights == (30 + 12) * 75
    assert bank.unit_weights.tolist() == [960, 960, 240, 384, 384, 96]
    assert bank.errors.shape == bank.bytes.shape == (6, len(NAMES))
    assert (bank.units.chunk, bank.actions) == (32, NAMES)


def test_saliency_order_puts_the_energy_first() -> None:
    salient, natural = tiny_bank(order="saliency"), tiny_bank(order="natural")
    assert (np.diff(salient.energy[:3]) < 0).all()
    assert natural.energy.sum() > 0
    energy = covariance_of(75).diagonal()
    rest = energy.sort(descending=True).values[3:]
    assert salient.energy[:3] == pytest.approx([part.mean().item() for part in rest.split(32)])
    columns = column_order(energy, "natural", 32, 3)[3:]
    assert natural.energy[:3] == pytest.approx([energy[part].mean().item() for part in columns.split(32)])


# -- errors


@pytest.mark.parametrize("treatment", ["scalar", "trellis"])
def test_errors_fall_with_the_bits(treatment: str) -> None:
    bank = tiny_bank(names=menu(treatment))
    own = [place for place, name in enumerate(bank.actions) if name.startswith(treatment)]
    assert len(own) >= 5
    assert (np.diff(bank.errors[:, own], axis=1) < 0).all()
    sizes = [unit_bytes(action(bank.actions[place], WINDOW, torch.float16), 256, 64) for place in own]
    assert (np.diff(sizes) > 0).all()
    assert (bank.errors[:, bank.actions.index("skip")] == 0).all()
    assert (bank.errors[:, own] > 0).all()


def test_errors_are_weighted_by_fisher_and_conditional_energy() -> None:
    entries = [action(name, WINDOW, torch.float16) for name in ("scalar-2", "trellis-2", "skip")]
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn(10, 16, generator=generator)
    conditional = torch.rand(16, generator=generator) + 0.1
    fisher = torch.rand(10, generator=generator)
    found = unit_errors(chunk, conditional, fisher, entries)
    per_row = entries[0].error(chunk, conditional)
    assert found[0] == pytest.approx(0.5 * (fisher * per_row).sum().item())
    assert found[1] == pytest.approx(
        0.5 * DISTORTION[2.0, WINDOW] * (fisher @ chunk.square().sum(1)).item() * conditional.log().mean().exp().item(),
        rel=1e-4,
    )
    assert found[2] == 0
    assert unit_errors(chunk, conditional * 4, fisher, entries) == pytest.approx([4 * error for error in found])
    assert unit_errors(chunk, conditional, fisher * 3, entries) == pytest.approx([3 * error for error in found])
    silent = unit_errors(chunk, torch.zeros(16), fisher, entries)
    assert all(0 <= error < 1e-30 for error in silent)


@pytest.mark.parametrize("protected", [0.0, 0.04])
@pytest.mark.parametrize("name", ["scalar-2", "scalar-3", "trellis-1.5", "trellis-2", "trellis-2.5"])
def test_predicted_errors_are_those_of_quantization_with_feedback(name: str, protected: float) -> None:
    generator = torch.Generator().manual_seed(4)
    one = linear(rows=256, columns=96)
    weight = torch.randn(256, 96, generator=generator)
    fisher = torch.rand(256, generator=generator) + 0.5
    covariance = covariance_of(96)
    units = Units(32, protected, WINDOW)
    bank = make("w", [(one, weight)], statistics_for([one], covariance, fisher), units, [name])
    choice = np.zeros(len(bank.linear), np.int64)
    form = layouts_of(bank.plan(choice, allocator="a", target_bits=16, seed=0), [one])["w"]
    order = column_order(covariance.diagonal(), "saliency", 32, form.protected)
    _, decoded = quantize_linear(weight, order, covariance, form, fisher)
    error = weight - decoded
    made = 0.5 * (fisher * ((error @ covariance) * error).sum(1)).sum().item()
    assert bank.predicted_loss(choice) == pytest.approx(made, rel=0.3)


# -- bytes and budgets


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    chunk=st.sampled_from([8, 16, 32, 64]),
    protected=st.sampled_from([0.0, 0.03, 0.2]),
    order=st.sampled_from(["saliency", "natural"]),
    data=st.data(),
)
def test_planned_bytes_are_the_stored_ones(
    rows: int, columns: int, chunk: int, protected: float, order: str, data: st.DataObject
) -> None:
    """For every shape, chunk, protected fraction and plan; of a linear that owns its order and one that shares it."""
    linears = [linear("q", rows, columns, "q"), linear("k", 5, columns, "q")]
    covariance = covariance_of(columns)
    generator = torch.Generator().manual_seed(rows)
    weights = {one.name: torch.randn(one.rows, columns, generator=generator) for one in linears}
    units = Units(chunk, protected, WINDOW, order)
    bank = make("w", [(one, weights[one.name]) for one in linears], statistics_for(linears, covariance), units, NAMES)
    count = len(bank.linear)
    choice = np.array(data.draw(st.lists(st.integers(0, len(NAMES) - 1), min_size=count, max_size=count)), np.int64)
    plan = bank.plan(choice, allocator="any", target_bits=1e9, seed=0)
    layouts = layouts_of(plan, linears)
    stored = 0
    for name, form in layouts.items():
        columns_in_order = column_order(covariance.diagonal(), order, chunk, form.protected)
        importance = torch.ones(form.linear.rows)
        tensors, decoded = quantize_linear(weights[name], columns_in_order, covariance, form, importance)
        assert decoded.isfinite().all()
        assert {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()} == form.shapes
        stored += sum(value.nbytes for value in tensors.values())
        assert form.bytes() == tensor_bytes(form.shapes)
    assert plan.bytes == stored == bank.total_bytes(choice)
    assert plan.effective_bits == 8 * stored / bank.weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_planned_bytes_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    source = tmp_path / "original"
    tiny(name).save_pretrained(source)
    save_tokenizer(source)
    model = family(name)
    ids = token_ids(4, 40)
    statistics = statistics_of(model, ids)
    dtype = str(ARCHITECTURES[name][2].get("dtype", torch.float16)).split(".")[1]
    weights = [(one, model.get_parameter(f"{one.name}.weight")) for one in statistics.linears]
    bank = make(name, weights, statistics, Units(32, 0.03, WINDOW, "saliency", dtype), NAMES)
    plan = bank.plan(any_choice(bank), allocator="random", target_bits=16, seed=0)
    layouts = layouts_of(plan, statistics.linears)
    tensors = dict(quantized_linears(model, layouts, "saliency", statistics, [ids], 4))
    measured = checkpoint.write(
        tmp_path / "packed", model, layouts, tensors.items(), streaming.parameters(model, layouts), plan, source
    )
    assert measured.measured_bytes == plan.bytes
    assert measured.effective_bits == plan.effective_bits
    assert measured.weights == plan.weights == bank.weights
    assert checkpoint.read(tmp_path / "packed").plan == plan


def test_the_budget_is_what_a_target_leaves() -> None:
    bank = tiny_bank()
    outcomes = set()
    for seed in range(200):
        choice = any_choice(bank, seed)
        target = 3 + seed % 50 / 10
        used = sum(bank.bytes[unit, place] for unit, place in enumerate(choice))
        fits = used <= bank.budget(target)
        outcomes.add(fits)
        assert fits == (bank.effective_bits(choice) <= target)
        if fits:
            plan = bank.plan(choice, allocator="a", target_bits=target, seed=0)
            assert plan.bytes == used + bank.fixed_bytes
        else:
            with pytest.raises(ValueError, match="above its target"):
                bank.plan(choice, allocator="a", target_bits=target, seed=0)
    assert outcomes == {True, False}


def test_lowest_bits_is_the_cheapest_plan() -> None:
    bank = tiny_bank()
    cheapest = bank.bytes.argmin(axis=1)
    assert 0 <= bank.lowest_bits() - bank.effective_bits(cheapest) < 1e-4
    assert bank.plan(cheapest, allocator="a", target_bits=bank.lowest_bits(), seed=0).effective_bits > 1
    assert all(bank.effective_bits(any_choice(bank, seed)) >= bank.effective_bits(cheapest) for seed in range(20))
    assert lowest_bits(bank.linears, bank.units, bank.actions) == pytest.approx(bank.effective_bits(cheapest), abs=1e-9)
    first = bank.bytes == bank.bytes.min(axis=1, keepdims=True)
    unavailable = dataclasses.replace(bank, errors=np.where(first, np.inf, bank.errors))
    assert unavailable.lowest_bits() > bank.lowest_bits()


def test_a_plan_names_its_actions_and_what_they_cost() -> None:
    bank = tiny_bank()
    choice = any_choice(bank)
    plan = bank.plan(choice, allocator="mine", target_bits=16, seed=5, fallback=True, search={"steps": 2})
    assert [name for row in plan.actions.values() for name in row] == [NAMES[place] for place in choice]
    assert {name: len(row) for name, row in plan.actions.items()} == {"q": 3, "k": 3}
    assert plan.predicted_loss == pytest.approx(sum(bank.errors[unit, place] for unit, place in enumerate(choice)))
    assert (plan.allocator, plan.seed, plan.fallback, plan.search) == ("mine", 5, True, {"steps": 2})
    assert plan.units == bank.units
    shares = bank.shares(choice)
    assert sum(shares.values()) == pytest.approx(1)
    for name, share in shares.items():
        assert share == pytest.approx(bank.unit_weights[choice == NAMES.index(name)].sum() / bank.unit_weights.sum())


# -- the file


def same(one: Bank, other: Bank) -> bool:
    fields = [field.name for field in dataclasses.fields(Bank)]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    bank = tiny_bank()
    bank.save(tmp_path / "bank")
    found = Bank.load(tmp_path / "bank")
    assert same(found, bank)
    assert found.bytes.dtype == np.int64
    assert found.linear.dtype == np.int32
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "bank").read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def without_document(path: Path) -> None:
    save_file(load_file(path), path, {"bank": "[]"})


def without_errors(path: Path) -> None:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    del arrays["errors"]
    save_file(arrays, path, metadata)


def of_another_version(path: Path) -> None:
    with safe_open(path, framework="np") as file:
        document = json.loads(file.metadata()["bank"])
    save_file(load_file(path), path, {"bank": json.dumps(document | {"format": module.FORMAT + 1})})


@pytest.mark.parametrize(
    "damage", [cut, of_another_version, without_metadata, without_document, without_errors, Path.unlink]
)
def test_a_damaged_bank_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "bank.safetensors"
    tiny_bank().save(path)
    damage(path)
    with pytest.raises(WindquantError, match=r"bank\.safetensors: .*delete it and run again"):
        Bank.load(path)


# -- the step


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("bank"), tiny_model_folder)


def test_step_makes_the_bank_of_the_model(prepared: Prepared, tmp_path: Path) -> None:
    bank = Bank.load(prepared.bank)
    statistics = Statistics.load(prepared.statistics)
    assert bank.linears == statistics.linears == quantizable(models.load(prepared.model))
    assert bank.units == Units(32, 0.03, WINDOW, "saliency", "float16")
    assert bank.actions == menu("scalar")
    notes = run(
        module,
        tmp_path / "again",
        prepared.inputs("model", "statistics"),
        chunk=32,
        protected=0.03,
        treatment="scalar",
        window=WINDOW,
    )
    assert notes == {"units": len(bank.linear), "lowest_bits": bank.lowest_bits()}
    assert (tmp_path / "again").read_bytes() == prepared.bank.read_bytes()


def test_of_more_jobs_than_linears_some_have_none(prepared: Prepared, tmp_path: Path) -> None:
    settings = {"chunk": 32, "protected": 0.03, "treatment": "scalar", "window": WINDOW, "jobs": 20}
    inputs = prepared.inputs("model", "statistics")
    notes = [run(module, tmp_path / f"{part}", inputs, part=part, **settings) for part in range(1, 21)]
    assert {"units": 0} in notes
    parts = [Bank.load(tmp_path / f"{part}") for part in range(1, 21)]
    joined = join(parts, Statistics.load(prepared.statistics).linears)
    joined.save(tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == prepared.bank.read_bytes()
