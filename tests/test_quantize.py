"""The quantize step end to end, and layer by layer against what it says it does."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoint.making import save_tokenizer
from tests.families import Prepared, in_float32, inputs_of, prepare, uniform
from windquant import calibration, checkpoint, models, quantize, step
from windquant.errors import WindquantError
from windquant.feedback import column_order, quantize_linear
from windquant.manifest import Manifest
from windquant.packed import dequantize
from windquant.plan import Plan
from windquant.quantize import layouts_of, quantized_linears
from windquant.statistics import Statistics

INPUTS = ("model", "calibration", "statistics", "plan")


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("quantize"), tiny_model_folder, treatment="mixed")


def mixed(prepared: Prepared) -> Plan:
    """Two bits by both treatments, and a skipped unit."""
    plan = uniform(prepared, "scalar-2")
    actions = {name: ["trellis-2", "scalar-2", "skip"][: len(row)] for name, row in plan.actions.items()}
    layouts = layouts_of(dataclasses.replace(plan, actions=actions), Statistics.load(prepared.statistics).linears)
    size = sum(layout.bytes() for layout in layouts.values())
    return dataclasses.replace(plan, actions=actions, bytes=size, effective_bits=8 * size / plan.weights)


def quantized(prepared: Prepared, plan: Plan, output: Path, *flags: str) -> Path:
    """Run the step as its command line does, in this process."""
    path = output.with_name(f"{output.name}.plan.json")
    plan.save(path)
    inputs = prepared.arguments("model", "calibration", "statistics", plan=path)
    step.main("quantize", quantize.run, quantize.Settings, INPUTS, argv=[*inputs, "--output", str(output), *flags])
    return output


@pytest.fixture(scope="module")
def made(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(prepared, mixed(prepared), tmp_path_factory.mktemp("made") / "packed")


def logits(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = models.load(folder)(input_ids=ids).logits
    return found


def test_the_checkpoint_takes_what_the_plan_predicted(prepared: Prepared, made: Path) -> None:
    plan = mixed(prepared)
    measured = checkpoint.measure(made)
    assert (measured.measured_bytes, measured.weights) == (plan.bytes, plan.weights)
    notes = Manifest.load(made).notes
    assert notes == {
        "effective_bits": plan.effective_bits,
        "checkpoint_bits": measured.checkpoint_bits,
        "measured_bytes": plan.bytes,
    }
    assert checkpoint.read(made).plan == plan


def test_the_checkpoint_is_the_quantized_model(prepared: Prepared, made: Path) -> None:
    """It loads; its linears hold what the stored tensors stand for, all else is the original's."""
    packed = checkpoint.read(made)
    original, loaded = models.load(prepared.model), models.load(made)
    for name, layout in packed.layouts.items():
        weight = loaded.get_submodule(name).weight
        torch.testing.assert_close(weight, dequantize(layout, packed.tensors[name], packed.order(name)))
        assert not torch.equal(weight, original.get_submodule(name).weight)
    for name, parameter in original.named_parameters():
        if name.removesuffix(".weight") not in packed.layouts:
            assert torch.equal(loaded.get_parameter(name), parameter), name


def test_same_seed_same_bytes(prepared: Prepared, made: Path, tmp_path: Path) -> None:
    again = quantized(prepared, mixed(prepared), tmp_path / "packed")
    files = sorted(path.name for path in made.iterdir())
    assert sorted(path.name for path in again.iterdir()) == files
    assert {"model.safetensors", "config.json", "plan.json", "README.md", "tokenizer.json"} <= set(files)
    for name in files:
        assert (again / name).read_bytes() == (made / name).read_bytes(), name
    assert Manifest.load(again).output["sha256"] == Manifest.load(made).output["sha256"]


def test_dearer_plans_are_closer_to_the_original(prepared: Prepared, tmp_path: Path) -> None:
    ids = calibration.load(prepared.calibration).reward.long()
    expected = logits(prepared.model, ids)
    errors = [
        (logits(quantized(prepared, uniform(prepared, name), tmp_path / name), ids) - expected).square().mean().item()
        for name in ("scalar-2", "scalar-4", "scalar-8", "skip")
    ]
    assert errors[0] > 2 * errors[1] > 20 * errors[2] > 20 * errors[3] > 0, "the protected columns stay in 8 bits"


