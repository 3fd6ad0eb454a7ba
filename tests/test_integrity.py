"""What a killed Snakemake left unfinished goes, and nothing else. (Damages: tests/workflow/test_faults.py.)"""

from pathlib import Path

import pytest
from snakemake.persistence import MetadataRecord
from snakemake.persistence.file import FilePersistence

from windquant import integrity

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


def mark(snakemake: FilePersistence, outputs: list[str]) -> None:
    for name in outputs:
        snakemake._mark_incomplete(name, None)


def test_unfinished_outputs_and_their_marks_are_removed() -> None:
    snakemake = FilePersistence()
    whole, unfinished = made("data/experiments/a.json"), made("data/experiments/b.json")
    checkpoint = made(f"{LONG}/model.safetensors").parent
    outputs = [str(unfinished), LONG]
    mark(snakemake, outputs)
    integrity.check(set_aside=False)
    assert unfinished.exists(), "who only looks removes nothing"
    integrity.check()
    assert whole.exists()
    assert not unfinished.exists()
    assert not checkpoint.exists()
    assert snakemake._filter_incomplete_keys(outputs) == set()


def test_of_experiments_snakemake_keeps_no_record() -> None:
    snakemake = FilePersistence()
    names = ["data/experiments/a.json", "data/experiments/a.json.manifest.json", "data/plans/a.json"]
    for name in names:
        snakemake._write_record(name, MetadataRecord())
    integrity.check()
    assert [snakemake._read_record(name) is not None for name in names] == [False, False, True]


def test_what_is_not_an_artifact_stays() -> None:
    snakemake = FilePersistence()
    outside, above = made("outside.txt"), made("data/../above.txt")
    outputs = [str(outside), "data/../above.txt", "s3://bucket/data/plan.json"]
    mark(snakemake, outputs)
    foreign = made(".snakemake/incomplete/migration_underway")
    integrity.check()
    assert all(path.exists() for path in (outside, above, foreign))
    assert snakemake._filter_incomplete_keys(outputs) == set(outputs)
