"""Clones of the project, a configuration for the tiny model, its results, and Snakemake as a user calls it."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from windquant import journal

ROOT = Path(__file__).resolve().parents[2]
BITS = "4.0"  # at this size the metadata alone takes more than a bit
MODEL = "tiny"
RESULT = f"results/{MODEL}_{BITS}bits.json"
GREEDY = f"results/{MODEL}_{BITS}bits.greedy.json"
LOCAL = "local"  # folder of the tiny model and its text in a clone
Snakemake = Callable[..., subprocess.CompletedProcess[str]]


def tiny_config(folder: Path) -> dict[str, object]:
    """A configuration with one model, and every number small."""
    return {
        "calibration": {
            "source": "file",
            "path": str(folder / "text.txt"),
            "test_source": "same",
            "samples": 8,
            "length": 64,
            "reward_samples": 4,
            "reward_length": 64,
            "recovery_samples": 16,
            "recovery_length": 64,
            "context": 64,
            "cloze_records": 8,
            "next_sentence_records": 8,
        },
        "units": {"chunk": 16},
        "search": {"episodes": 8, "n_envs": 4, "evaluations": 3, "hidden": 16, "reward_tokens": 128},
        "recovery": {"steps": 2},
        "ablations": {"chunk": {"chunk32": {"units": {"chunk": 32}}}},
        "evaluation": {"windows": 4, "tasks": ["cloze"]},
        "models": {MODEL: {"source": "folder", "path": str(folder / "model")}},
    }


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, text_file: Path) -> Path:
    """A folder with model/, text.txt and a configuration that uses them, config.yaml; all its own."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(text_file, folder / "text.txt")
    shutil.copytree(tiny_model_folder, folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    return folder


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """That of all processes of pytest-xdist."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What numba compiles of the trellis search, in the project's own folder: the clones take it along."""
    import torch

    from windquant.bank import Settings
    from windquant.quantizers import Trellis, actions

    with FileLock(shared_folder(tmp_path_factory) / "compiled.lock"):
        for action in actions(Settings().window).values():
            if isinstance(action, Trellis):
                rows = torch.ones(32, 2)
                fit = action.fit(rows, torch.ones(2))
                action.encode(rows.T.contiguous(), fit, torch.ones(32), torch.eye(2))


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory, compiled: None) -> Callable[[], Path]:
    """Makes a copy of what a clone of this project holds for its workflow."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("clone")
        for name in ("Snakefile", "requirements.lock", "data.dvc", ".dvcignore", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        for name in ("workflow", "config", "windquant"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc"))
        (folder / "profiles").symlink_to("workflow/profiles")
        (folder / ".dvc").mkdir()
        for name in ("config", ".gitignore"):
            shutil.copy(ROOT / ".dvc" / name, folder / ".dvc")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_clone(clone: Callable[[], Path], tiny_model_folder: Path, text_file: Path) -> Callable[[], Path]:
    """Makes a clone that is configured for the tiny model; its model and text are in LOCAL."""

    def make() -> Path:
        folder = clone()
        shutil.copytree(tiny_model_folder, folder / LOCAL / "model")
        shutil.copy(text_file, folder / LOCAL / "text.txt")
        (folder / "config" / "config.yaml").write_text(yaml.safe_dump(tiny_config(Path(LOCAL))))
        return folder

    return make


@pytest.fixture(scope="session")
def snakemake() -> Snakemake:
    """Runs snakemake in a folder as a user does, with no way to any network; output and errors in `stdout`."""

    def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        nowhere = "http://127.0.0.1:9"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MLFLOW"))},
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.run(
            [Path(sys.executable).with_name("snakemake"), "--cores", "1", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )

    return call


@pytest.fixture(scope="session")
def finished_once(
    tmp_path_factory: pytest.TempPathFactory, tiny_clone: Callable[[], Path], snakemake: Snakemake
) -> Path:
    """A clone with the tiny model's results for PPO and greedy, made once for all processes of pytest-xdist.

    Never write to it: `finished` is a copy of one's own.
    """
    shared = shared_folder(tmp_path_factory)
    note = shared / "finished.txt"  # the folder is not renamed: links to the model's files lead into it
    with FileLock(shared / "finished.lock"):
        if not note.exists():
            made = tiny_clone()
            done = snakemake(made, RESULT, GREEDY)
            assert done.returncode == 0, done.stdout[-5000:]
            deadline = time.monotonic() + 60
            while list((made / journal.FOLDER).glob(f"*{journal.SUFFIX}")):  # runs on their way into the MLflow store
                assert time.monotonic() < deadline
                time.sleep(0.2)
            note.write_text(str(made))
    return Path(note.read_text())


@pytest.fixture(scope="module")
def finished(finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny_clone` in which the results for PPO and greedy have been made.

    The MLflow store is not copied: somebody may be writing to it.
    """
    folder = tmp_path_factory.mktemp("finished") / "clone"
    ignored = shutil.ignore_patterns("mlflow.db*", "mlartifacts", journal.FOLDER.name)
    shutil.copytree(finished_once, folder, symlinks=True, ignore=ignored)
    return folder