def test_skipping_everything_changes_no_weight(prepared: Prepared) -> None:
    statistics = Statistics.load(prepared.statistics)
    ids = calibration.load(prepared.calibration).calibration.long()
    plan = uniform(prepared, "skip")
    plan = dataclasses.replace(plan, units=dataclasses.replace(plan.units, protected=0.0))
    model, original = models.load(prepared.model), models.load(prepared.model)
    dict(quantized_linears(model, layouts_of(plan, statistics.linears), "saliency", statistics, [ids], 8))
    for name, parameter in original.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_each_layer_is_quantized_on_the_quantized_layers_before_it(prepared: Prepared) -> None:
    statistics = Statistics.load(prepared.statistics)
    ids = calibration.load(prepared.calibration).calibration.long()
    layouts = layouts_of(uniform(prepared, "scalar-3"), statistics.linears)
    model = models.load(prepared.model)
    with in_float32():
        tensors = dict(quantized_linears(model, layouts, "saliency", statistics, [ids], 8))

    prefix = models.load(prepared.model)  # its first layer quantized, the second original
    for linear in statistics.linears:
        if linear.layer == 0:
            prefix.get_parameter(f"{linear.name}.weight").copy_(model.get_parameter(f"{linear.name}.weight"))
    agreement = {}
    for name, other in (("quantized", prefix), ("original", models.load(prepared.model))):
        with inputs_of(other, statistics.linears) as inputs, torch.no_grad():
            other(ids)
        for linear in statistics.linears:
            if linear.layer != 1:
                continue
            x, layout = inputs[linear.name], layouts[linear.name]
            found, _ = quantize_linear(
                other.get_parameter(f"{linear.name}.weight"),
                column_order(statistics.energy[linear.group], "saliency", 32, layout.protected),
                x.T @ x / len(x),
                layout,
                statistics.fisher[linear.name],
            )
            agreement[name, linear.kind] = (found["codes"] == tensors[linear.name]["codes"]).float().mean().item()
    for linear in statistics.linears:
        assert agreement["quantized", linear.kind] > 0.99
        assert agreement["original", linear.kind] < 0.95


def test_the_batch_does_not_matter(prepared: Prepared) -> None:
    statistics = Statistics.load(prepared.statistics)
    ids = calibration.load(prepared.calibration).calibration.long()
    layouts = layouts_of(uniform(prepared, "scalar-4"), statistics.linears)
    with in_float32():
        one, two = (
            dict(quantized_linears(models.load(prepared.model), layouts, "saliency", statistics, [ids], batch))
            for batch in (3, 8)
        )
    for name, tensors in one.items():
        assert (tensors["codes"] == two[name]["codes"]).float().mean() > 0.99


def test_covariances_are_those_of_all_texts(prepared: Prepared, made: Path, tmp_path: Path) -> None:
    """Texts may have any length; calibration's and recovery's are asked for by their windows."""
    statistics, texts = Statistics.load(prepared.statistics), calibration.load(prepared.calibration)
    one, other = texts.calibration.long(), texts.recovery.long()
    layouts = layouts_of(uniform(prepared, "scalar-4"), statistics.linears)
    with in_float32():
        whole, parted, alone, longer = (
            dict(quantized_linears(models.load(prepared.model), layouts, "saliency", statistics, given, 8))
            for given in ([one], [one[:5], one[5:]], [one[:5]], [one[:5], other[:4], other[:0]])
        )
    same, less, more = (
        torch.stack([(tensors["codes"] == found[name]["codes"]).float().mean() for name, tensors in whole.items()])
        for found in (parted, alone, longer)
    )
    assert same.min() > 0.95 > less.max()
    assert more.max() < 0.95

    asked = ("--calibration-windows", "5", "--recovery-windows", "4")
    packed = checkpoint.read(quantized(prepared, mixed(prepared), tmp_path / "more", *asked))
    given = [one[:5], other[:4]]
    expected = dict(quantized_linears(models.load(prepared.model), packed.layouts, "saliency", statistics, given, 16))
    before = checkpoint.read(made)
    for name, tensors in expected.items():
        assert torch.equal(packed.tensors[name]["codes"], tensors["codes"])
    assert any(not torch.equal(packed.tensors[name]["codes"], before.tensors[name]["codes"]) for name in expected)


