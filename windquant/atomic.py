"""Artifacts that are whole or not there: write beside, then rename.

A partial output is called `<artifact>.partial-<process id>`; the next run removes what killed processes left.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

MARK = ".partial-"


def manifest_path(artifact: Path) -> Path:
    """`<artifact>.manifest.json`, for files and folders alike."""
    artifact = artifact if artifact.name else artifact.resolve()  # "." has no name
    return artifact.parent / f"{artifact.name}.manifest.json"


def partial_path(final: Path) -> Path:
    return final.with_name(f"{final.name}{MARK}{os.getpid()}")


def final_name(partial: Path) -> str:
    """The name that a partial output will get."""
    return partial.name.partition(MARK)[0]


@contextlib.contextmanager
def output(final: Path) -> Iterator[Path]:
    """A temporary sibling to write a file or folder to; it takes the name `final` on success and goes on failure.

    The old manifest goes before the old artifact is replaced: an artifact with a manifest is always a finished one.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(final)
    remove_stale(manifest_path(final))
    partial = partial_path(final)
    try:
        yield partial
        manifest_path(final).unlink(missing_ok=True)
        if final.is_dir() and not final.is_symlink():
            old = partial.with_name(partial.name + "-old")  # a folder cannot be renamed over a full one
            final.replace(old)
            partial.replace(final)
            remove(old)
        else:
            if partial.is_dir():
                final.unlink(missing_ok=True)
            partial.replace(final)
    finally:
        remove(partial)


def write_text(path: Path, text: str) -> None:
    """Readers see the old content or the new one, never half of it. In UTF-8, whatever the locale."""
    partial = partial_path(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_stale(final: Path) -> None:
    """Remove what killed processes left beside `final`. What bears this process's id is also left over."""
    if not final.parent.is_dir():
        return
    for path in final.parent.iterdir():
        name, mark, rest = path.name.partition(MARK)
        pid = rest.partition("-")[0]
        if mark and name == final.name and pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
