"""The DVC repository of a clone: what data.dvc names, the local cache, and the remote. DVC does the work.

Whatever DVC raises becomes one line that says what to do.
"""

import contextlib
import hashlib
import json
import logging
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from windquant.errors import WindquantError

DATA = "data"
HELP = "see docs/reproduce.md"


class Store:
    """Opened once per command: importing DVC takes a second."""

    def __init__(self, root: Path) -> None:
        self.root = root
        command = ["git", "rev-parse", "--is-inside-work-tree"]
        try:
            git = subprocess.run(command, cwd=root, capture_output=True, text=True)
        except OSError as error:
            raise WindquantError(f"git is not installed ({error.strerror}); data/ is versioned by it") from error
        if git.returncode:  # no clone, or one of another owner: git says what to do then
            reason = " ".join(git.stderr.split())[:300]
            raise WindquantError(f"{root.resolve()}: not a git clone that can be used ({reason})")
        if not (root / ".dvc" / "config").is_file():
            raise WindquantError(f"{root.resolve()}: not this project's folder (it has no .dvc/config)")
        self._reasons = _Reasons()
        from dvc.repo import Repo  # sets up DVC's logging

        for name in ("dvc", "dvc_data", "dvc_objects"):
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [self._reasons], False
        with self._errors():
            self.repo = Repo(str(root))
        self.repo.scm_context.quiet = True  # it would say what to commit; the caller does

    @property
    def file(self) -> Path:
        """data.dvc."""
        return self.root / f"{DATA}.dvc"

    @property
    def version(self) -> str:
        """The digest in data.dvc; WindquantError if nobody has pushed yet."""
        import yaml

        try:
            version = yaml.safe_load(self.file.read_text())["outs"][0].get("md5")
        except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
            raise WindquantError(
                f"{self.file}: not readable ({' '.join(str(error).split())}); get it back with `git checkout data.dvc`"
            ) from error
        if not version:
            raise WindquantError(f"{self.file}: names no data yet; its author runs `make push` and commits it")
        return str(version)

    @cached_property
    def remote(self) -> Any:
        """The default remote; WindquantError if there is none, or if DVC lacks what it takes."""
        with self._errors():
            return self.repo.cloud.get_remote()

    @property
    def remote_name(self) -> str:
        """E.g. "local (/home/me/windquant-remote)"."""
        return f"{self.remote.name} ({self.remote.fs.unstrip_protocol(self.remote.path)})".replace("local://", "")

    def add(self) -> None:
        """Take the content of data/ into the cache and write its digest to data.dvc."""
        self.unsent.parent.mkdir(exist_ok=True)
        self.unsent.touch()
        with self._errors():
            self.repo.add([str(self.root / DATA)])

    def push(self) -> int:
        """Send what the remote lacks of the version in data.dvc; the number of files sent."""
        with self._errors(f"remote {self.remote_name}"):
            count = int(self.repo.push(targets=[str(self.file)]))
        self.unsent.unlink(missing_ok=True)
        return count

    def fetch(self) -> int:
        """Bring the version in data.dvc into the cache; the number of files that came."""
        if self.remote.fs.protocol == "local" and not Path(self.remote.path).is_dir():
            raise WindquantError(
                f"remote {self.remote_name}: no such folder; put the clone beside the author's, or say where it is: "
                f"`dvc remote modify --local {self.remote.name} url FOLDER`, {HELP}"
            )
        _ = self.version  # there is something to fetch
        with self._errors(f"remote {self.remote_name}"):
            count = int(self.repo.fetch(targets=[str(self.file)]))
        if not all(map(self.cached, self.listing().values())):
            raise self._incomplete()
        return count

    def checkout(self) -> None:
        """Make data/ what data.dvc names. Whatever else it holds goes: ask `listing` before.

        Every file is written beside and renamed; what a killed call left of that goes first.
        """
        for path in (self.root / DATA).rglob(".*.tmp"):
            path.unlink()
        with self._errors():
            self.repo.checkout(targets=[str(self.file)], force=True)
        self.unsent.unlink(missing_ok=True)

    def listing(self) -> dict[str, str]:
        """File in data/ -> MD5, of the version in data.dvc, which must be in the cache."""
        path = self._object(self.version)
        try:
            return {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_text())}
        except FileNotFoundError:
            raise self._incomplete() from None
        except (ValueError, LookupError, TypeError) as error:
            raise WindquantError(f"{path}: damaged; delete it and run again") from error

    def files(self) -> Iterator[tuple[str, Path]]:
        """What data/ holds and DVC does not ignore: (name in data/, path)."""
        for path in sorted((self.root / DATA).rglob("*")):
            if path.is_file() and not self.repo.dvcignore.is_ignored_file(str(path.absolute())):
                yield path.relative_to(self.root / DATA).as_posix(), path

    def differing(self) -> list[str]:
        """Files of data/ that are not as in data.dvc: changed, missing or not in it."""
        expected, found = self.listing(), {name: md5(path) for name, path in self.files()}
        return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))

    @property
    def unsent(self) -> Path:
        """A mark that is there from before `add` until `push` is through: the cache holds what no remote has."""
        return self.root / ".dvc" / "tmp" / "unsent"

    def safe(self, digest: str) -> bool:
        """Whether the content was pushed from here, or pulled."""
        return self.cached(digest) and not self.unsent.exists()

    def cached(self, digest: str) -> bool:
        return self._object(digest).is_file()

    def _object(self, digest: str) -> Path:
        return Path(self.repo.cache.local.path) / digest[:2] / digest[2:]

    def _incomplete(self) -> WindquantError:
        return WindquantError(
            f"remote {self.remote_name}: lacks files of the version in data.dvc ({self.version[:12]}); "
            "its author has to run `make push`, to this remote"
        )

    @contextlib.contextmanager
    def _errors(self, where: str = "DVC") -> Iterator[None]:
        from dvc.config import NoRemoteError
        from dvc.exceptions import DownloadError, UploadError
        from dvc_objects.fs.errors import RemoteMissingDepsError

        try:
            yield
        except (WindquantError, KeyboardInterrupt):
            raise
        except NoRemoteError as error:
            raise WindquantError(f"no DVC remote: `dvc remote add --default NAME URL`, {HELP}") from error
        except RemoteMissingDepsError as error:
            raise WindquantError(
                "the DVC remote needs a package that is not installed: `pip install '.[s3]'` for s3://, "
                f"otherwise dvc-ssh, dvc-gs, dvc-azure ({_line(error)})"
            ) from error
        except (DownloadError, UploadError) as error:
            if self._reasons.first:  # no connection, no permission
                raise WindquantError(f"{where}: {self._reasons.first}, {HELP}") from error
            if isinstance(error, DownloadError):
                raise self._incomplete() from error
            raise WindquantError(f"{where}: {error.amount} files could not be sent; run `make push` again") from error
        except Exception as error:  # of DVC, or of the library that speaks to the remote
            raise WindquantError(f"{where}: {_line(error)} ({type(error).__name__})") from error


class _Reasons(logging.Handler):
    """DVC says in its log why a transfer failed, and raises no more than the number of files."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        if cause is not None and not isinstance(cause, FileNotFoundError) and not self.first:
            self.first = _line(cause)


def md5(path: Path) -> str:
    """DVC's digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no reason given"
