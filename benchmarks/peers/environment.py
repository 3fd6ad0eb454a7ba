"""A peer's environment: a virtual environment with the packages that its lock pins, made on first use."""

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

LOCKS = Path(__file__).parent / "environments"
#: Installed before the others and with their dependencies: torch's are its own business, and some peers are built.
FIRST = ("torch==", "setuptools==", "wheel==")


class PeerError(Exception):
    """One line: why a peer has no figures."""


def interpreter(lock: Path, cache: Path) -> Path:
    """The python of the environment that `lock` describes, in a folder of `cache` named after the lock's content.

    Raises PeerError with pip's reason if something cannot be installed.
    """
    text = lock.read_text()
    folder = cache / f"{lock.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        first = [line for line in text.splitlines() if line.startswith(FIRST)]
        if first:
            _install(python, first)
        _install(python, ["--no-deps", "--no-build-isolation", "--requirement", str(lock)])
        done.touch()
    return python


def _install(python: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *arguments]
    done = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise PeerError(f"cannot be installed: {(errors or ['pip gives no reason'])[-1].removeprefix('ERROR: ')}")
