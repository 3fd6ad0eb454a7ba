"""Calibration set: the tokens of every step that reads text, each from documents that no other split reads.

    python -m windquant.calibration --model resources/models/smollm2-135m --output data/calibration/smollm2-135m

The artifact is a folder: tokens.safetensors (int32 [n, length] each: `calibration`, `reward`, `recovery`, `test`),
cloze.jsonl and next_sentence.jsonl (zero-shot records, where the evaluation text is made of articles), and info.json.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from windquant import models, splits, step, texts
from windquant.articles import Article
from windquant.errors import WindquantError
from windquant.evaluation import tasks
from windquant.settings import Count, Length, Limit, Natural

#: Windows are drawn from this many times as many tokens as are needed, where there is more text than that.
OVERSAMPLING = 8


@dataclass(frozen=True)
class Settings:
    source: Literal["articles", "hub", "file"] = "articles"  # embedded Wikipedia articles, a Hub data set, a local file
    path: str = ""  # text file (source file): documents between blank lines, or one a line; .jsonl: one document a line
    dataset: str = "garage-bAInd/Open-Platypus"  # on the Hub (source hub)
    subset: str = ""  # of the data set (source hub)
    split: str = "train"  # of the data set (source hub)
    columns: tuple[str, ...] = ("instruction", "output")  # of the text (source hub, and of a .jsonl that has no "text")
    whole: bool = False  # a calibration sample is the beginning of one document, not a window of the joined documents
    samples: Count = 64  # calibration samples
    length: Length = 256  # tokens of a calibration sample
    reward_samples: Annotated[int, Limit("minimum", 2)] = 32  # windows on which the search measures a plan
    reward_length: Length = 256  # tokens of a reward window
    recovery_samples: Count = 576  # windows that recovery may train on, or as many as the text yields
    recovery_length: Length = 512  # tokens of a recovery window
    # "same" holds out a part of `source`; "rows" is a file with one row a line, joined like the Hub's WikiText-2
    test_source: Literal["same", "articles", "hub", "file", "rows"] = "same"  # perplexity's text (same: of source)
    test_path: str = ""  # text file (test_source file, or rows: one row a line); .jsonl: one row a line
    test_dataset: str = "Salesforce/wikitext"  # on the Hub (test_source hub)
    test_subset: str = "wikitext-2-raw-v1"  # of the data set (test_source hub)
    test_split: str = "test"  # of the data set (test_source hub)
    test_columns: tuple[str, ...] = ("text",)  # of the data set (test_source hub)
    context: Length = 1024  # tokens of a test window
    cloze_records: Natural = 150  # of the task made from held-out articles, or as many as they yield
    next_sentence_records: Natural = 75  # of the task next_sentence, or as many as they yield


@dataclass(frozen=True)
class Calibration:
    """A loaded artifact: token windows, int32 [n, length] each."""

    folder: Path  # of the zero-shot records
    calibration: Tensor
    reward: Tensor
    recovery: Tensor
    test: Tensor
    test_name: str  # of the test text, as the results call it

    def measured_and_unseen(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Of the reward split: windows of `tokens` to measure plans on, and the others, a quarter or more, that confirm
        what a search has found; int64 [n, length]. Raises WindquantError if there is but one window."""
        if len(self.reward) < 2:
            raise WindquantError("calibration.reward_samples: ask for 2, one to measure on and one to confirm on")
        count = max(1, min(tokens // self.reward.shape[1], len(self.reward) * 3 // 4))
        return self.reward[:count].long(), self.reward[count:].long()


def load(folder: Path) -> Calibration:
    """The artifact of this step; WindquantError if it is damaged."""
    try:
        tensors = load_file(folder / "tokens.safetensors")
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        windows = {name: tensors[name] for name in ("calibration", "reward", "recovery", "test")}
        return Calibration(folder, **windows, test_name=info["test_name"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise WindquantError(f"{folder}: not a readable calibration set ({error}); delete it and run again") from error


def run(task: step.Task, settings: Settings) -> None:
    tokenizer = models.load_tokenizer(task.inputs["model"])
    first = beginning_token(tokenizer)
    most = models.positions(models.configuration(task.inputs["model"]))
    for key in ("length", "reward_length", "recovery_length", "context"):
        if most is not None and getattr(settings, key) > most:
            raise WindquantError(
                f"calibration.{key}: {getattr(settings, key)}, but the model takes {most} tokens; give at most so many"
            )
    dealt = splits.split_texts(settings)
    tokens: dict[str, Tensor] = {}
    info: dict[str, Any] = {"source": texts.origin(settings), "test_name": dealt.test_name, "splits": {}}
    for name in ("calibration", "reward", "recovery"):
        prefix = "" if name == "calibration" else f"{name}_"
        count, length = getattr(settings, f"{prefix}samples"), getattr(settings, f"{prefix}length")
        chance = random.Random(f"{task.seed} {name}")
        whole = name == "calibration" and settings.whole
        if name != "recovery":  # which takes what there is, so it can do with less
            _supply(tokenizer, dealt, name, count, length, whole)
        documents = chance.sample(dealt.documents[name], len(dealt.documents[name]))
        if whole:
            windows, used, available = beginnings(tokenizer, documents, count, length)
        else:
            stream, used = encode(tokenizer, documents, OVERSAMPLING * count * length)
            windows, available = draw(cut(stream, length, first), count, chance), len(stream)
        least = 1 if name == "recovery" else count  # recovery begins again after its last window
        _require(name, prefix, windows, least, available, info["source"]["training"], whole)
        tokens[name], info["splits"][name] = windows, _describe(windows, used, available)
    stream, used = encode(tokenizer, dealt.documents["test"])
    tokens["test"] = cut(stream, settings.context, first)
    if not len(tokens["test"]):
        raise WindquantError(
            f"calibration.context: the test text of {info['source']['test']} has {len(stream)} tokens, a window needs "
            f"{settings.context}; lower calibration.context or give more text"
        )
    info["splits"]["test"] = _describe(tokens["test"], used, len(stream))

    task.output.mkdir(parents=True)
    save_file(tokens, task.output / "tokens.safetensors")
    info["records"] = _write_records(task.output, dealt.documents["tasks"], settings)
    text = json.dumps(info, indent=1, ensure_ascii=False)
    (task.output / "info.json").write_text(f"{text}\n", encoding="utf-8")
    for name, entry in info["splits"].items():
        task.dataset(name, info["source"]["test" if name == "test" else "training"], entry["sha256"][:36], name)
        task.note(name, {key: value for key, value in entry.items() if key != "documents"})
    task.note("test_name", dealt.test_name)
    task.note("source", info["source"])


def _supply(
    tokenizer: PreTrainedTokenizerBase, dealt: splits.Splits, name: str, count: int, length: int, whole: bool
) -> None:
    """Give a split documents of recovery's, if it has too few for `count` windows of `length`."""

    def worth(document: Article) -> int:
        if whole:
            return len(beginnings(tokenizer, [document], 1, length)[0])
        return len(encode(tokenizer, [document])[0])

    splits.lend(dealt.documents["recovery"], dealt.documents[name], count if whole else count * length, worth)


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Article], enough: int | None = None
) -> tuple[Tensor, list[str]]:
    """Tokens int32 [t] of the documents, a blank line after each, and their titles; stops when there are `enough`."""
    parts: list[Tensor] = []
    titles: list[str] = []
    total = 0
    for document in documents:
        if enough is not None and total >= enough:
            break
        ids = tokenizer(f"{document.text}\n\n", add_special_tokens=False).input_ids
        part = torch.tensor(ids, dtype=torch.int32)
        parts.append(part)
        titles.append(document.title)
        total += len(part)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32), titles


def beginning_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text (BOS); None where it puts none."""
    ids = tokenizer("").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def cut(stream: Tensor, length: int, first: int | None) -> Tensor:
    """The disjoint windows [n, length] of a token stream [t]; `first` takes the place of the first token of each.

    Some models are lost where a text does not begin as it should: gemma3-270m. What is predicted is the same, as the
    first token of a window never is (llama.cpp's perplexity does likewise).
    """
    windows = stream[: len(stream) // length * length].view(-1, length).clone()
    if first is not None:
        windows[:, 0] = first
    return windows


def draw(windows: Tensor, count: int, chance: random.Random) -> Tensor:
    """Up to `count` of the windows [n, length], in random order."""
    return windows[chance.sample(range(len(windows)), min(count, len(windows)))]


def beginnings(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Article], count: int, length: int
) -> tuple[Tensor, list[str], int]:
    """The first `length` tokens of up to `count` documents that have as many; their titles; the tokens looked at."""
    rows: list[list[int]] = []
    titles: list[str] = []
    available = 0
    for document in documents:
        if len(rows) == count:
            break
        ids = tokenizer(document.text).input_ids
        available += min(len(ids), length)
        if len(ids) >= length:
            rows.append(ids[:length])
            titles.append(document.title)
    return torch.tensor(rows, dtype=torch.int32).view(-1, length), titles, available


def _require(split: str, prefix: str, windows: Tensor, count: int, available: int, origin: str, whole: bool) -> None:
    """WindquantError if there are less than `count` windows; it names what would help."""
    found, length = windows.shape
    if found >= count:
        return
    if whole:
        raise WindquantError(
            f"calibration.samples: {found} documents of the {split} split of {origin} have {length} tokens, {count} "
            "are asked for; lower it or calibration.length, or set calibration.whole: false, which joins documents"
        )
    key = f"{prefix}samples" if found else f"{prefix}length"
    raise WindquantError(
        f"calibration.{key}: the {split} split of {origin} has {available} tokens, {count} windows of {length} "
        f"need {count * length}; lower calibration.{key} or give more text"
    )


def _describe(windows: Tensor, titles: list[str], available: int) -> dict[str, Any]:
    digest = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
    return {
        "windows": windows.shape[0],
        "length": windows.shape[1],
        "tokens_available": available,
        "sha256": digest,
        "documents": titles,
    }


def _write_records(folder: Path, documents: list[Article], settings: Settings) -> dict[str, int]:
    """Write `<task>.jsonl` for every task that the documents yield records for; the number of records of each."""
    written = {}
    for name, records in (
        ("cloze", tasks.cloze_records(documents, settings.cloze_records)),
        ("next_sentence", tasks.next_sentence_records(documents, settings.next_sentence_records)),
    ):
        if records:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            written[name] = len(records)
    return written


if __name__ == "__main__":
    step.main("calibration", run, Settings, inputs=("model",))
