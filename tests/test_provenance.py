"""Snakemake's records are put right before it plans. (tests/workflow/test_faults.py does it with Snakemake.)"""

import json
from pathlib import Path

import pytest
from snakemake.persistence.file import FilePersistence

from windquant import integrity, provenance
from windquant.reproduce import records

#: Snakemake cuts the mark of a long name into folders.
LONG = f"data/checkpoints/{'m' * 200}/quantized"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(name: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("made")
    return path


def mark(*outputs: str) -> FilePersistence:
    snakemake = FilePersistence()
    for name in outputs:
        snakemake._mark_incomplete(name, None)
    return snakemake


def record(name: str, start: float, end: float, *inputs: str) -> None:
    path = records.METADATA / records.record_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"code": "text of the rule", "params": ["1"], "input": list(inputs), "starttime": start, "endtime": end}
    path.write_text(json.dumps(content))


def code(name: str) -> str | None:
    found: str | None = json.loads((records.METADATA / records.record_path(name)).read_text())["code"]
    return found


def test_unfinished_outputs_and_their_marks_are_removed() -> None:
    whole, unfinished = made("data/plans/a.json"), made("data/plans/b.json")
    checkpoint = made(f"{LONG}/model.safetensors").parent
    outputs = [str(unfinished), LONG]
    snakemake = mark(*outputs)
    provenance.mend(alone=False)
    assert unfinished.exists(), "who only looks removes nothing"
    provenance.mend(alone=True)
    assert whole.exists()
    assert not unfinished.exists()
    assert not checkpoint.exists()
    assert snakemake._filter_incomplete_keys(outputs) == set()


def test_what_is_not_an_artifact_stays() -> None:
    outside, above, top = made("outside.txt"), made("data/../above.txt"), made("data/plans/a.json")
    outputs = [str(outside), "data/../above.txt", "s3://bucket/data/plan.json", "data"]
    snakemake = mark(*outputs)
    foreign = made(".snakemake/incomplete/migration_underway")
    provenance.mend(alone=True)
    assert all(path.exists() for path in (outside, above, top, foreign))
    assert snakemake._filter_incomplete_keys(outputs) == set(outputs)


def test_a_failed_attempt_is_no_current_output() -> None:
    """Removed by a failed attempt after what was made from it: distrusted. Removed on purpose: not."""
    made("results/a.json")
    record("data/plans/failed.json", 20, 21, "data/bank/b.safetensors")
    record("data/plans/removed.json", 5, 6)
    record("results/a.json", 10, 11, "data/plans/failed.json", "data/plans/removed.json", "data/plans/there.json")
    made("data/plans/there.json")
    record("data/plans/there.json", 20, 21)
    record("data/plans/unused.json", 20, 21)
    made(".snakemake/metadata/aGFsZg==")  # of a killed process
    provenance.mend(alone=False)
    assert code("data/plans/failed.json") == ""
    for name in ("data/plans/removed.json", "results/a.json", "data/plans/there.json", "data/plans/unused.json"):
        assert code(name) == "text of the rule"


def test_a_folder_that_leads_to_another_disk_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    for name in ("disk/plan.json", "disk/plan.json.manifest.json"):
        made(name)
    Path("data").mkdir()
    Path("data/plans").symlink_to(disk)
    assert [str(path) for path in integrity.artifacts()] == ["data/plans/plan.json"]


def test_a_model_on_a_disk_that_is_away_stays(capsys: pytest.CaptureFixture[str]) -> None:
    made("resources/models/m/config.json")
    Path("resources/models/m/model.safetensors").symlink_to("/nowhere/model.safetensors")
    made("resources/models/m.manifest.json")
    assert integrity.check() == []
    assert Path("resources/models/m").exists()
    assert "leads to /nowhere/model.safetensors, which is not there" in capsys.readouterr().err
