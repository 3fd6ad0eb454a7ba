"""The frame of a step: command line, atomic output, manifest, errors, signals, cache."""

import calendar
import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from windquant import atomic, dependencies, manifest, result, step
from windquant.errors import WindquantError
from windquant.manifest import Manifest


@dataclass(frozen=True)
class Settings:
    text: str = "hello"  # what to write
    tasks: tuple[str, ...] = ()  # names


def write(task: step.Task, settings: Settings) -> None:
    task.output.write_text(settings.text)
    task.note("length", len(settings.text))


def write_folder(task: step.Task, settings: Settings) -> None:
    (task.output / "b").mkdir(parents=True)
    (task.output / "a.txt").write_text(settings.text)
    (task.output / "b" / "c.txt").write_text("c")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def main(run=write, *argv: str, inputs: tuple[str, ...] = (), light: bool = True) -> None:  # type: ignore[no-untyped-def]
    step.main("demo", run, Settings, inputs, argv=["--output", "data/out", *argv], light=light)


def names(path: Path = Path("data")) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_output_and_manifest() -> None:
    Path("in.txt").write_text("abc")
    main(
        write,
        "--text",
        "hi",
        "--seed",
        "7",
        "--source",
        "in.txt",
        "--more",
        "in.txt",
        inputs=("source", "old?", "more*"),
    )
    assert Path("data/out").read_text() == "hi"
    found = Manifest.load(Path("data/out"))
    digest = hashlib.sha256(b"abc").hexdigest()
    assert (found.step, found.seed, found.settings) == ("demo", 7, {"text": "hi", "tasks": []})
    assert found.inputs == {name: {"path": "in.txt", "sha256": digest} for name in ("source", "more.0")}
    assert found.output == {"path": "data/out", "sha256": hashlib.sha256(b"hi").hexdigest()}
    assert 0 <= found.seconds < 10
    assert found.peak_memory_bytes["host"] > 10 << 20
    assert found.peak_memory_bytes["gpu"] >= 0
    assert found.versions["torch"].startswith("2.")
    assert found.git_commit is None  # tmp_path is no work tree
    assert found.mlflow_run_id is None
    assert found.notes == {"length": 2}
    assert found.config_sha256 == manifest.config_sha256("demo", {"text": "hi", "tasks": []}, 7)
    assert found.command.endswith("--output data/out --text hi --seed 7 --source in.txt --more in.txt")
    assert abs(calendar.timegm(time.strptime(found.started, "%Y-%m-%dT%H:%M:%SZ")) - time.time()) < 60
    assert found.machine["threads"] == "1"  # OMP_NUM_THREADS of the tests
    assert (found.code, found.lock) == ("", "")  # this module is not of the package, and was not called by a rule
    assert set(json.loads(Path("data/out.manifest.json").read_text())) == {
        *("step", "settings", "seed", "inputs", "output", "seconds", "peak_memory_bytes", "versions"),
        *("git_commit", "git_dirty", "mlflow_run_id", "notes"),
        *("config_sha256", "code", "lock", "command", "started", "machine"),
    }
    assert names() == {"out", "out.manifest.json"}


def test_code_and_lock_are_what_the_rule_says() -> None:
    main(write, "--code", "c0de", "--lock", "10c4")
    found = Manifest.load(Path("data/out"))
    assert (found.code, found.lock) == ("c0de", "10c4")


def test_manifest_of_an_earlier_version() -> None:
    main()
    path = Path("data/out.manifest.json")
    document = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in document.items() if name not in ("code", "machine")}))
    assert Manifest.load(Path("data/out")).code == ""


def test_git_state() -> None:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    Path("tracked").write_text("1")
    for command in (["init", "-q"], ["add", "tracked"], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True, env=environment)
    commit, dirty = manifest.git_state()
    assert commit is not None
    assert (len(commit), dirty) == (40, False)
    Path("tracked").write_text("2")
    assert manifest.git_state() == (commit, True)


