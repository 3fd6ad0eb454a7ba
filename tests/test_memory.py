"""How much memory a step may count on."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.families import memory_for
from windquant import compute, memory
from windquant.errors import WindquantError

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_limit_of_the_user_counts_where_it_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < memory.total() <= MACHINE
    monkeypatch.setenv(memory.LIMIT, "0.5")
    assert memory.total() == memory.GIB // 2
    monkeypatch.setenv(memory.LIMIT, memory_for(1e6))
    assert memory.fits(0.99e6)
    assert not memory.fits(1.01e6)
    assert memory.fits(1.01e6, 1.1 * float(memory_for(1e6)) * memory.GIB)
    monkeypatch.setenv(memory.LIMIT, "1e9")
    assert memory.total() <= MACHINE
    monkeypatch.setenv(memory.LIMIT, "inf")
    assert memory.total() <= MACHINE
    for wrong in ("16GB", "-1", "0", "nan"):
        monkeypatch.setenv(memory.LIMIT, wrong)
        with pytest.raises(WindquantError, match=f"WINDQUANT_MEMORY={wrong}: not a number of GiB"):
            memory.total()


KEEPING = """
import sys, psutil, numpy as np
from windquant import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
np.ones(1000)
before = psutil.Process().memory_info().rss
np.ones(int(sys.argv[2]) // 8)  # and freed
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.parametrize(("mode", "size", "stays"), [("keep", 30, True), ("keep", 90, False), ("leave", 30, False)])
def test_freed_blocks_are_kept_if_they_are_not_large(mode: str, size: int, stays: bool) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", KEEPING, mode, str(size << 20)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert (int(ran.stdout) > (size << 20) / 2) == stays


def test_the_smallest_limit_of_the_control_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"a": "max", "b": str(2**28), "c": str(2**40), "missing": None}
    for name, text in limits.items():
        if text is not None:
            (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(memory, "_limits", lambda: [tmp_path / name for name in limits])
    assert memory.total() == 2**28


def test_the_groups_around_a_process_are_asked_too() -> None:
    files = memory._limits()
    if Path("/proc/self/cgroup").is_file():
        assert any(file.parent in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")) for file in files)
    assert all(file.name in ("memory.max", "memory.limit_in_bytes") for file in files)


def test_a_gpu_is_taken_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking opens it, and then it is too late to choose one that no other step has."""
    taken: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compute, "device", lambda: taken.append("taken") or torch.device("cuda"))

    def properties(_: torch.device) -> SimpleNamespace:
        assert taken
        return SimpleNamespace(total_memory=123)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert memory.limit() == 123
