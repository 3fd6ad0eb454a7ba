"""The user's files: which ones count, and digests that follow their content, whatever their age."""

import os
from pathlib import Path

import pytest

from windquant import local_files, manifest
from windquant.errors import WindquantError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_an_entry_reads(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "LICENSE.txt", "pytorch_model.bin"):
        (tmp_path / name).touch()
    files = local_files.of_entry("models.a", {"source": "folder", "path": str(tmp_path)}, {"source": "path"})
    assert files == [str(tmp_path / name) for name in ("LICENSE.txt", "config.json", "model.safetensors")]
    assert local_files.of_entry("models.a", {"source": "hub", "path": "ignored"}, {"source": "path"}) == []
    with pytest.raises(WindquantError, match=r"models\.a\.path: 'nowhere' is neither a file nor a folder"):
        local_files.of_entry("models.a", {"source": "folder", "path": "nowhere"}, {"source": "path"})
    for source, path, message in (
        ("file", "", "missing; source: file reads it"),
        ("file", str(tmp_path), "is no file"),
    ):
        with pytest.raises(WindquantError, match=rf"calibration\.path: .*{message}"):
            local_files.of_entry("calibration", {"source": source, "path": path}, {"source": "path"})


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
