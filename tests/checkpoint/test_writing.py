"""The files are laid out before the tensors come, and are what safetensors and transformers would write."""

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.making import Made
from windquant import checkpoint, models, sources, streaming
from windquant.checkpoint import writing
from windquant.errors import WindquantError
from windquant.header import DTYPES, Entry, lay_out, put, tensors as read


def test_a_laid_out_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {}
    for place, (kind, dtype) in enumerate(DTYPES.items()):
        for name, shape in ((f"b.{kind}", (3, 5)), ("a" * place, ()), (f"ü.{kind}", (0, 4))):
            tensors[name] = torch.arange(15)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    save_file(tensors, tmp_path / "expected", {"format": "pt"})
    places = lay_out(tmp_path / "found", {name: tensor.to("meta") for name, tensor in tensors.items()})
    assert (tmp_path / "found").stat().st_size == (tmp_path / "expected").stat().st_size
    for name in reversed(places):
        put(places[name], tensors[name])
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    for name, tensor in zip(places, read(places.values()), strict=True):
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_tensors_lie_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"?" + torch.arange(4, dtype=torch.float32).numpy().tobytes())
    (found,) = read([Entry(path, (2, 2), torch.float32, 1, 16)])
    assert found.tolist() == [[0, 1], [2, 3]]
    with pytest.raises(WindquantError, match="file: truncated while it was read"):
        read([Entry(path, (2, 2), torch.float32, 4, 16)])


def test_a_tensor_of_another_shape_has_no_place(tmp_path: Path) -> None:
    places = lay_out(tmp_path / "file", {"one": torch.ones(3)})
    with pytest.raises(ValueError, match=r"\[4\] has no place at float32 \[3\]"):
        put(places["one"], torch.ones(4))


def test_the_licence_travels_with_the_checkpoint(whole: Made, tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(whole.source, tmp_path / "theirs"))
    (theirs / "LICENSE").write_text("terms")
    sources.link_folder("models.m.path", theirs, tmp_path / "model")
    packed, others = whole.tensors.items(), streaming.parameters(whole.model, whole.layouts)
    folder = tmp_path / "packed"
    checkpoint.write(folder, whole.model, whole.layouts, packed, others, whole.plan, tmp_path / "model")
    assert (folder / "LICENSE").read_text() == "terms"


def test_linears_come_in_any_order_and_files_are_several(
    whole: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD", "20KB")
    packed, others = reversed(whole.tensors.items()), streaming.parameters(whole.model, whole.layouts)
    found = checkpoint.write(tmp_path, whole.model, whole.layouts, packed, others, whole.plan, whole.source)
    assert found.measured_bytes == whole.measured.measured_bytes
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(value.numel() for value in whole.model.parameters())
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, expected = checkpoint.read(tmp_path), checkpoint.read(whole.folder)
    assert again.tensors.keys() == expected.tensors.keys()
    for name, tensors in expected.tensors.items():
        assert all(torch.equal(again.tensors[name][key], value) for key, value in tensors.items())
    assert again.parameters.keys() == expected.parameters.keys()
    assert all(torch.equal(again.parameters[name], value) for name, value in expected.parameters.items())


@pytest.mark.parametrize("part", ["linear", "other"])
def test_what_did_not_come_is_a_callers_bug(whole: Made, tmp_path: Path, part: str) -> None:
    packed, others = list(whole.tensors.items()), list(streaming.parameters(whole.model, whole.layouts))
    del (packed if part == "linear" else others)[-1]
    with pytest.raises(ValueError, match="is missing"):
        checkpoint.write(tmp_path, whole.model, whole.layouts, packed, others, whole.plan, whole.source)


def test_every_file_that_may_hold_a_vocabulary_travels_with_the_checkpoint() -> None:
    for pattern in models.TOKENIZERS:
        name = pattern.replace("*", "name")
        assert any(fnmatch.fnmatch(name, kept) for kept in writing.COMPANIONS), pattern
