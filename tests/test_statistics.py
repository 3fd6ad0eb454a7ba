"""Energies, conditional energies and Fisher weights against direct computations on the whole model."""

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.families import (
    collected,
    family,
    in_float32,
    inputs_of,
    own_text,
    prepare,
    run,
    save_calibration,
    statistics_of,
    token_ids,
)
from windquant import compute, models, statistics, streaming
from windquant.decoder import quantizable
from windquant.errors import WindquantError
from windquant.statistics import Covariance, Statistics

IDS = token_ids(6, 40)  # in batches of 4: the last one is smaller
FAMILIES = ("qwen2", "gemma3", "mistral")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Statistics]:
    model = family(request.param)
    return model, statistics_of(model, IDS)


@pytest.fixture(scope="module")
def inputs(case: tuple[PreTrainedModel, Statistics]) -> dict[str, Tensor]:
    model, found = case
    with inputs_of(model, found.linears) as seen, torch.no_grad():
        model(IDS)
    return seen


def full_gradients(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """Gradient of the summed next-token loss at every linear's output, [tokens, rows], by one backward pass."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        out.retain_grad()
        outputs[name] = out

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: keep(name, out)) for name in names
    ]
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    logits = model(IDS).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    embedding.requires_grad_(False).grad = None
    for handle in handles:
        handle.remove()
    return {name: out.grad.flatten(0, -2) for name, out in outputs.items() if out.grad is not None}


def test_every_group_and_linear_has_its_statistics(case: tuple[PreTrainedModel, Statistics]) -> None:
    _, found = case
    columns = {linear.group: (linear.columns,) for linear in found.linears}
    assert {group: tuple(value.shape) for group, value in found.energy.items()} == columns
    assert {group: tuple(value.shape) for group, value in found.conditional.items()} == columns
    assert {name: len(value) for name, value in found.fisher.items()} == {
        linear.name: linear.rows for linear in found.linears
    }


def test_energies_are_the_mean_squares_of_the_inputs(
    case: tuple[PreTrainedModel, Statistics], inputs: dict[str, Tensor]
) -> None:
    for linear in case[1].linears:  # also those that only share a group
        expected = inputs[linear.name].square().mean(0)
        torch.testing.assert_close(case[1].energy[linear.group], expected, rtol=1e-4, atol=1e-7)


def test_conditional_energies_are_what_later_columns_cannot_express(
    case: tuple[PreTrainedModel, Statistics], inputs: dict[str, Tensor]
) -> None:
    for group, conditional in case[1].conditional.items():
        energy = case[1].energy[group]
        x = inputs[group].double()
        damped = x.T @ x / len(x)
        added = statistics.DAMPING * energy.mean()
        damped.diagonal().add_(added)
        order = torch.argsort(energy, descending=True, stable=True)
        for place in (0, 1, len(order) // 2, len(order) - 2):
            first, rest = order[place], order[place + 1 :]
            across = damped[first, rest]
            expected = damped[first, first] - across @ torch.linalg.solve(damped[rest][:, rest], across)
            assert conditional[first].item() == pytest.approx(expected.item(), rel=1e-3)
        assert conditional[order[-1]].item() == pytest.approx(damped[order[-1], order[-1]].item(), rel=1e-3)
        assert (conditional > 0).all()
        assert (conditional <= 1.001 * (energy + added)).all()


def test_fisher_weights_are_the_mean_squared_gradients(case: tuple[PreTrainedModel, Statistics]) -> None:
    model, found = case
    gradients = full_gradients(model, [linear.name for linear in found.linears])
    for linear in found.linears:
        expected = gradients[linear.name].square().sum(0) / IDS.numel()
        torch.testing.assert_close(found.fisher[linear.name], expected, rtol=1e-3, atol=1e-6 * expected.max().item())


def test_the_batch_changes_nothing() -> None:
    model = family("llama")
    with in_float32():
        one, two, odd = (collected(model, IDS, n) for n in (1, 6, 5))  # at 5 places of 1, 4 and 1 samples
    for other in (two, odd):
        for part in ("energy", "conditional", "fisher"):
            for name, value in getattr(one, part).items():
                torch.testing.assert_close(value, getattr(other, part)[name], rtol=1e-3, atol=1e-6 * value.max().item())


def test_bfloat16_products_are_close_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama")
    exact = statistics_of(model, IDS)
    monkeypatch.setattr(compute, "native_bfloat16", lambda: True)
    rounded = collected(model, IDS, 4)
    for part in ("energy", "conditional", "fisher"):
        for name, value in getattr(rounded, part).items():
            assert value.dtype == torch.float32
            ratio = value / getattr(exact, part)[name]
            assert (ratio.log().abs().mean() < 0.03).item(), name
    assert any(not torch.equal(value, exact.energy[name]) for name, value in rounded.energy.items()), (
        "BF16 was really used"
    )


@pytest.fixture(scope="module")
def known() -> tuple[PreTrainedModel, Tensor, Statistics]:
    model = family("llama")
    ids = own_text(model, 24, 48)
    return model, ids, statistics_of(model, ids)


@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_the_predicted_loss_increase_is_the_measured_one(
    known: tuple[PreTrainedModel, Tensor, Statistics], kind: str
) -> None:
    model, ids, found = known
    linear = next(linear for linear in found.linears if linear.layer == 0 and linear.kind == kind)
    weight = model.get_parameter(f"{linear.name}.weight")
    original = weight.clone()
    error = 0.2 * original.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    predicted = 0.5 * (found.fisher[linear.name] @ error.square() @ found.energy[linear.group]).item()

    @torch.no_grad()
    def loss() -> float:
        logits = model(ids).logits.double()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    before = loss()
    with torch.no_grad():
        both = 0.0
        for sign in (1, -1):  # the mean is free of the first order
            weight.copy_(original + sign * error)
            both += loss() / 2
        weight.copy_(original)
    assert 1 / 2 < predicted / (both - before) < 2


def test_an_input_that_overflows_is_refused_by_name() -> None:
    model = family("llama")
    model.model.layers[1].mlp.up_proj.weight.mul_(1e25)
    with in_float32(), pytest.raises(WindquantError, match=r"layers\.1\.mlp\.down_proj: its input overflows"):
        statistics.forward(model, IDS, 4, int, Path(tempfile.gettempdir()))


def test_a_linear_that_no_token_reaches_is_refused_by_name() -> None:
    model = family("llama")
    model.model.layers[1].mlp.idle = torch.nn.Linear(8, 8)
    with in_float32(), pytest.raises(WindquantError, match=r"layers\.1\.mlp\.idle: .* raise calibration\.samples"):
        statistics.forward(model, IDS, 4, int, Path(tempfile.gettempdir()))


@pytest.mark.parametrize("columns", [1, 3, 7, 32])
def test_covariance_is_the_mean_over_all_batches(columns: int) -> None:
    x = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(0))
    covariance = Covariance({"a": "group"})
    for part in x.split(2):
        covariance.see("a", part, part)
        covariance.see("other", part, part)
    flat = x.view(-1, columns)
    assert list(covariance.means()) == ["group"]
    torch.testing.assert_close(covariance.means()["group"], flat.T @ flat / 15)


def test_step_writes_what_load_reads(tiny_model_folder: Path, tmp_path: Path) -> None:
    calibration = save_calibration(tmp_path / "calibration", token_ids(32, 40))
    path = tmp_path / "made.safetensors"
    notes = run(statistics, path, {"model": tiny_model_folder, "calibration": calibration}, batch=2, fisher_samples=2)
    found = Statistics.load(path)
    assert notes == {"linears": 14, "weights": sum(linear.weights for linear in found.linears), "dead_inputs": 0}
    again = tmp_path / "again.safetensors"
    found.save(again)
    assert again.read_bytes() == path.read_bytes()
    second = tmp_path / "second.safetensors"
    run(statistics, second, {"model": tiny_model_folder, "calibration": calibration}, batch=2, fisher_samples=2)
    assert second.read_bytes() == path.read_bytes()


def test_fisher_samples_leaves_the_energies_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    inputs = {"model": tiny_model_folder, "calibration": save_calibration(tmp_path / "calibration", token_ids(32, 40))}
    for samples in (1, 6):
        run(statistics, tmp_path / f"{samples}", inputs, fisher_samples=samples)
    few, all_of_them = (Statistics.load(tmp_path / name) for name in ("1", "6"))
    assert all(torch.equal(value, few.energy[name]) for name, value in all_of_them.energy.items())
    assert not any(torch.equal(value, few.fisher[name]) for name, value in all_of_them.fisher.items())


def test_samples_are_the_first_of_the_calibration_set(tiny_model_folder: Path, tmp_path: Path) -> None:
    ids = token_ids(32, 40)
    inputs = {"model": tiny_model_folder, "calibration": save_calibration(tmp_path / "calibration", ids)}
    run(statistics, tmp_path / "made", inputs, samples=3)
    with in_float32():
        expected = collected(models.load(tiny_model_folder), ids[:3], 16)
    found = Statistics.load(tmp_path / "made")
    for name, value in expected.energy.items():
        torch.testing.assert_close(found.energy[name], value, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("damage", ["truncated", "other", "metadata", "missing"])
def test_damaged_statistics_are_refused_by_name(tiny_model_folder: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "statistics.safetensors"
    if damage == "truncated":
        content = prepare(tmp_path / "whole", tiny_model_folder).statistics.read_bytes()
        path.write_bytes(content[:-10])
    elif damage == "other":
        save_file({"weight": torch.zeros(2)}, path, {"linears": json.dumps([])})
    elif damage == "metadata":
        save_file({"energy:a": torch.zeros(2)}, path)
    with pytest.raises(WindquantError, match=f"{path.name}.*delete it and run again"):
        Statistics.load(path)


def test_errors_where_every_input_is_zero_cost_nothing() -> None:
    model = family("llama")
    model.model.layers[0].mlp.gate_proj.weight.zero_()  # silu(0) x up = 0 is all that down_proj reads
    found = statistics_of(model, IDS)
    name = "model.layers.0.mlp.down_proj"
    assert not found.energy[name].any()
    assert not found.conditional[name].any()
    others = [value for group, value in found.conditional.items() if group != name]
    assert all((value > 0).all() for value in others)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 40}, r"a linear model\.layers\.0\.self_attn\.q_proj of 48 x 48, .* does not"),
        ({"num_hidden_layers": 3}, r"they end with layer 1, .* has more"),
        ({"num_hidden_layers": 1}, r"a linear model\.layers\.1\.self_attn\.q_proj of 48 x 48, .* does not"),
        ({"vocab_size": 400}, ""),
    ],
)
def test_statistics_of_another_model_are_noticed(
    tiny_model_folder: Path, tmp_path: Path, other: dict[str, int], message: str
) -> None:
    config = LlamaConfig.from_pretrained(tiny_model_folder)
    config.update(other)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    found = Statistics(quantizable(models.load(tiny_model_folder)), {}, {}, {})
    found.check(streaming.open_source(tiny_model_folder))
    with pytest.raises(WindquantError, match=message) if message else nullcontext():
        found.check(streaming.open_source(tmp_path / "other"))
