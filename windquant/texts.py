"""The documents of the calibration set: Wikipedia articles, a file, or a data set of the Hub."""

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from windquant import articles, sources
from windquant.articles import Article
from windquant.errors import WindquantError

if TYPE_CHECKING:
    from windquant.calibration import Settings


def documents(settings: "Settings") -> list[Article]:
    """The documents of `source`."""
    match settings.source:
        case "articles":
            return wikipedia()
        case "hub":
            rows = sources.hub_rows(
                "calibration.dataset",
                settings.dataset,
                settings.subset,
                settings.split,
                settings.columns,
                "or set calibration.source: file and calibration.path: <a local text file>",
            )
            return [Article(f"row {index}", [row]) for index, row in enumerate(unique(rows))]
    path = existing("calibration.path", settings.path)
    if path.suffix == ".jsonl":
        texts = json_rows("calibration.path", path, settings.columns)
    else:
        text = read_text("calibration.path", path).strip()
        parts = re.split(r"\n\s*\n", text)
        texts = [part.strip() for part in (parts if len(parts) > 1 else text.splitlines())]
    return [Article(f"document {index}", [text]) for index, text in enumerate(unique(texts), 1)]


def unique(texts: Iterable[str]) -> list[str]:
    """Each text once, blank ones not at all: a repeated document would be in two splits."""
    return list(dict.fromkeys(text for text in texts if text.strip()))


def wikipedia() -> list[Article]:
    with tempfile.TemporaryDirectory() as scratch:
        return articles.read_dump(sources.fetch(sources.ARTICLES, Path(scratch)))


def json_rows(key: str, path: Path, columns: tuple[str, ...]) -> list[str]:
    """The text of every line of a .jsonl file: its "text", or the columns, joined by a line break."""
    # line feeds alone: JSON strings may hold other line separators as they are (U+2028)
    lines = enumerate(read_text(key, path).split("\n"), 1)
    return [_row_text(key, line, number, path, columns) for number, line in lines if line.strip()]


def _row_text(key: str, line: str, number: int, path: Path, columns: tuple[str, ...]) -> str:
    try:
        row = json.loads(line)
        parts = [row["text"]] if "text" in row else [row[column] for column in columns]
        return "\n".join(str(part) for part in parts if part is not None)
    except (ValueError, KeyError, TypeError) as error:
        raise WindquantError(
            f"{key}: line {number} of {path} is no JSON object with a text or the columns "
            f"{', '.join(columns)} ({error!r})"
        ) from error


def existing(key: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not value or not path.is_file():
        raise WindquantError(f"{key}: {value or 'missing'}; give a text file that exists")
    return path


def read_text(key: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WindquantError(f"{key}: {path} is not UTF-8 text ({error})") from error


def origin(settings: "Settings") -> dict[str, str]:
    """Where the two texts came from, for info.json and the tracking."""
    wikipedia = sources.ARTICLES.origin
    training = {"articles": wikipedia, "hub": f"hub:{settings.dataset}", "file": f"file:{settings.path}"}
    test = {
        "same": training[settings.source],
        "articles": wikipedia,
        "hub": f"hub:{settings.test_dataset}/{settings.test_subset}",
        "file": f"file:{settings.test_path}",
        "rows": f"file:{settings.test_path}",
    }
    return {"training": training[settings.source], "test": test[settings.test_source]}