def test_a_smaller_batch_begins_with_the_original_again(
    prepared: Prepared, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the weights lie in memory, those that were quantized before a GPU was full have been replaced."""
    monkeypatch.setattr(quantize.streaming, "load", models.load)
    calls: list[int] = []

    def full_once(*arguments: Any, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
        return quantize_linear(*arguments, **options)

    monkeypatch.setattr(quantize, "quantize_linear", full_once)
    again = quantized(prepared, mixed(prepared), tmp_path / "again", "--batch", "16")
    first, second = (load_file(folder / "model.safetensors") for folder in (made, again))
    assert len(calls) > 14, "it began anew"
    for name in first:
        if name.endswith(".codes"):  # another batch rounds otherwise; quantized twice, nearly all codes would differ
            assert (first[name] == second[name]).float().mean() > 0.99, name


def test_natural_order_is_kept(prepared: Prepared) -> None:
    statistics = Statistics.load(prepared.statistics)
    ids = calibration.load(prepared.calibration).calibration.long()
    plan = uniform(prepared, "scalar-2")
    plan = dataclasses.replace(plan, units=dataclasses.replace(plan.units, order="natural", protected=0.0))
    layouts = layouts_of(plan, statistics.linears)
    model = models.load(prepared.model)
    tensors = dict(quantized_linears(model, layouts, "natural", statistics, [ids], 8))
    for name, layout in layouts.items():
        decoded = dequantize(layout, tensors[name], torch.arange(layout.linear.columns))
        torch.testing.assert_close(decoded, model.get_parameter(f"{name}.weight"), rtol=1e-5, atol=1e-6)


# -- what is refused


def test_a_plan_for_other_linears_is_refused(prepared: Prepared) -> None:
    linears = Statistics.load(prepared.statistics).linears
    plan = uniform(prepared, "scalar-2")
    with pytest.raises(WindquantError, match="names other linears than the statistics"):
        layouts_of(plan, linears[:-1])
    renamed = {f"{name}x": row for name, row in plan.actions.items()}
    with pytest.raises(WindquantError, match="names other linears than the statistics"):
        layouts_of(dataclasses.replace(plan, actions=renamed), linears)


def test_a_plan_with_an_unknown_action_is_refused(prepared: Prepared) -> None:
    plan = uniform(prepared, "scalar-2")
    actions = {name: ["scalar-7", *row[1:]] for name, row in plan.actions.items()}
    layouts = layouts_of(dataclasses.replace(plan, actions=actions), Statistics.load(prepared.statistics).linears)
    with pytest.raises(WindquantError, match="action 'scalar-7': unknown"):
        layouts[next(iter(layouts))].bytes()


def refused(prepared: Prepared, plan: Plan, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one error line of the step that must fail and leave nothing behind."""
    with pytest.raises(SystemExit) as stop:
        quantized(prepared, plan, output)
    assert stop.value.code == 2
    assert not output.exists()
    assert not list(output.parent.glob("*.partial-*"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_a_plan_for_other_chunks_is_refused(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = uniform(prepared, "scalar-2")
    plan = dataclasses.replace(plan, units=dataclasses.replace(plan.units, chunk=16))
    assert "the plan has 2 chunks for model.layers.0.self_attn.q_proj, which has 3" in refused(
        prepared, plan, tmp_path / "packed", capsys
    )


def test_weights_with_nan_are_refused(prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(prepared.model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    damaged = dataclasses.replace(prepared, model=folder)
    line = refused(damaged, uniform(prepared, "scalar-2"), tmp_path / "packed", capsys)
    assert "model.layers.1.mlp.down_proj.weight holds 1 NaN or Inf" in line


def test_a_plan_that_was_changed_by_hand_is_refused_before_any_work(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "quantized_linears", None)
    plan = uniform(prepared, "scalar-2")
    first, *others = plan.actions
    changed = {first: ["scalar-3", *plan.actions[first][1:]], **{name: plan.actions[name] for name in others}}
    line = refused(prepared, dataclasses.replace(plan, actions=changed), tmp_path / "packed", capsys)
    assert f"bytes, it says {plan.bytes}: it was changed by hand" in line


def test_a_model_with_more_layers_is_refused(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deeper = LlamaConfig.from_pretrained(prepared.model, num_hidden_layers=3)
    LlamaForCausalLM(deeper).save_pretrained(tmp_path / "deeper")
    save_tokenizer(tmp_path / "deeper")
    other = dataclasses.replace(prepared, model=tmp_path / "deeper")
    line = refused(other, uniform(prepared, "scalar-2"), tmp_path / "packed", capsys)
    assert "--statistics: they end with layer 1" in line


def test_the_plan_travels_with_the_checkpoint(made: Path, prepared: Prepared) -> None:
    found = json.loads((made / "plan.json").read_text())
    assert found["actions"] == mixed(prepared).actions
