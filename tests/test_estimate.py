"""The cost model: exact where it counts, close to what was measured, and refusals before anything runs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tests.checkpoint.making import tiny
from windquant import configuration, cost, estimate, own_model, pace, shape as shapes
from windquant.errors import WindquantError
from windquant.processor import Processor
from windquant.shape import Shape

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = configuration.load(ROOT / "workflow" / "schemas" / "config.schema.yaml")
EMBEDDED = configuration.resolve(configuration.load(ROOT / "config" / "config.yaml"), SCHEMA, "smollm2-135m")
FAST = Processor("authenticamd", frozenset({"avx2", "avx512f", "avx512_bf16"}))
WIDE = Processor("genuineintel", frozenset({"avx2", "avx512f"}))
NARROW = Processor("authenticamd", frozenset({"avx2"}))
#: Seconds of the main job on two cores (docs/results.md, docs/performance.md), with all calibration text: of a Xeon
#: without AMX, all of it quiet, and of an EPYC of the third generation, the steps that were. Not allocation, which
#: quantizes linears that both plans treat alike once since.
MEASURED = {
    WIDE: {
        "statistics": 47, "bank": 6, "search": 103, "quantize": 191, "recovery": 302,
        "perplexity": 31, "zero_shot": 47,
    },
    NARROW: {"statistics": 135, "search": 273, "perplexity": 84},
}  # fmt: skip
LLAMA_70B = {
    "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_weights_and_parameters_are_counted_from_the_configuration(name: str) -> None:
    model = tiny(name)
    shape = Shape.of(json.loads(model.config.to_json_string()), name)
    linears = [value.numel() for key, value in model.named_parameters() if ".layers." in key and "proj.weight" in key]
    assert shape.weights == sum(linears)
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=0.02), "norms and biases aside"


@pytest.mark.parametrize(
    ("name", "intermediate"),
    [
        *((name, 4) for name in ("bloom", "falcon", "gptj", "gpt_bigcode", "mpt")),
        *((name, 2) for name in ("opt", "llama", "xglm")),
    ],
)
def test_every_familys_words_for_the_proportions_are_known(name: str, intermediate: int) -> None:
    words = {"ffn_dim": 80, "intermediate_size": 80} if intermediate == 2 else {}
    config = AutoConfig.for_model(name, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, **words)
    shape = Shape.of(json.loads(config.to_json_string(use_diff=False)), name)
    assert (shape.layers, shape.hidden, shape.intermediate) == (3, 40, 40 * intermediate)


def test_a_configuration_in_the_current_folder_is_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA_70B))
    assert shapes.known({"name": "x", "source": "hub", "id": "a/b"}) is None
    assert shapes.known({"name": "x", "source": "folder", "path": str(tmp_path)}) == Shape.of(LLAMA_70B, "")


def test_where_layers_differ_the_widest_counts(tmp_path: Path) -> None:
    assert Shape.of(LLAMA_70B | {"intermediate_size": [8, 16, 12]}, "").intermediate == 16
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "state_size": 16}))  # no attention
    entry = {"name": "mine", "source": "folder", "path": str(tmp_path)}
    assert shapes.known(entry) is None
    asked = estimate.resources({**EMBEDDED, "model": entry}, "quantize", 2.0, 2, False, 1)
    assert asked == estimate.resources(
        {**EMBEDDED, "model": {"name": "x", "source": "hub"}}, "quantize", 2.0, 2, False, 1
    )


def test_a_70b_model_is_counted_without_its_weights() -> None:
    shape = Shape.of(LLAMA_70B, "config.json")
    with_meta = LlamaConfig(**{**LLAMA_70B, "num_hidden_layers": 1})
    with torch.device("meta"):
        one = AutoModelForCausalLM.from_config(with_meta)
    assert shape.layer == sum(value.numel() for key, value in one.named_parameters() if "proj" in key)
    assert 70e9 < shape.parameters < 71e9
    assert shape.units(256) == 80 * (6 * 32 + 112)


@pytest.mark.parametrize(("found", "step"), [(found, step) for found, steps in MEASURED.items() for step in steps])
def test_the_embedded_models_times_are_near_what_was_measured(found: Processor, step: str) -> None:
    settings = {**EMBEDDED, "quantize": {**EMBEDDED["quantize"], "calibration_windows": 0}}
    need = cost.needs(shapes.EMBEDDED["smollm2-135m"], settings, 2.0, cost.cpu(2, found))[step]
    assert 1 / 1.5 < need.seconds / need.beside / MEASURED[found][step] < 1.5, "an evaluation had all cores"


def test_quantize_takes_as_long_as_its_text() -> None:
    def seconds(windows: int, more: int = 0) -> float:
        settings = {**EMBEDDED, "quantize": {"calibration_windows": windows, "recovery_windows": more}}
        return cost.needs(shapes.EMBEDDED["smollm2-135m"], settings, 2.0, cost.cpu(2, FAST))["quantize"].seconds

    assert EMBEDDED["calibration"]["samples"] == 256
    assert seconds(0) == seconds(256) == seconds(1000) > seconds(128)
    assert seconds(256) - seconds(128) == pytest.approx(seconds(192) - seconds(64))
    assert seconds(64, 32) == pytest.approx(seconds(128)), "windows of twice the length"


def test_evaluations_run_side_by_side_where_their_memory_is_there() -> None:
    machine = cost.cpu(2, FAST)

    def asked(room: float, cores: int = 2) -> cost.Need:
        some = dataclasses.replace(machine, room=room, beside=min(cores, 2))
        return cost.needs(shapes.EMBEDDED["smollm2-135m"], EMBEDDED, 2.0, some)["perplexity"]

    alone, paired = asked(1e12, 1), asked(1e12)
    enough = 2 * cost.asked(paired.memory)
    assert (alone.beside, paired.beside) == (1, 2)
    assert asked(enough) == paired
    assert asked(0.99 * enough) == alone
    assert paired.memory == alone.memory
    assert paired.seconds - machine.start == pytest.approx(2 * (alone.seconds - machine.start))
    assert cost.seconds({"zero_shot": paired}) < cost.seconds({"zero_shot": alone}), "two start at once"


def test_without_fast_bfloat16_steps_take_longer_and_plans_more_memory() -> None:
    with_it, without = (
        cost.needs(shapes.EMBEDDED["smollm2-135m"], EMBEDDED, 2.0, cost.cpu(2, found)) for found in (FAST, WIDE)
    )
    for step in ("statistics", "search", "allocation", "recovery"):
        assert without[step].seconds > 1.3 * with_it[step].seconds, step
    assert without["search"].memory > 1.3 * with_it["search"].memory
    assert without["perplexity"].memory == with_it["perplexity"].memory


def test_a_slower_machine_is_estimated_at_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost.processor, "this", lambda: FAST)
    fitted = cost.cpu(4)
    shape = shapes.EMBEDDED["smollm2-135m"]

    def times(products: float, fast: float) -> dict[str, float]:
        monkeypatch.setattr(pace, "products", lambda: (products, fast))
        return {step: need.seconds for step, need in cost.needs(shape, EMBEDDED, 2.0, cost.this(4)).items()}

    quiet, rounded = times(1e15, 1e15), times(1e15, 1e9)
    half = times(*(rate / 2 / 4 / cost.REACHED for rate in (fitted.products, fitted.fast)))
    never_faster = {step: need.seconds for step, need in cost.needs(shape, EMBEDDED, 2.0, fitted).items()}
    assert quiet == never_faster
    assert half["quantize"] == pytest.approx(2 * quiet["quantize"], rel=0.1)
    assert half["perplexity"] == pytest.approx(2 * quiet["perplexity"], rel=0.1)
    assert rounded["search"] > 10 * quiet["search"], "products that may be BF16 have a pace of their own"
    assert rounded["perplexity"] == quiet["perplexity"]


def test_the_pace_of_a_core_is_measured() -> None:
    threads = torch.get_num_threads()
    first, again = pace.products.__wrapped__(0.05), pace.products.__wrapped__(0.05)
    assert all(1e9 < rate < 1e13 for rate in (*first, *again))
    assert torch.get_num_threads() == threads


def on(room: float) -> cost.Machine:
    """Two cores with so many GiB."""
    return dataclasses.replace(cost.cpu(2, FAST), room=room * 2**30)


def test_the_memory_of_streaming_steps_does_not_grow_with_the_depth() -> None:
    shallow, deep = (Shape(layers, 4096, 14336, 4096, 1024, 128256, False) for layers in (4, 32))
    few, many = (cost.needs(shape, EMBEDDED, 2.0, on(8)) for shape in (shallow, deep))
    for step in ("statistics", "bank", "allocation", "recovery", "perplexity", "perplexity_original"):
        assert many[step].memory == pytest.approx(few[step].memory, rel=0.1), step  # gains, statistics
        assert many[step].seconds > few[step].seconds
    large = cost.needs(deep, EMBEDDED, 2.0, on(1000))
    for step in ("allocation", "recovery", "zero_shot", "zero_shot_original"):
        assert many[step].streamed
        assert not large[step].streamed
        assert large[step].memory > 1.5 * many[step].memory


@pytest.mark.parametrize("room", [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("layers", [12, 30, 64])
@pytest.mark.parametrize("width", [512, 2048, 4096])
def test_what_is_held_as_a_whole_fits(room: int, layers: int, width: int) -> None:
    """Nobody is told that memory is missing where only the choice of the mode was wrong."""
    shape = Shape(layers, width, 4 * width, width, width // 4, 49152, True)
    for step, need in cost.needs(shape, EMBEDDED, 2.0, on(room)).items():
        if step in ("allocation", "recovery", "zero_shot", "zero_shot_original") and not need.streamed:
            assert need.memory < room * 2**30, step


def test_learned_rounding_takes_time_and_the_memory_of_a_layer() -> None:
    asked = {**EMBEDDED, "recovery": {**EMBEDDED["recovery"], "rounding": 100}}
    small, large = shapes.EMBEDDED["smollm2-135m"], Shape.of(LLAMA_70B, "config.json")
    for shape, room in ((small, 16), (large, 64)):
        without, found = (cost.needs(shape, settings, 2.0, on(room))["recovery"] for settings in (EMBEDDED, asked))
        assert found.seconds > 1.5 * without.seconds
        assert without.memory <= found.memory < room * 2**30
        assert found.disk == without.disk


def test_a_70b_model_takes_the_memory_of_its_layers() -> None:
    shape = Shape.of(LLAMA_70B, "config.json")
    found = cost.needs(shape, EMBEDDED, 2.0, on(64))
    assert 4 * shape.parameters > 280e9
    for step in ("statistics", "bank", "allocation", "recovery", "perplexity", "zero_shot"):
        assert found[step].memory < 64 * 2**30, step


def test_jobs_ask_for_more_than_the_estimate_and_for_still_more_when_tried_again() -> None:
    need = cost.needs(shapes.EMBEDDED["smollm2-135m"], EMBEDDED, 2.0, cost.cpu(2))["quantize"]
    first, second = (estimate.resources(EMBEDDED, "quantize", 2.0, 2, False, attempt) for attempt in (1, 2))
    assert first["mem_mb"] * 2**20 > 1.2 * need.memory
    assert first["runtime"] * 60 > 2 * need.seconds
    assert second["mem_mb"] == pytest.approx(2 * first["mem_mb"], abs=1)
    assert second["runtime"] == pytest.approx(2 * first["runtime"], abs=1)


def of_folder(folder: Path) -> dict[str, object]:
    """Settings of a 70B model of which there is the configuration alone."""
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    config = {"models": {"big": {"source": "folder", "path": str(folder)}}}
    return configuration.resolve(config, SCHEMA, "big")


def test_too_little_memory_is_told_with_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = of_folder(tmp_path)
    monkeypatch.setattr(estimate.memory, "total", lambda: 24 * 2**30)
    with pytest.raises(WindquantError, match=r"big at 2 bits: the step \w+ needs about .* GB of memory, this machine"):
        estimate.check_room(resolved, 2.0, "ppo", 2, False)
    monkeypatch.setenv(estimate.FORCE, "1")
    estimate.check_room(resolved, 2.0, "ppo", 2, False)


def test_a_budget_below_the_metadata_is_refused_before_anything_runs(tmp_path: Path) -> None:
    resolved = of_folder(tmp_path)
    estimate.check_lowest(resolved, 1.1)
    guarded = {**resolved, "units": {**resolved["units"], "protected": 0.05}}  # in 8 bits: 0.35 more
    with pytest.raises(WindquantError, match=r"big at 1\.3 bits: .* the lowest possible target is about 1\.4\d; ask"):
        estimate.check_lowest(guarded, 1.3)
    estimate.check_lowest(guarded, 1.5)
    estimate.check_lowest({**guarded, "model": {"name": "unknown", "source": "hub"}}, 1.0)


def test_what_has_been_made_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = of_folder(tmp_path)
    wanted = cost.needs(Shape.of(LLAMA_70B, "config.json"), resolved, 2.0, cost.cpu(2))
    monkeypatch.setattr(estimate.memory, "total", lambda: 2**50)
    free = 1.1 * sum(need.disk for step, need in wanted.items() if step not in ("model", "statistics", "quantize"))
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free})())
    estimate.check_room(resolved, 2.0, "ppo", 2, False, made={"model", "statistics", "quantize"})
    with pytest.raises(WindquantError, match="of disk"):
        estimate.check_room(resolved, 2.0, "ppo", 2, False, made={"model", "statistics"})


def test_too_little_disk_is_told_with_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = of_folder(tmp_path)
    monkeypatch.setattr(estimate.memory, "total", lambda: 2**50)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    with pytest.raises(WindquantError, match=r"the results need about .* GB of disk, 1\.0 GB are free here"):
        estimate.check_room(resolved, 2.0, "ppo", 2, False)


def test_the_embedded_model_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.memory, "total", lambda: 8 * 2**30)
    estimate.check_room(EMBEDDED, 2.0, "ppo", 2, False)


def test_the_command_shows_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    estimate.main([str(tmp_path), "--bits", "2", "--cores", "16"])
    shown = capsys.readouterr().out
    assert "70,554M parameters" in shown
    for step in configuration.STEPS:
        assert f"\n{step} " in shown
    estimate.main([str(tmp_path / "config.json"), "--json", "--gpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["statistics"]["gpu"] > 0
    assert set(found) >= set(configuration.STEPS)


@pytest.mark.parametrize("hidden", [576, 2048])
def test_a_folder_is_estimated_as_it_would_be_quantized(tmp_path: Path, hidden: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, "hidden_size": hidden, "num_attention_heads": 8}))
    _, entry = own_model.describe(str(tmp_path), None)
    shared = configuration.load(estimate.ROOT / "config" / "config.yaml")
    wanted = configuration.resolve({**shared, "models": {tmp_path.name: entry}}, SCHEMA, tmp_path.name)
    assert estimate.find(str(tmp_path))[1] == {**wanted, "model": {**wanted["model"], "path": str(tmp_path)}}
    assert wanted["units"]["chunk"] == {576: 192, 2048: 256}[hidden]


@pytest.mark.parametrize("content", ["{", "{}", '{"hidden_size": 8}'])
def test_a_configuration_of_no_decoder_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WindquantError, match=r"config\.json: "):
        estimate.find(str(tmp_path))