def test_folder_is_replaced_as_a_whole() -> None:
    main(write_folder)
    Path("data/out/left_over").touch()
    first = Manifest.load(Path("data/out")).output["sha256"]
    main(write_folder)
    assert names(Path("data/out")) == {"a.txt", "b"}
    assert Manifest.load(Path("data/out")).output["sha256"] == first == manifest.sha256(Path("data/out"))
    main(write)  # a file in its place
    assert Path("data/out").is_file()
    main(write_folder)
    assert Path("data/out/b/c.txt").is_file()
    assert names() == {"out", "out.manifest.json"}


def test_digest_of_a_folder_sees_names_and_contents() -> None:
    main(write_folder)
    first = manifest.sha256(Path("data/out"))
    Path("data/out/a.txt").rename("data/out/d.txt")
    second = manifest.sha256(Path("data/out"))
    Path("data/out/d.txt").write_text("changed")
    assert len({first, second, manifest.sha256(Path("data/out"))}) == 3


@pytest.mark.parametrize("error", [RuntimeError("bug"), WindquantError("bad\ninput"), KeyboardInterrupt()])
def test_failure_leaves_what_was_there(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    main(write, "--text", "first")

    def fail(task: step.Task, settings: Settings) -> None:
        task.output.write_text("half")
        raise error

    codes = {RuntimeError: None, WindquantError: 2, KeyboardInterrupt: 130}
    with pytest.raises((SystemExit, RuntimeError)) as caught:
        main(fail)
    assert getattr(caught.value, "code", None) == codes[type(error)]
    assert Path("data/out").read_text() == "first"
    assert Manifest.load(Path("data/out")).notes == {"length": 5}
    assert names() == {"out", "out.manifest.json"}
    if isinstance(error, WindquantError):
        assert capsys.readouterr().err == "error: bad input\n"


def test_no_output_is_a_bug() -> None:
    with pytest.raises(RuntimeError, match="without making data/out"):
        main(lambda task, settings: None)


def test_notes_must_be_json() -> None:
    def run(task: step.Task, settings: Settings) -> None:
        write(task, settings)
        task.note("path", Path())

    with pytest.raises(TypeError):
        main(run)
    assert names() == set()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source", ".", "--wrong", "1"], "error: unrecognized arguments: --wrong 1"),
        (["--seed", "x"], "error: --seed: 'x' is not a whole number"),
        (["--seed", "-1"], "error: --seed: '-1' is not at least 0"),
        (["--seed", "4294967296"], "error: --seed: '4294967296' is not at most 4294967295"),
        ([], "error: the following arguments are required: --source"),
        (["--source", "no/such"], "error: --source no/such: no such file or folder"),
        (["--source", ".", "--experiment", "a_b"], "error: --experiment a_b: give a plan"),
        (["--source", ".", "--output", "."], "error: --output .: not the name of a file or folder to make"),
    ],
)
def test_bad_command_lines(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(write, *argv, inputs=("source",))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(message)
    assert not Path("data/out").exists()


def test_a_folder_that_no_step_has_made_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/out").mkdir(parents=True)
    Path("data/out/thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(write)
    assert capsys.readouterr().err.startswith("error: --output data/out: holds what no step has made")
    assert Path("data/out/thesis.txt").read_text() == "mine"


def test_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run(task: step.Task, settings: Settings) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "data/x")

    with pytest.raises(SystemExit) as caught:
        main(run)
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: data/x: No space left on device; make room and run again: finished steps stay\n"
    )


def test_a_limit_on_file_sizes_hits_every_writer_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    writers: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(bytes(1 << 20)),
        lambda path: save_file({"a": torch.zeros(1 << 18)}, path),
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        for writer in writers:
            with pytest.raises(SystemExit):
                main(lambda task, settings, writer=writer: writer(task.output))
            assert "File too large; lift the limit on file sizes" in capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names() == set()


def test_damaged_input_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(write_folder)
    main(write_folder, "--output", "next", "--source", "data/out", inputs=("source",))
    Path("data/out/a.txt").write_text("hellp")
    with pytest.raises(SystemExit):
        main(write_folder, "--output", "next", "--source", "data/out", inputs=("source",))
    assert "error: data/out: damaged, or changed" in capsys.readouterr().err
    Path("data/out.manifest.json").write_text("{")
    with pytest.raises(SystemExit):
        main(write_folder, "--output", "next", "--source", "data/out", inputs=("source",))
    assert "not a readable manifest" in capsys.readouterr().err


