"""What stands in the README and in docs/ is true: commands run, code compiles, links lead somewhere, pages are current.

docs/development.md says how commands are tried. The large model's name and budget stand for the tiny model's.
"""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.workflow.conftest import BITS, LOCAL, MODEL, Snakemake
from windquant import api

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if path.name != "api.md")
#: Of whoever has measured: their commands take minutes or hours, so they are only looked up; they stand indented.
MEASURED = ("results.md", "performance.md", "peers.md", "decisions.md", "format.md")
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4,}(?:make|snakemake|python|git|pip|\.venv/bin)\b.*", re.MULTILINE)
STANDS_FOR = {"smollm2-135m_2.0bits": f"{MODEL}_{BITS}bits", "smollm2-135m_2.5bits": f"{MODEL}_5.0bits",
              "smollm2-135m": MODEL}  # fmt: skip


@dataclass(frozen=True)
class Command:
    page: Path
    text: str
    comment: str

    @property
    def words(self) -> list[str]:
        text = self.text
        for name, tiny in STANDS_FOR.items():
            text = text.replace(name, tiny)
        return shlex.split(text.removeprefix(".venv/bin/"))

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        found = re.search(r"\bneeds (.*?)(?:: .*)?$", self.comment)
        return found[1] if found else None

    @property
    def open(self) -> bool:
        """Whether a part of it is only known to who types it."""
        return "..." in self.text or bool(re.search(r"\b[A-Z]{4,}\b(?!=)", self.text)) or "<" in self.text


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, content) of the fenced blocks."""
    return [(rest.strip(), body) for name, rest, body in FENCE.findall(page.read_text()) if name == language]


def indented(page: Path) -> list[str]:
    """The commands that stand outside of fences, each in one line."""
    return INDENTED.findall(FENCE.sub("", page.read_text()).replace("\\\n", " "))


def commands() -> Iterator[Command]:
    for page in PAGES:
        lines = [line for _, body in blocks(page, "sh") for line in body.replace("\\\n", " ").splitlines()]
        for line in [*lines, *(indented(page) if page.name in MEASURED else [])]:
            text, _, comment = line.partition(" #")
            for part in text.split("&&"):
                if part.strip():
                    yield Command(page, part.strip(), comment.strip())


COMMANDS = list(commands())


def chosen(program: str) -> list[Command]:
    return [c for c in COMMANDS if c.words[0] == program and c.reason is None and not c.open]


def asked(command: Command) -> list[str]:
    """What a command of Snakemake says, without what all say."""
    return [word for word in command.words[1:] if word not in ("--cores", "all", "-n", "--dry-run")]


def runs(module: str) -> bool:
    """Whether `python -m` finds it."""
    try:
        found = importlib.util.find_spec(module)
        folder = found is not None and found.submodule_search_locations is not None
        return (importlib.util.find_spec(f"{module}.__main__") if folder else found) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def test_every_command_is_of_a_known_kind() -> None:
    known = {"snakemake", "make", "python", "source", "git", "cd", "cp", "export", "pip", "dvc", "mlflow", ".ci/run",
             "pre-commit", "docker", "kubectl", "sbatch", "flock", "apt-get",
             "workflow/profiles/slurm/loopback"}  # fmt: skip
    for command in COMMANDS:
        assert command.words[0] in known, f"{command.page.name}: {command.text}"


def test_every_reason_stands_in_the_documentation() -> None:
    listed = (ROOT / "docs" / "development.md").read_text().partition("The reasons:")[2].partition("\n\n")[0]
    reasons = [" ".join(reason.split()) for reason in listed.rstrip(".").split(";")]
    for command in COMMANDS:
        if command.reason and command.page.name not in MEASURED:
            assert any(reason in command.reason for reason in reasons), f"{command.page.name}: {command.text}"


def test_commands_stand_in_fences() -> None:
    for page in PAGES:
        if page.name not in MEASURED:
            assert indented(page) == [], page


def test_make_knows_its_targets(tmp_path: Path) -> None:
    """Dry, all at once, as on a machine whose environment is there."""
    lines = {tuple(command.words[1:]) for command in chosen("make")}
    targets = sorted({word for line in lines for word in line if "=" not in word})
    assert {"run", "report", "test", "verify", "push", "pull"} <= set(targets)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "requirements-dev.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "--dry-run", *targets], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "snakemake --cores all results/report.html" in done.stdout


def test_snakemake_has_a_chain_for_every_target(finished: Path, snakemake: Snakemake) -> None:
    """Those without options of their own in one call: each takes seconds."""
    plain: set[str] = set()
    for command in chosen("snakemake"):
        words = asked(command)
        if command.page.name in MEASURED:
            continue
        if any(word.startswith("-") for word in words):
            done = snakemake(finished, "--dry-run", *words)
            assert done.returncode == 0, f"{command.page.name}: {command.text}\n{done.stdout[-2000:]}"
        else:
            plain.update(words)
    assert len(plain) >= 4
    done = snakemake(finished, "--dry-run", *sorted(plain))
    assert done.returncode == 0, done.stdout[-2000:]


def test_measured_commands_name_what_exists() -> None:
    """Those that only who types them can complete as well."""
    assert [runs(name) for name in ("benchmarks.peers.row", "benchmarks.peers", "benchmarks.no.row")] == [True, 0, 0]
    seen = set()
    for command in COMMANDS:
        if command.page.name in MEASURED:
            seen.add(command.page.name)
            if command.words[0] == "python":
                assert command.words[1] == "-m", command.text
                assert runs(command.words[2]), f"{command.page.name}: {command.text}"
            elif command.words[0] == "snakemake":
                targets = asked(command)
                assert targets, command.text
                assert not any(word.startswith("-") for word in targets), command.text
    assert {"results.md", "performance.md", "peers.md"} <= seen


def test_commands_of_the_package_run(finished: Path, tiny_model_folder: Path) -> None:
    folder = finished
    shutil.copytree(tiny_model_folder, folder / "my-model", dirs_exist_ok=True)
    shutil.copy(folder / LOCAL / "text.txt", folder / "my-texts.txt")
    seen = set()
    for command in chosen("python"):
        words = command.words
        if words[1] != "-m" or not words[2].startswith("windquant"):
            assert words[1] != "-m" or runs(words[2]), command.text
            continue
        if command.page.name in MEASURED:
            continue
        if words[2:4] == ["windquant", "quantize"] and "--dry-run" not in words:
            words = [*words, "--dry-run"]  # its steps run in tests/workflow/test_own_model.py
        elif words[2:4] in (
            ["windquant", "verify"],
            ["windquant", "push"],
            ["windquant", "pull"],
            ["windquant", "sync"],
        ):
            words = [*words[:4], "--help"]  # they run in tests/workflow/test_reproduce.py and tests/tracking
        elif words[2:4] == ["windquant", "doctor"]:
            words = [*words, "--offline"]
        if tuple(words) in seen:
            continue
        seen.add(tuple(words))
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )  # fmt: skip
        assert done.returncode == 0, f"{command.page.name}: {command.text}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
    assert len(seen) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_compiles_and_finds_what_it_imports(page: Path) -> None:
    for _, body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "config" / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if not target.startswith(("http://", "https://", "#")):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), f"{page.name}: {target}"


def test_api_reference_is_current() -> None:
    assert (ROOT / api.PAGE).read_text() == api.page(), "run `python -m windquant.api`"


def test_docstrings_become_markdown() -> None:
    text = "One line.\n\n    code = 1\n\n    more()\n\nThe end.\n"
    assert api.fenced(text) == "One line.\n\n```text\ncode = 1\n\nmore()\n```\n\nThe end."
    tree = ast.parse(
        'class A(B):\n    """Doc."""\n    x: int = 3\n    def f(self, a: int) -> str:\n        """Says."""\n'
    )
    assert list(api.module("m", tree)) == [
        "## m",
        "### class `A(B)`\n\nDoc.",
        "- `x: int = 3`\n- `f(a: int) -> str`: Says.",
    ]
