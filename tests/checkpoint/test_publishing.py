"""What goes to the Hub: the checkpoint as it is, with a card that says how good it is and how it was made."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.checkpoint.making import Made
from windquant import manifest
from windquant.__main__ import main
from windquant.checkpoint import card, publishing
from windquant.result_file import ARTIFACTS, LEARNED, STEPS


def result_of(made: Made, folder: Path, **changes: Any) -> Path:
    path = folder / "result.json"
    steps = [step for step, artifact in STEPS.items() if artifact not in LEARNED]
    found = {
        "model": made.plan.model,
        "target_bits": 16.0,
        "effective_bits": made.measured.effective_bits,
        "checkpoint_bits": made.measured.checkpoint_bits,
        "allocator": made.plan.allocator,
        "perplexity": {"wikipedia": {"original": 19.0, "before_recovery": 41.0, "quantized": 31.69}},
        "zero_shot": {"cloze": {"original": 0.567, "quantized": 0.48, "stderr": 0.04, "samples": 150}},
        "zero_shot_average": {"original": 0.567, "quantized": 0.48},
        "actions": {"trellis-2": 1.0},
        "protected_fraction": 0.0,
        "fallback": False,
        "seed": 0,
        "seconds": dict.fromkeys(steps, 1.0),
        "peak_memory_bytes": {step: {"host": 1, "gpu": 0} for step in steps},
        "versions": {"python": "3.11"},
        "git_commit": None,
        "config_sha256": "0" * 64,
        "data": dict.fromkeys(ARTIFACTS, "0" * 64) | {"quantized": manifest.sha256(made.folder)},
        "mlflow_run_id": None,
    }
    path.write_text(json.dumps(found | changes))
    return path


def test_the_folder_for_the_hub(whole: Made, tmp_path: Path) -> None:
    target = tmp_path / "hub"
    result = result_of(whole, tmp_path)
    assert main(["publish", str(whole.folder), "user/name", "--result", str(result), "--folder", str(target)]) == 0
    text = (target / "README.md").read_text()
    for words in (
        f"effective bits (all stored tensors of the quantized linears) | {whole.measured.effective_bits:.4f}",
        "perplexity, wikipedia | 19.00 | 31.69",
        "accuracy, cloze (150 samples) | 0.567 | 0.480",
        "snakemake --cores all results/llama_16.0bits.random.json",
        "trellis-2",
    ):
        assert words in text
    assert "Quality" not in (whole.folder / "README.md").read_text(), "the checkpoint itself stays as it is"
    for name in ("model.safetensors", "plan.json", "config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (whole.folder / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(target).num_parameters() > 0


@pytest.mark.parametrize(
    ("name", "allocator", "seed", "file"),
    [
        ("m_2.0bits.ppo-chunk32-1", "ppo", 1, "m_2.0bits.ppo-chunk32-1"),
        ("m_2bits.ppo-chunk32", "ppo", 0, "m_2bits.ppo-chunk32"),
        ("result", "ppo", 0, "m_2.0bits"),
        ("result", "greedy", 0, "m_2.0bits.greedy"),
        ("result", "lagrangian", 1, "m_2.0bits.lagrangian-1"),  # the plan has no seed, its recovery has one
    ],
)
def test_the_command_makes_the_same_checkpoint(whole: Made, name: str, allocator: str, seed: int, file: str) -> None:
    plan = dataclasses.replace(whole.plan, model="m", target_bits=2.0, allocator=allocator, seed=0)
    result = {"perplexity": {}, "zero_shot": {}, "config_sha256": "0" * 64, "seed": seed}
    command = publishing.command(plan, seed, Path(f"{name}.json"))
    text = card.card(plan, whole.layouts, 2.0, 4.0, 100, result, command)
    assert f"snakemake --cores all results/{file}.json\n\nwith seed {seed}" in text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"allocator": "greedy"}, "give its own result"),
        ({"effective_bits": 2.0}, "give its own result"),
        ({"data": dict.fromkeys(ARTIFACTS, "0" * 64)}, "the same plan and other content; give its own result"),
    ],
)
def test_another_result_is_refused(
    whole: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], word: str
) -> None:
    result = result_of(whole, tmp_path, **changes)
    arguments = ["publish", str(whole.folder), "user/name", "--result", str(result), "--folder", str(tmp_path / "hub")]
    assert main(arguments) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_what_is_no_result(whole: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    result = tmp_path / "result.json"
    result.write_text(text)
    assert main(["publish", str(whole.folder), "user/name", "--result", str(result)]) == 2
    assert "result.json" in capsys.readouterr().err


def test_without_the_hub(whole: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(whole, tmp_path)
    assert main(["publish", str(whole.folder), "user/name", "--result", str(result)]) == 2  # the tests are offline
    assert "user/name: the Hub does not take it" in capsys.readouterr().err
