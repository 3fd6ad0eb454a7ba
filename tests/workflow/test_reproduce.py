"""Author and colleague: two clones and a remote, what the second one finds, and what it makes again after a change."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workflow.commands import changed, hidden, refused, run, windquant
from tests.workflow.conftest import BITS, GREEDY, LOCAL, MODEL, RESULT, Snakemake
from tests.workflow.test_end_to_end import again
from windquant import exclusive
from windquant.reproduce import differences
from windquant.reproduce.store import md5

BANK = f"data/bank/{MODEL}.safetensors"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=author", "-c", "user.email=author@example.org"]
    done = run(folder, "git", *identity, *arguments, GIT_CONFIG_GLOBAL=os.devnull)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def author(finished: Path) -> Path:
    """A clone under git with the finished results, pushed to the default remote, a folder beside it."""
    git(finished, "init", "--quiet")
    git(finished, "add", "--all")
    git(finished, "commit", "--quiet", "--message", "Experiment")
    output = windquant(finished, "push")
    assert f"to remote local ({finished.parent / 'windquant-remote'})" in output
    assert "now commit it" in output
    assert "warning" not in output
    git(finished, "commit", "--quiet", "--message", "Data", "data.dvc")
    return finished


@pytest.fixture(scope="module")
def colleague(author: Path) -> Path:
    """A clone beside the author's that has pulled."""
    return cloned(author, "colleague", pull=True)


def cloned(author: Path, name: str, pull: bool = False) -> Path:
    folder = author.parent / name
    git(author.parent, "clone", "--quiet", str(author), str(folder))
    if pull:
        windquant(folder, "pull")
    return folder


def test_colleague_has_nothing_to_do(author: Path, colleague: Path, snakemake: Snakemake) -> None:
    assert again(colleague, snakemake, RESULT, GREEDY) == {}
    assert (colleague / RESULT).read_bytes() == (author / RESULT).read_bytes()
    assert windquant(colleague, "pull").splitlines()[1].endswith("0 of them new here")
    assert "data.dvc" not in git(colleague, "status", "--porcelain")


def test_deleted_result_is_made_again_alone(author: Path, colleague: Path, snakemake: Snakemake) -> None:
    (colleague / RESULT).unlink()
    assert again(colleague, snakemake, RESULT) == {"result": 1}
    done = snakemake(colleague, RESULT)
    assert done.returncode == 0, done.stdout
    verdict = differences.compare(author / RESULT, colleague / RESULT, differences.TOLERANCES["results"])
    assert verdict.detail == "only what it says about its own making differs"
    assert again(colleague, snakemake, RESULT, GREEDY) == {}
    assert RESULT in refused(colleague, "pull"), "made here and not pushed"
    windquant(colleague, "pull", "--force")
    assert (colleague / RESULT).read_bytes() == (author / RESULT).read_bytes()


def test_changes_rerun_what_depends_on_them(colleague: Path, snakemake: Snakemake) -> None:
    recovered = {"recovery": 1, "perplexity": 1, "zero_shot": 1, "result": 1}
    assert again(colleague, snakemake, RESULT, "--config", "recovery={steps: 3}") == recovered
    text = colleague / LOCAL / "text.txt"
    with changed(text, text.read_text() + "\nOne more sentence.\n"):
        jobs = again(colleague, snakemake, RESULT)
        assert {"calibration", "statistics", "bank", "allocation", "recovery", "result"} < set(jobs)
        assert "model" not in jobs
    module = colleague / "windquant" / "recovery.py"
    code = module.read_text()
    with changed(module, code.replace('"""', '"""Other words. ', 1) + "\n\n# a comment\n"):
        assert again(colleague, snakemake, RESULT) == {}
    with changed(module, f"{code}\nUNUSED = 1\n"):
        assert again(colleague, snakemake, RESULT) == recovered
    assert again(colleague, snakemake, RESULT, GREEDY) == {}


