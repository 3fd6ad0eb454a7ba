"""Perplexity: the numbers against transformers' own loss, and the step's document."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from windquant import models, step
from windquant.evaluation import perplexity as module
from windquant.evaluation.perplexity import perplexity, spread, token_losses


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(320, (5, 300), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def test_equals_transformers_loss_whatever_the_batch(tiny_model_folder: Path, ids: torch.Tensor) -> None:
    model = models.load(tiny_model_folder)
    expected = model(input_ids=ids.long(), labels=ids.long()).loss.item()
    scores = [perplexity(model, ids, batch) for batch in (1, 2, 5)]
    for score in scores:
        assert score.nll == pytest.approx(expected, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
        assert score.windows == pytest.approx(scores[0].windows, rel=1e-6)
    assert scores[0].tokens == 5 * 299
    assert scores[0].context == 300
    spread_of_windows = torch.tensor(scores[0].windows, dtype=torch.float64).std().item()
    assert scores[0].standard_error == pytest.approx(spread_of_windows / math.sqrt(5))


def test_token_losses_are_those_of_each_next_token(tiny_model_folder: Path, ids: torch.Tensor) -> None:
    model = models.load(tiny_model_folder)
    losses = token_losses(model, ids[:2], batch=2)
    assert losses.shape == (2, 299)
    assert losses.dtype == torch.float64
    logs = model(input_ids=ids[:2].long()).logits.log_softmax(-1)
    for row, position in ((0, 0), (1, 255), (1, 298)):  # 256 logits are widened at a time
        expected = -logs[row, position, int(ids[row, position + 1])].item()
        assert losses[row, position].item() == pytest.approx(expected, abs=1e-5)


def test_a_model_that_knows_nothing_scores_its_vocabulary(tiny_model_folder: Path, ids: torch.Tensor) -> None:
    model = models.load(tiny_model_folder)
    model.lm_head.weight.zero_()
    score = perplexity(model, ids[:1])
    assert score.perplexity == pytest.approx(320, rel=1e-5)
    assert score.standard_error == 0.0


def test_progress_counts_layers(tiny_model_folder: Path, ids: torch.Tensor) -> None:
    seen: list[int] = []
    perplexity(models.load(tiny_model_folder), ids, 2, seen.append)
    assert seen == [1, 1]


def test_spread_is_even_and_never_more_than_there_is() -> None:
    windows = torch.arange(10).view(-1, 1)
    assert spread(windows, 4).flatten().tolist() == [0, 2, 5, 7]
    for count in (0, 10, 99):
        assert spread(windows, count) is windows


@pytest.fixture
def calibration(tmp_path: Path, ids: torch.Tensor) -> Path:
    folder = tmp_path / "calibration"
    folder.mkdir()
    windows = {name: ids[:1].clone() for name in ("calibration", "reward", "recovery")}
    save_file({**windows, "test": ids}, folder / "tokens.safetensors")
    (folder / "info.json").write_text(json.dumps({"test_name": "text"}))
    return folder


def test_step_writes_one_entry_per_text(tiny_model_folder: Path, calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny.perplexity.json"
    argv = ["--checkpoint", str(tiny_model_folder), "--calibration", str(calibration), "--output", str(output)]
    step.main("perplexity", module.run, module.Settings, ("checkpoint", "calibration"), argv=[*argv, "--windows", "3"])
    entry = json.loads(output.read_text())["text"]
    assert entry.keys() == {"perplexity", "nll", "standard_error", "tokens", "context", "windows"}
    assert entry["perplexity"] == pytest.approx(math.exp(entry["nll"]))
    assert (entry["tokens"], entry["context"], len(entry["windows"])) == (3 * 299, 300, 3)


def test_a_loss_that_is_not_finite_is_refused(
    tiny_model_folder: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "overflowing"
    folder.mkdir()
    for path in tiny_model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] *= 1e38  # finite itself; the logits are not
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    output = tmp_path / "x.json"
    argv = ["--checkpoint", str(folder), "--calibration", str(calibration), "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        step.main("perplexity", module.run, module.Settings, ("checkpoint", "calibration"), argv=argv)
    assert stop.value.code == 2
    assert not output.exists()
    assert "not finite" in capsys.readouterr().err
