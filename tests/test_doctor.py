"""The doctor: it says what is there, and never waits for a network."""

import time
from pathlib import Path

import pytest

from windquant import doctor
from windquant.doctor import BAD, GOOD, WARNING


def test_this_machine_can_run_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--offline"])
    lines = capsys.readouterr().out.splitlines()
    said = {line[8:22].strip(): line for line in lines}
    assert {"python", "packages", "processor", "memory", "disk", "device", "Hub", "smollm2-135m", "llama3-8b"} <= set(
        said
    )
    assert said["python"].startswith(GOOD)
    assert "billion parameters" in said["smollm2-135m"]


def test_a_hub_that_does_not_answer_costs_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    found = doctor.hub()
    assert time.monotonic() - start < doctor.HUB_SECONDS + 1
    assert found.status == WARNING
    assert "does not answer" in found.said


def test_packages_are_compared_with_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# made\nnumpy==0.1\nno-such-package==1.0\n")
    found = {finding.status: finding.said for finding in doctor.packages(lock)}
    assert "no-such-package" in found[BAD]
    assert "(lock: 0.1)" in found[WARNING]
    assert next(iter(doctor.packages(tmp_path / "none"))).status == WARNING


def test_what_fits_depends_on_memory_disk_and_hub(tiny_model_folder: Path) -> None:
    def statuses(room: float, disk: float, reachable: bool) -> dict[str, doctor.Finding]:
        return {finding.what: finding for finding in doctor.fitting(room, disk, reachable, slow=True)}

    large = statuses(200e9, 200e9, True)
    assert all(finding.status == GOOD for finding in large.values())
    assert "hours without a GPU" in large["llama3-8b"].said
    assert "the Hub" in statuses(200e9, 200e9, False)["llama3-8b"].said
    small = statuses(8e9, 1e9, True)
    assert "GB of memory and" in small["llama3-8b"].said
    assert small["smollm2-135m"].said.endswith("lacks 2 GB of disk")
    assert doctor.parameters(tiny_model_folder) == 0.0  # 68,000
    assert doctor.parameters(tiny_model_folder / "none") is None
