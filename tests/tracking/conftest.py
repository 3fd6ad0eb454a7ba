"""Every test here has a folder of its own with an MLflow store in it."""

from pathlib import Path

import pytest

from windquant import tracking_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables and nothing in them: making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking_store.connect(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return tmp_path
