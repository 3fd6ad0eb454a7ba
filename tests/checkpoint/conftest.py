"""A packed checkpoint that all tests share, and copies of it to damage."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.making import Made, make


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The Llama; shared, never write to it."""
    folder = tmp_path_factory.mktemp("whole")
    return make(folder / "packed", folder / "original")


@pytest.fixture
def copied(whole: Made, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the Llama's checkpoint that a test may damage."""
    counter = itertools.count()
    return lambda: Path(shutil.copytree(whole.folder, tmp_path / f"copy{next(counter)}"))
