"""Limits of the control groups around a process: as both versions state them, and as the kernel sets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from windquant import control_groups

ONE = Path("/sys/fs/cgroup/cpu")  # where version 1 is mounted


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process in the groups /job/step on a machine with 64 processors."""
    monkeypatch.setattr(control_groups, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(control_groups, "OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return tmp_path


def write(path: Path, **texts: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (path / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("around", "own", "cores"),
    [
        ("max 100000", "max 100000", 64),
        ("max 100000", "200000 100000", 2),
        ("300000 100000", "max 100000", 3),
        ("300000 100000", "1600000 100000", 3),
        ("max 100000", "150000 100000", 2),
        ("max 100000", "5000 100000", 1),
        ("max 100000", "12800000 100000", 64),
        ("", "400000 0", 64),
    ],
)
def test_quotas_of_version_2(machine: Path, around: str, own: str, cores: int) -> None:
    (machine / "own").write_text("0::/job/step\n")
    write(machine / "mount" / "job", cpu__max=around)
    write(machine / "mount" / "job" / "step", cpu__max=own)
    assert control_groups.cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 64), ("250000", 3), ("50000", 1)])
def test_quotas_of_version_1(machine: Path, quota: str, cores: int) -> None:
    (machine / "own").write_text("9:name=systemd:/\n4:cpu,cpuacct:/job\n3:memory:/job\n")
    write(machine / "mount" / "cpu" / "job", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    write(machine / "mount" / "memory" / "job", cpu__cfs_quota_us="100000")
    assert control_groups.cores() == cores
    assert [path.parent.name for path in control_groups.files("memory", "a", "b")] == ["job", "memory"]


def test_without_control_groups_the_affinity_counts(machine: Path) -> None:
    assert control_groups.cores() == 64


@pytest.mark.skipif(not os.access(ONE, os.W_OK), reason="needs root, and control groups of version 1")
def test_a_quota_of_the_kernel_is_seen_by_a_process_under_it() -> None:
    group = ONE / f"windquant-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        program = f"""
import os
from pathlib import Path
Path({str(group / "cgroup.procs")!r}).write_text(str(os.getpid()))
from windquant import control_groups
print(control_groups.cores())
"""
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert ran.stdout == "1\n"
    finally:
        group.rmdir()
