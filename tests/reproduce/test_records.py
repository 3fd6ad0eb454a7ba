"""Snakemake's records: where it keeps them, and what of them travels."""

import json
from pathlib import Path

import pytest

from windquant.errors import WindquantError
from windquant.reproduce import records


@pytest.mark.parametrize("name", ["data/bank/x.safetensors", f"data/plans/{'x' * 300}.json", "données/ü.json"])
def test_names_are_those_of_snakemake(tmp_path: Path, name: str) -> None:
    from snakemake.persistence.file import FilePersistence

    persistence = FilePersistence.__new__(FilePersistence)
    persistence._max_len = records.NAME_LENGTH
    assert str(tmp_path / records.record_path(name)) == persistence._record_path(str(tmp_path), name)


def test_only_finished_artifacts_that_exist(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    records.write(tmp_path, {name: {"rule": name, "endtime": 1e9} for name in ("a", "b", "c", "gone")})
    (tmp_path / records.INCOMPLETE / records.record_path("b")).touch()
    (tmp_path / records.METADATA / records.record_path("c")).write_text("{")
    assert records.read(tmp_path) == {"a": {"rule": "a", "endtime": 1e9}}


def test_artifacts_get_the_age_they_had(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / records.INCOMPLETE).mkdir(parents=True)
    mark = tmp_path / records.INCOMPLETE / records.record_path("a")
    mark.touch()
    records.write(tmp_path, {"a": {"endtime": 1234567890.25}})
    assert (tmp_path / "a").stat().st_mtime == 1234567890.25
    assert not mark.exists(), "a job that was killed before the pull is done now"


def test_travelling_file(tmp_path: Path) -> None:
    path = tmp_path / "snakemake.json"
    records.save(path, {"a": {"rule": "x"}})
    assert records.load(path) == {"a": {"rule": "x"}} == json.loads(path.read_text())
    path.write_text("{")
    with pytest.raises(WindquantError, match="no readable records of Snakemake"):
        records.load(path)