def test_seeds() -> None:
    drawn: list[tuple[float, ...]] = []

    def run(task: step.Task, settings: Settings) -> None:
        write(task, settings)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.empty(10_000_000).isnan().all(), "what nobody writes to takes no memory"
        drawn.append((random.random(), np.random.random(), torch.rand(()).item()))

    try:
        for seed in ("1", "1", "2"):
            main(run, "--seed", seed, light=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_cache_outlives_a_failure_and_goes_after_success() -> None:
    seen: list[tuple[Path, bool]] = []

    def fail(task: step.Task, settings: Settings) -> None:
        seen.append((task.cache, (task.cache / "half").exists()))
        (task.cache / "half").touch()
        raise RuntimeError

    def finish(task: step.Task, settings: Settings) -> None:
        with pytest.raises(RuntimeError):
            fail(task, settings)
        write(task, settings)

    Path("in").write_text("1")
    for argv in ((), (), ("--text", "other"), ("--seed", "1"), ("--source", "in")):
        with pytest.raises(RuntimeError):
            main(fail, *argv, inputs=("source?",))
    Path("in").write_text("2")
    main(finish, "--source", "in", inputs=("source?",))
    main(finish)
    assert [there for _, there in seen] == [False, True, False, False, False, False, True]
    paths = [path for path, _ in seen]
    assert paths[0] == paths[1] == paths[6]
    assert len(set(paths)) == 5
    assert [path.exists() for path in paths[2:]] == [True, True, True, False, False]


def test_the_code_of_a_step_is_part_of_its_cache() -> None:
    assert step.code_digest(result.run) == dependencies.digest("windquant.result")
    assert step.code_digest(write) == ""  # not of the package
    keys = {step.cache_key("demo", {}, 0, {}, code) for code in ("a", "b")}
    assert len(keys) == 2


SLOW = """
    import sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from windquant import step

    @dataclass(frozen=True)
    class Settings:
        seconds: float = 60.0  # to sleep

    def run(task, settings):
        task.output.mkdir()
        (task.output / "half").write_text("half")
        Path("started").touch()
        time.sleep(settings.seconds)

    if __name__ == "__main__":
        step.main("slow", run, Settings, light=True)
        print("torch" in sys.modules, "mlflow" in sys.modules)
"""


def start(*argv: str) -> subprocess.Popen[str]:
    Path("slow.py").write_text(textwrap.dedent(SLOW))
    path = str(Path(step.__file__).parents[1])
    command = [sys.executable, "slow.py", "--output", "out", *argv]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process


def wait_for(path: str) -> None:
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_light_process_is_quick_and_counts_from_its_start() -> None:
    begin = time.monotonic()
    output, errors = start("--seconds", "0").communicate(timeout=60)
    assert (output, errors) == ("False False\n", "")
    assert 0.02 < Manifest.load(Path("out")).seconds <= time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(number: int) -> None:
    # A shell's background job hands down an ignored SIGINT; the child shall see it as in the foreground.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start()
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for("started")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert names(Path()) == {"slow.py", "started"}


def test_killed_then_run_again() -> None:
    process = start()
    wait_for("started")
    process.kill()
    process.communicate(timeout=60)
    partial = f"out{atomic.MARK}{process.pid}"
    assert names(Path()) == {"slow.py", "started", partial}  # nothing at the final path
    other = Path(f"out{atomic.MARK}{os.getppid()}")  # belongs to a process that lives
    other.touch()
    start("--seconds", "0").communicate(timeout=60)
    assert names(Path()) == {"slow.py", "started", "out", "out.manifest.json", other.name}


def test_write_text_replaces_or_leaves() -> None:
    path = Path("x.json")
    atomic.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert names(Path()) == {"x.json"}


@pytest.mark.parametrize(
    ("module", "says"),
    [("windquant.search", "Search: "), ("windquant.evaluation.perplexity", "Perplexity of a checkpoint")],
)
def test_help_names_its_own_command_and_says_what_it_does(module: str, says: str) -> None:
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True).stdout
    assert shown.startswith(f"usage: python -m {module} ")
    assert f"\n{says}" in shown
