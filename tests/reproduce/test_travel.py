"""Results on their way into data/ and out of it."""

from pathlib import Path

import pytest

from windquant import exclusive, integrity, manifest
from windquant.manifest import Manifest
from windquant.reproduce.travel import copy_changed


def make(path: Path, text: str, seconds: float) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    output = {"path": str(path), "sha256": manifest.sha256(path)}
    Manifest("result", {}, 0, {}, output, seconds, {}, {}, None, None, None).save(path)


def test_a_newer_copy_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exclusive.LOCK.parent.mkdir()  # a workflow's folder
    source, target = Path("results"), Path("data/results")
    for text, seconds in (("1", 1.0), ("2", 2.0), ("2", 3.0)):
        make(source / "x.json", text, seconds)
        integrity.remember(source / "x.json")
        for rest in ("y.json.partial-1", "z.json.damaged"):
            (source / rest).touch()
        copy_changed(source, target)
        assert (target / "x.json").read_text() == text
        assert Manifest.load(target / "x.json").seconds == seconds
        assert integrity.check() == []
    assert sorted(path.name for path in target.iterdir()) == ["x.json", "x.json.manifest.json"]
