"""The doctor: it says what is there, and never waits for a network."""

import time
from pathlib import Path

import pytest

from windquant import doctor, estimate
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


def test_doctor_and_estimate_tell_the_same_time(capsys: pytest.CaptureFixture[str]) -> None:
    estimate.main(["smollm2-135m"])
    total = capsys.readouterr().out.splitlines()[-1].split()[-5]
    minutes, seconds = map(int, total.split(":"))
    found = {finding.what: finding.said for finding in doctor.fitting(1e12, 1e12, True, on_gpu=False)}
    assert found["smollm2-135m"].endswith(f", {minutes + seconds / 60:.0f} minutes")


def test_what_fits_depends_on_memory_disk_and_hub() -> None:
    def found(room: float, disk: float, reachable: bool) -> dict[str, doctor.Finding]:
        return {finding.what: finding for finding in doctor.fitting(room, disk, reachable, on_gpu=False)}

    assert all(finding.status == GOOD for finding in found(1e12, 1e12, True).values())
    assert found(1e12, 1e12, False)["llama3-8b"].said.endswith("lacks the Hub, or a local copy")
    assert found(1e12, 1e12, False)["smollm2-135m"].status == GOOD
    assert found(8e9, 1e8, True)["llama3-8b"].said.endswith("lacks memory and disk")


def test_the_shapes_of_the_ready_models_give_their_known_sizes() -> None:
    billions = {name: round(shape.parameters / 1e9, 2) for name, shape in doctor.SHAPES.items()}
    assert billions == {
        "llama2-7b": 6.74,
        "llama3-8b": 8.03,
        "llama3.2-1b": 1.24,
        "llama3.2-3b": 3.21,
        "qwen3-0.6b": 0.6,
        "mistral-7b": 7.25,
        "gemma3-270m": 0.27,
    }
    assert [doctor.said_time(seconds) for seconds in (600, 7200)] == ["10 minutes", "2.0 hours"]
