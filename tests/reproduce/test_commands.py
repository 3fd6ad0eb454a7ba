"""What push, pull and verify say when git, the configuration or a path is not as they need it."""

import subprocess
from pathlib import Path

import pytest

from windquant import configuration
from windquant.errors import WindquantError
from windquant.reproduce import dryrun, push, verify
from windquant.reproduce.store import Store


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WindquantError, match=r"^git is not installed \(No such file or directory\)"):
        Store(tmp_path)
    assert verify._version(tmp_path).startswith("data/ is not compared with its remote: git is not installed")


def test_git_says_itself_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WindquantError, match=r"not a git clone that can be used \(fatal: not a git repository"):
        Store(tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests do it like this
    with pytest.raises(WindquantError, match=r"dubious ownership .* git config --global --add safe.directory"):
        Store(tmp_path)


def test_push_does_not_fail_for_what_it_warns_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "results").mkdir()
    for name in ("old.json", "old.json.manifest.json"):
        (tmp_path / "results" / name).touch()

    def plan(root: Path, targets: list[str]) -> dryrun.Plan:
        raise WindquantError(f"{targets[0]}: no such model")

    monkeypatch.setattr(dryrun, "plan", plan)
    *_, last = push._surprises(tmp_path)
    assert last == "cannot say whether results are current: results/old.json: no such model"


def test_verify_finds_a_model_beside_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").touch()
    project = tmp_path / "code" / "project"
    (project / "config").mkdir(parents=True)
    (project.parent / "mine").symlink_to("../my-model")
    config = {"models": {"m": {"path": "../mine"}, "n": {"path": "../nothing"}}, "tasks": ["a/b", "."], "seed": 0}
    monkeypatch.setattr(configuration, "load", lambda path: config)
    scratch = project / verify.SCRATCH
    verify._link(project, scratch)
    assert (scratch / "../mine/config.json").is_file()
    assert {path.name for path in scratch.parent.iterdir()} == {scratch.name, "mine"}
    verify._clear(scratch.parent)
    config["tasks"] = ["../../my-model"]
    with pytest.raises(WindquantError, match=r"\.\./\.\./my-model: verify cannot follow this path"):
        verify._link(project, scratch)
