"""The compiled decoder's machine code: kept once, made again when damaged, and called without numba."""

import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.random_weights import layout_of, random_order, random_tensors
from windquant.kernels import cpu, machine_code
from windquant.packed import Format, dequantize
from windquant.quantizers import actions

x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only code for x86-64 is linked without LLVM")


@pytest.fixture(scope="module")
def elf() -> bytes:
    machine_code.decoder(16)
    return machine_code.kept(machine_code.place(16), lambda: machine_code._compile(16))


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


@x86_64
def test_a_process_that_finds_it_does_without_numba(elf: bytes) -> None:
    script = (
        "import sys; from windquant.kernels import cpu, machine_code; machine_code.decoder(16); "
        "assert not {'numba', 'llvmlite'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("refused", ["link", "mprotect"])
def test_llvm_loads_what_cannot_be_linked(
    refused: str, elf: bytes, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    if refused == "link":
        monkeypatch.setattr(machine_code, "link", lambda elf: None)
    else:
        monkeypatch.setattr(machine_code.mmap, "PROT_EXEC", 1 << 30)  # a right that no kernel knows
    before = len(machine_code._loaded)
    machine_code._decoder.cache_clear()
    layout = layout_of(150, 13 * 16 + 9, Format(16, 0.1, 12, torch.float16), list(actions()))
    order = random_order(layout, generator)
    tensors = random_tensors(layout, order, generator)
    found = cpu.decode(layout, tensors, order, torch.float16, 1)
    machine_code._decoder.cache_clear()
    assert torch.equal(found, dequantize(layout, tensors, order).half())
    assert [type(loaded).__name__ for loaded in machine_code._loaded[before:]] == ["ExecutionEngine"]


@x86_64
def test_only_distances_are_linked(elf: bytes) -> None:
    found = machine_code.link(elf)
    assert found is not None
    image, entry = found
    assert 0 <= entry < len(image)
    assert machine_code.link(b"\xcf\xfa\xed\xfe" + elf[4:]) is None, "not ELF"
    assert machine_code.link(elf[:18] + struct.pack("<H", 183) + elf[20:]) is None, "another processor"
    (table,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    for index in range(count):
        _, kind, _, _, start, length, *_ = struct.unpack_from("<IIQQQQIIQQ", elf, table + size * index)
        if kind == machine_code.RELOCATIONS and length:
            other = bytearray(elf)
            struct.pack_into("<I", other, start + 8, 1)  # an address
            assert machine_code.link(bytes(other)) is None
            return
    pytest.fail("the code has no constants")
