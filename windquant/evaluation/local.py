"""Local files of zero-shot tasks: `<task>.<split>.jsonl`, one JSON object a line, in the Hub's columns."""

from collections.abc import Iterable
from pathlib import Path

from windquant.errors import WindquantError

#: Made by the calibration step from held-out articles: they need no files.
EMBEDDED = ("cloze", "next_sentence")
SPLITS = {"training": "train", "validation": "validation", "test": "test"}  # lm-eval's names: the Hub's


def of_task(name: str, data_dir: str) -> dict[str, Path]:
    """The files of a task by split; WindquantError if the folder has none to measure the task on."""
    folder = Path(data_dir).expanduser()
    files = {split: folder / f"{name}.{split}.jsonl" for split in SPLITS.values()}
    found = {split: file for split, file in files.items() if file.is_file()}
    if not found.keys() & {"test", "validation"}:
        raise WindquantError(
            f"evaluation.data_dir: {folder} has no {name}.test.jsonl or {name}.validation.jsonl; put the rows of the "
            f"Hub's data set there, one JSON object a line, or take {name} out of evaluation.tasks"
        )
    return found


def of_tasks(names: Iterable[str], data_dir: str) -> list[str]:
    """All files that these tasks read from `data_dir`; none where it is empty and the Hub is read."""
    if not data_dir:
        return []
    return [str(file) for name in names if name not in EMBEDDED for file in of_task(name, data_dir).values()]
