"""Digests of the user's files follow their content, whatever their age."""

import os
from pathlib import Path

import pytest

from windquant import local_files, manifest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_older_file_with_other_content_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("model.safetensors", "one"), ("other.safetensors", "two")):
        Path(name).write_text(text)
    os.utime("other.safetensors", (1, 1))
    first = local_files.digest(["model.safetensors"])
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "sha256", lambda path: pytest.fail("read again"))
        assert local_files.digest(["model.safetensors"]) == first
    Path("other.safetensors").rename("model.safetensors")
    second = local_files.digest(["model.safetensors"])
    assert second != first
    Path("model.safetensors").unlink()
    Path("elsewhere").write_text("one")
    Path("model.safetensors").symlink_to("elsewhere")
    assert local_files.digest(["model.safetensors"]) == first
    assert local_files.digest([]) == ""


def test_damaged_memory_is_no_memory() -> None:
    Path("text.txt").write_text("one")
    first = local_files.digest(["text.txt"])
    (path,) = local_files.MEMORY.iterdir()
    for damaged in ("", "[]", '{"stamp": 1}'):
        path.write_text(damaged)
        assert local_files.digest(["text.txt"]) == first