def test_models_do_not_travel_and_come_back(author: Path, colleague: Path, snakemake: Snakemake) -> None:
    remote = sum(path.stat().st_size for path in (author.parent / "windquant-remote").rglob("*") if path.is_file())
    data = sum(path.stat().st_size for path in (author / "data").rglob("*") if path.is_file())
    assert remote < data + 20_000  # one listing, and no weights of the original
    shutil.rmtree(colleague / "resources")
    assert "`make pull` gets it" in windquant(colleague, "pull", "--no-models")
    assert again(colleague, snakemake, RESULT) == {}, "nothing needs the model"
    with changed(colleague / LOCAL / "model" / "generation_config.json", "{}"):
        output = windquant(colleague, "pull")
    assert f"resources/models/{MODEL}: not the model that the data were made from" in output
    shutil.rmtree(colleague / "resources")
    assert "warning" not in windquant(colleague, "pull")
    with hidden(colleague / RESULT):
        assert again(colleague, snakemake, RESULT) == {"result": 1}


def test_pull_keeps_what_was_never_pushed(author: Path) -> None:
    other = cloned(author, "other", pull=True)
    (other / "data" / "plans" / "mine.json").write_text("{}")
    message = refused(other, "pull")
    assert message.startswith("error: data/plans/mine.json: not pushed, and pull would remove it; `make push` first")
    assert (other / "data" / "plans" / "mine.json").exists()
    windquant(other, "pull", "--force")
    assert not (other / "data" / "plans" / "mine.json").exists()
    (other / GREEDY).write_text("{}")
    assert GREEDY in refused(other, "pull")
    windquant(other, "pull", "--force")
    assert (other / GREEDY).read_bytes() == (author / GREEDY).read_bytes()


def test_next_version_replaces_the_last(author: Path, snakemake: Snakemake) -> None:
    second = cloned(author, "second", pull=True)
    reader = cloned(author, "reader", pull=True)
    with changed(second / "config" / "config.yaml", (second / "config" / "config.yaml").read_text() + "seed: 3\n"):
        target = f"data/calibration/{MODEL}.manifest.json"
        assert snakemake(second, target).returncode == 0
        for name in (GREEDY, f"{GREEDY}.manifest.json"):
            (second / name).unlink()
        output = windquant(second, "push")
        assert "warning: not committed, so a clone will not have it: config/config.yaml" in output
        assert "warning: Snakemake would make results again here, and so it would in a clone: " in output
        git(second, "commit", "--quiet", "--all", "--message", "Another seed")
        git(reader, "pull", "--quiet", str(second))
    windquant(reader, "pull")
    assert json.loads((reader / target).read_text())["seed"] == 3
    assert not (reader / GREEDY).exists(), "its author has removed it"
    assert not (reader / f"{GREEDY}.manifest.json").exists()
    assert (reader / RESULT).exists()
    assert again(reader, snakemake, target) == {}
    assert again(reader, snakemake, BANK) == {"statistics": 1, "bank": 1}


