"""The original as recovery's aim, and divergences slice by slice, against direct computations."""

from pathlib import Path

import pytest
import torch

from tests.families import family, in_float32, own_text
from windquant import presets
from windquant.decoder import decoder_layers, embed, run_layer
from windquant.divergence import divergence, kl_divergence
from windquant.original import Original


@pytest.mark.parametrize("size", [1, 5, 21, 128])
def test_gradients_in_slices_are_those_of_the_whole(
    size: int, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "DIVERGENCE_LOGITS", size * 320)
    teacher, student = family("llama"), family("llama", 1)
    teacher.save_pretrained(tmp_path / "teacher")
    windows = own_text(teacher, 5, 21)
    norm = student.model.norm.weight.requires_grad_(True)
    with in_float32():
        original = Original(tmp_path / "teacher", windows[:2], windows[2:], 2, tmp_path)
        assert list(original.walk()) == list(range(original.depth))
        hidden, calls = embed(student, windows[1:2])
        for layer, call in zip(decoder_layers(student)[1], calls, strict=True):
            hidden = run_layer(layer, hidden, call)
        loss, gradient = original.gradient(student, 1, hidden.detach())
        found = norm.grad
        norm.grad = None
        end = hidden.detach().requires_grad_(True)
        with torch.no_grad():
            target = teacher(windows[1:2]).logits
        expected = kl_divergence(student.lm_head(student.model.norm(end)), target)
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in ((gradient, end.grad), (found, norm.grad)):
        assert mine is not None
        assert theirs is not None
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("size", [4, 21, 128])
def test_divergence_of_held_out_windows(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "DIVERGENCE_LOGITS", size * 320)
    teacher, student = family("llama"), family("llama", 1)
    teacher.save_pretrained(tmp_path / "teacher")
    windows = own_text(teacher, 5, 21)
    with in_float32(), torch.no_grad():
        expected = kl_divergence(student(windows).logits, teacher(windows).logits).item()
        assert divergence(student, teacher, windows) == pytest.approx(expected, rel=1e-5)
        original = Original(tmp_path / "teacher", windows[:1], windows, 2, tmp_path)
        for _ in original.walk():
            pass
        flow = original.flow(student)
        for index, layer in enumerate(decoder_layers(student)[1]):
            flow.through(layer, index)
        assert original.divergence(student, flow) == pytest.approx(expected, rel=1e-5)
