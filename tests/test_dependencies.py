"""What a step's code digest covers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from windquant import dependencies

FILES = {
    "__init__.py": "import windquant.other\n",
    "step.py": '"""Frame."""\nfrom windquant import tracking\n\n\ndef main():\n    """Docs."""\n    return 1\n',
    "tracking.py": "X = 1\n",
    "other.py": "X = 1\n",
    "lazy.py": "X = 1\n",
    "recovery.py": "from windquant import step\n\n\ndef run():\n    import windquant.lazy\n",
    "bits/__init__.py": "",
    "bits/__main__.py": "from windquant.bits.deep import Settings, f\n",
    "bits/deep.py": "from . import near\nfrom ..step import main\n\n\nclass Base:\n    steps: int = 1\n\n\n"
    "class Settings(Base):\n    rate: float = 0.1\n",
    "bits/near.py": "X = 1\n",
    "bits/tasks/cloze.yaml": "a: 1\n",
}
Edit = Callable[[str, str], None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """A package of that name in a folder of its own; the fixture rewrites one of its files."""

    def clear() -> None:
        for function in vars(dependencies).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        clear()

    for name, text in FILES.items():
        write(name, text)
    monkeypatch.setattr(dependencies, "ROOT", tmp_path)
    yield write
    clear()


def test_closure_follows_imports_inside_functions_and_relative_ones(package: Edit) -> None:
    assert dependencies.closure("windquant.recovery") == ["windquant.lazy", "windquant.recovery", "windquant.step"]
    parts = ["", ".__main__", ".deep", ".near"]
    assert dependencies.closure("windquant.bits") == [*(f"windquant.bits{part}" for part in parts), "windquant.step"]
    with pytest.raises(ModuleNotFoundError, match=r"windquant\.nothing"):
        dependencies.closure("windquant.nothing")


@pytest.mark.parametrize(
    ("file", "text", "changes"),
    [
        ("recovery.py", FILES["recovery.py"] + "\n# comment\n\n", False),
        ("step.py", FILES["step.py"].replace("Docs.", "Other docs.").replace("Frame.", "The frame."), False),
        ("tracking.py", "X = 2\n", False),
        ("other.py", "X = 2\n", False),
        ("recovery.py", FILES["recovery.py"] + "X = 1\n", True),
        ("step.py", FILES["step.py"].replace("return 1", "return 2"), True),
        ("lazy.py", "X = 2\n", True),
    ],
)
def test_digest_changes_with_behaviour_alone(package: Edit, file: str, text: str, changes: bool) -> None:
    before = dependencies.digest("windquant.recovery")
    package(file, text)
    assert (dependencies.digest("windquant.recovery") != before) is changes


def test_data_files_of_a_package_count(package: Edit) -> None:
    before = dependencies.digest("windquant.bits")
    package("bits/tasks/cloze.yaml", "a: 2\n")
    assert dependencies.digest("windquant.bits") != before


def test_settings_without_an_import(package: Edit) -> None:
    assert dependencies.settings("windquant.bits") == ("steps", "rate")
    assert dependencies.settings("windquant.recovery") == ()