def test_push_refuses_damage_and_a_busy_folder(author: Path) -> None:
    broken = cloned(author, "broken", pull=True)
    plan = broken / f"data/plans/{MODEL}_{BITS}bits.ppo.json"
    with changed(plan, "{}"):
        assert f"{plan.relative_to(broken)}: damaged, or changed since it was made" in refused(broken, "push")
    with (broken / exclusive.LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ("push", "pull"):
            assert f"another snakemake works in {broken}" in refused(broken, command)
    windquant(broken, "pull")


def test_a_failed_push_leaves_data_dvc(author: Path) -> None:
    unlucky = cloned(author, "unlucky", pull=True)
    (unlucky / "data" / "plans" / "note.txt").write_text("new")
    remote = unlucky / "remote"
    remote.write_text("a file where a folder should be")
    before = (unlucky / "data.dvc").read_text()
    (unlucky / ".dvc" / "config.local").write_text(f"['remote \"local\"']\n    url = {remote}\n")
    assert f"remote local ({remote})" in refused(unlucky, "push")
    assert (unlucky / "data.dvc").read_text() == before
    (unlucky / ".dvc" / "config.local").unlink()
    assert "data/plans/note.txt: not pushed" in refused(unlucky, "pull"), "though DVC's cache holds it"
    windquant(unlucky, "push")
    windquant(unlucky, "pull")


def test_reasons_of_a_pull_that_cannot_work(author: Path) -> None:
    new = cloned(author, "new")
    local = new / ".dvc" / "config.local"
    local.write_text("['remote \"local\"']\n    url = ../../nowhere\n")
    message = refused(new, "pull")
    assert f"remote local ({author.parent / 'nowhere'}): no such folder; put the clone beside the author's" in message
    (author.parent / "nowhere").mkdir()
    assert "lacks " in (message := refused(new, "pull"))
    assert "its author has to run `make push`" in message
    local.unlink()
    with changed(new / ".dvc" / "config", "[core]\n    analytics = false\n"):
        assert "no DVC remote: `dvc remote add --default NAME URL`" in refused(new, "pull")
    with changed(new / "data.dvc", "outs:\n- path: data\n  hash: md5\n"):
        assert "data.dvc: names no data yet; its author runs `make push` and commits it" in refused(new, "pull")
    with changed(new / "data.dvc", "<<<<<<< HEAD\n"):
        assert "data.dvc: not readable" in refused(new, "pull")
    assert "nothing to push" in refused(new, "push")
    shutil.rmtree(new / ".git")
    assert "not a git clone" in refused(new, "pull")


def test_one_file_missing_in_the_remote(author: Path) -> None:
    copy = author.parent / "incomplete"
    shutil.copytree(author.parent / "windquant-remote", copy)
    digest = md5(author / BANK)
    (copy / "files" / "md5" / digest[:2] / digest[2:]).unlink()
    new = cloned(author, "late")
    (new / ".dvc" / "config.local").write_text("['remote \"local\"']\n    url = ../../incomplete\n")
    assert f"remote local ({copy}): lacks files of the version in data.dvc" in refused(new, "pull")
    assert not (new / "data").exists(), "all or nothing"


def test_killed_pulls_are_completed(author: Path, snakemake: Snakemake) -> None:
    patient = cloned(author, "patient")
    pull = [sys.executable, "-m", "windquant", "pull"]
    environment = {**os.environ, "DVC_SITE_CACHE_DIR": str(patient.parent / "site"), "PYTHONPATH": ""}
    for seconds in (0.5, 0.6, 0.7, 0.8, 1.0, 1.5):
        with subprocess.Popen(pull, cwd=patient, env=environment, start_new_session=True) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            with contextlib.suppress(ProcessLookupError):  # done already
                os.killpg(process.pid, signal.SIGKILL)
    (patient / "data").mkdir(exist_ok=True)
    (patient / "data" / ".half-a-file.tmp").write_text("x")
    windquant(patient, "pull")
    assert not (patient / "data" / ".half-a-file.tmp").exists()
    assert again(patient, snakemake, RESULT, GREEDY) == {}


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[str]:
    """The address of an S3 server on this machine with a bucket `experiments`."""
    import boto3

    with subprocess.Popen(
        [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", "0"],
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if "Running on" in line)
            address = line.split()[-1]
            keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
            boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="experiments")
            yield address
        finally:
            server.terminate()


def test_remote_on_s3(author: Path, s3: str, snakemake: Snakemake, tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    remote = (
        f"['remote \"s3\"']\n    url = s3://experiments/windquant\n    endpointurl = {s3}\n[core]\n    remote = s3\n"
    )
    (author / ".dvc" / "config.local").write_text(remote)
    try:
        assert "to remote s3 (s3://experiments/windquant)" in windquant(author, "push", **keys)
    finally:
        (author / ".dvc" / "config.local").unlink()
    reader = cloned(author, "reader-of-s3")
    (reader / ".dvc" / "config.local").write_text(remote)
    nobody = {"AWS_ACCESS_KEY_ID": "", "HOME": str(tmp_path)}
    assert "(s3://experiments/windquant): Unable to locate credentials" in refused(reader, "pull", **nobody)
    with changed(reader / ".dvc" / "config.local", remote.replace(s3, "http://127.0.0.1:9")):
        message = refused(reader, "pull", **keys, AWS_MAX_ATTEMPTS="1")
        assert "Could not connect to the endpoint URL" in message
    windquant(reader, "pull", **keys)
    assert again(reader, snakemake, RESULT, GREEDY) == {}
