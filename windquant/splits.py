"""Which documents each split of the calibration set may read: none is in two of them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from windquant import sources, texts
from windquant.articles import Article
from windquant.errors import WindquantError

if TYPE_CHECKING:
    from windquant.calibration import Settings

#: Share of the text that goes to each split, in the order of assignment.
TRAINING = {"calibration": 0.12, "reward": 0.05, "recovery": 0.60}
HELD_OUT = {"test": 0.12, "tasks": 0.11}


@dataclass(frozen=True)
class Splits:
    """Documents of `calibration`, `reward`, `recovery`, `test` and `tasks`; no document is in two of them."""

    documents: dict[str, list[Article]]
    test_name: str


def check_apart(settings: "Settings", test_source: str) -> None:
    """WindquantError if the test text would be trained on."""
    if test_source == "hub":
        kind, key = "hub", "dataset"
        one: object = (settings.dataset, settings.subset, settings.split)
        other: object = (settings.test_dataset, settings.test_subset, settings.test_split)
    else:
        kind, key = "file", "path"
        one, other = (Path(path).expanduser().resolve() for path in (settings.path, settings.test_path))
    if settings.source == kind and test_source in ("hub", "file", "rows") and one == other:
        raise WindquantError(
            f"calibration.test_{key}: the same as calibration.{key}, so the test text would be trained on; "
            "use test_source: same, which holds a part out"
        )


def split_texts(settings: "Settings") -> Splits:
    """Read the sources and deal their documents out. The seed has no part in it: every seed has the same test text."""
    test_source = "same" if settings.test_source == settings.source == "articles" else settings.test_source
    check_apart(settings, test_source)
    found = texts.documents(settings)
    if test_source == "same":
        names = {"articles": "wikipedia", "hub": settings.dataset.rpartition("/")[2], "file": Path(settings.path).stem}
        return Splits(deal(found, {**TRAINING, **HELD_OUT}), names[settings.source])
    documents = deal(found, TRAINING)
    match test_source:
        case "articles":
            held_out = deal(texts.wikipedia(), {**TRAINING, **HELD_OUT})
            return Splits({**documents, "test": held_out["test"], "tasks": held_out["tasks"]}, "wikipedia")
        case "hub":
            rows = sources.hub_rows(
                "calibration.test_dataset",
                settings.test_dataset,
                settings.test_subset,
                settings.test_split,
                settings.test_columns,
                "or set calibration.test_source: rows and calibration.test_path: <a local file>",
            )
            name = settings.test_subset or settings.test_dataset.rpartition("/")[2]
        case _:
            key = "calibration.test_path"
            path = texts.existing(key, settings.test_path)
            name = path.stem
            if path.suffix == ".jsonl":
                rows = texts.json_rows(key, path, settings.test_columns)
            elif test_source == "rows":  # the Hub's WikiText-2 keeps the line break of a row, except in empty ones
                rows = [line if line.strip() else "" for line in texts.read_text(key, path).splitlines(True)]
            else:
                rows = [texts.read_text(key, path)]
    return Splits({**documents, "test": [Article(name, ["\n\n".join(rows)])], "tasks": []}, name)


def deal(documents: Sequence[Article], shares: Mapping[str, float]) -> dict[str, list[Article]]:
    """Whole documents to splits in proportion to `shares`, in the order of their titles' digests."""
    dealt: dict[str, list[Article]] = {name: [] for name in shares}
    characters = dict.fromkeys(shares, 0)
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.title.encode()).digest()):
        name = min(shares, key=lambda name: characters[name] / shares[name])
        dealt[name].append(document)
        characters[name] += len(document.text)
    return dealt


def lend(reserve: list[Article], split: list[Article], needed: int, worth: Callable[[Article], int]) -> None:
    """Move documents from the end of `reserve` to `split` until its documents are worth `needed`, if they are not.

    `worth` tells what one document counts for. Half of the reserve's characters stay in any case.
    """
    found = 0
    for document in split:
        found += worth(document)
        if found >= needed:
            return
    spare = sum(len(document.text) for document in reserve) / 2
    while found < needed and reserve and (spare := spare - len(reserve[-1].text)) >= 0:
        split.append(reserve.pop())
        found += worth(split[-1])
