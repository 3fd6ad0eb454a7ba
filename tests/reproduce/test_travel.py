"""Results on their way into data/ and out of it."""

from pathlib import Path

import pytest

from windquant import exclusive, integrity, manifest
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.reproduce import originals, records
from windquant.reproduce.travel import MODELS, TRAVELLING_MODELS, TRAVELLING_RECORDS, copy_changed, named


def make(path: Path, text: str, seconds: float = 1.0, source: Path | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    output = {"path": str(path), "sha256": manifest.sha256(path)}
    inputs = {} if source is None else {"model": {"path": str(source), "sha256": "0"}}
    Manifest("result", {}, 0, inputs, output, seconds, {}, {}, None, None, None).save(path)


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


def test_a_clone_without_the_models_passes_their_manifests_on(tmp_path: Path) -> None:
    """As after `pull --no-models`: what others need to get and check the models stays, what nothing needs goes."""
    for name in ("used", "unused", "here"):
        make(tmp_path / MODELS / name, name)
    make(tmp_path / "data/plans/p.json", "{}", source=MODELS / "used")
    assert originals.save(tmp_path, []) == {}
    every = {str(MODELS / name): {"code": name} for name in ("used", "used.manifest.json", "unused", "here")}
    records.save(tmp_path / TRAVELLING_RECORDS, every)
    for name in ("used", "unused"):
        (tmp_path / MODELS / f"{name}.manifest.json").unlink()
        (tmp_path / MODELS / name).unlink()
    kept = originals.save(tmp_path, ["data/plans/p.json", "data/plans/none.json"])
    assert kept == {name: every[name] for name in (str(MODELS / "used"), str(MODELS / "used.manifest.json"))}
    found = sorted(path.name for path in (tmp_path / TRAVELLING_MODELS).iterdir())
    assert found == ["here.manifest.json", "used.manifest.json"]
    (tmp_path / TRAVELLING_RECORDS).unlink()
    assert originals.save(tmp_path, ["data/plans/p.json"]) == {}


def test_a_path_as_rules_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (
        "results/r.json",
        "results/r.json.manifest.json",
        tmp_path / "results/r.json",
        "data/../results/r.json",
    ):
        assert named(Path(given)) == Path("results/r.json")
    with pytest.raises(WindquantError, match="call this in the project's folder"):
        named(tmp_path.parent / "r.json")
