"""Commands as a user types them in a clone, and files that are different for a while."""

import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a clone; output and errors in `stdout`."""
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "DVC_SITE_CACHE_DIR": str(folder.parent / "site"), "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def windquant(folder: Path, *arguments: str, **environment: str) -> str:
    done = run(folder, sys.executable, "-m", "windquant", *arguments, **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def refused(folder: Path, *arguments: str, **environment: str) -> str:
    """The one line that a command refuses with."""
    done = run(folder, sys.executable, "-m", "windquant", *arguments, **environment)
    assert done.returncode == 2, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stdout
    assert "Traceback" not in done.stdout
    return errors[0]


class changed:
    """A file with another content for a while."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.before = path, text, path.read_text()

    def __enter__(self) -> None:
        self.path.write_text(self.text)

    def __exit__(self, *error: object) -> None:
        self.path.write_text(self.before)


class hidden(changed):
    """A file that is not there for a while."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "")

    def __enter__(self) -> None:
        self.path.unlink()
