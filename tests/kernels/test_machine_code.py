"""The compiled decoder's machine code: kept once, made again when damaged, and called without numba."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from windquant.kernels import machine_code


def test_a_file_is_made_once(tmp_path: Path) -> None:
    made: list[bytes] = []

    def make() -> bytes:
        made.append(b"code %d" % len(made))
        return made[-1]

    path = tmp_path / "windquant" / "decode.o"
    assert machine_code.kept(path, make) == machine_code.kept(path, make) == b"code 0"
    assert [file.name for file in path.parent.iterdir()] == ["decode.o"]
    whole = path.read_bytes()
    for number, damaged in enumerate([b"", whole[:31], whole[:-1], whole[:-1] + b"?", whole + b"0"], 1):
        path.write_bytes(damaged)
        assert machine_code.kept(path, make) == machine_code.kept(path, make) == b"code %d" % number


def test_where_nothing_can_be_written_it_is_made_every_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "windquant" / "decode.o", None):
        assert machine_code.kept(path, lambda: b"code") == b"code"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_name_tells_sources_versions_and_processors_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = {machine_code.place(16), machine_code.place(32)}
    monkeypatch.setattr(machine_code, "_processor", lambda: "another")
    names.add(machine_code.place(16))
    monkeypatch.setattr(machine_code, "version", lambda package: f"{package} 0")
    names.add(machine_code.place(16))
    other = tmp_path / "compiled.py"
    other.write_text("another")
    monkeypatch.setattr(machine_code, "SOURCES", (other,))
    names.add(machine_code.place(16))
    assert len(names) == 5
    assert all(name is not None and name.parent == tmp_path / "windquant" for name in names)


def test_a_process_that_finds_it_does_without_numba() -> None:
    machine_code.decoder(16)
    script = (
        "import sys; from windquant.kernels import cpu, machine_code; machine_code.decoder(16); "
        "assert 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
