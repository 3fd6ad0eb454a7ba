"""Calibration sets: disjoint, deterministic, and refused in one line when there is too little text."""

import bz2
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from windquant import calibration, models, sources, splits, step, texts
from windquant.errors import WindquantError

SMALL = "--samples 6 --length 40 --reward-samples 3 --reward-length 24 --recovery-samples 10 --recovery-length 64"


def make(model: Path, output: Path, *flags: str, seed: int = 0) -> Path:
    argv = [
        "--model",
        str(model),
        "--output",
        str(output),
        "--seed",
        str(seed),
        "--context",
        "128",
        *SMALL.split(),
        *flags,
    ]
    step.main("calibration", calibration.run, calibration.Settings, ("model",), argv=argv)
    return output


def refused(capsys: pytest.CaptureFixture[str], model: Path, output: Path, *flags: str) -> str:
    """The one error line of a step that must fail with exit code 2 and leave nothing behind."""
    with pytest.raises(SystemExit) as stop:
        make(model, output, *flags)
    assert stop.value.code == 2
    assert not list(output.parent.glob(output.name + "*"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def made(tiny_model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibration") / "tiny"
    return make(tiny_model_folder, output, "--source", "file", "--path", str(text_file))


def test_artifact_holds_windows_of_every_split(made: Path) -> None:
    loaded = calibration.load(made)
    assert loaded.calibration.shape == (6, 40)
    assert loaded.reward.shape == (3, 24)
    assert loaded.recovery.shape == (10, 64)
    assert loaded.test.shape[1] == 128
    assert len(loaded.test) > 10
    for name in ("calibration", "reward", "recovery", "test"):
        tokens = getattr(loaded, name)
        assert tokens.dtype == torch.int32
        assert tokens.min() >= 0
        assert tokens.max() < 320
    assert loaded.test_name == "paragraphs"


def test_no_document_is_in_two_splits(made: Path, tiny_model_folder: Path, text_file: Path) -> None:
    entries = json.loads((made / "info.json").read_text())["splits"]
    used = [title for entry in entries.values() for title in entry["documents"]]
    assert len(used) == len(set(used)) > 15
    # ... and the windows are really cut from those documents
    documents = [part.strip() for part in text_file.read_text().split("\n\n")]
    tokenizer = models.load_tokenizer(tiny_model_folder)
    for name, entry in entries.items():
        own = "\n\n".join(documents[int(title.split()[1]) - 1] for title in entry["documents"])
        for window in getattr(calibration.load(made), name)[:3]:
            text = tokenizer.decode(window[2:-2])
            assert text in own + "\n\n"
    own_tasks = {json.loads(line)["title"] for line in (made / "cloze.jsonl").read_text().splitlines()}
    assert own_tasks.isdisjoint(used)


def test_same_seed_same_bytes_and_the_same_test_text_for_every_seed(
    made: Path, tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    flags = ("--source", "file", "--path", str(text_file))
    again = make(tiny_model_folder, tmp_path / "again", *flags)
    for path in made.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    other = calibration.load(make(tiny_model_folder, tmp_path / "other", *flags, seed=1))
    first = calibration.load(made)
    assert torch.equal(other.test, first.test)
    assert not torch.equal(other.calibration, first.calibration)
    assert not torch.equal(other.recovery, first.recovery)
    assert (other.folder / "cloze.jsonl").read_bytes() == (made / "cloze.jsonl").read_bytes()


def test_windows_begin_as_texts_do(made: Path, tiny_model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Where the tokenizer puts a token before a text, every window begins with it, and no other token changes."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    tokenizer = models.load_tokenizer(folder)
    assert calibration.beginning_token(tokenizer) is None
    template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    begun = calibration.load(make(folder, tmp_path / "begun", "--source", "file", "--path", str(text_file)))
    plain = calibration.load(made)
    for name in ("calibration", "reward", "recovery", "test"):
        windows = getattr(begun, name)
        assert (windows[:, 0] == 0).all()
        assert (windows[:, 1:] > 0).all()
        assert torch.equal(windows[:, 1:], getattr(plain, name)[:, 1:])


def test_recovery_takes_as_many_windows_as_there_are(
    made: Path, tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    flags = ("--source", "file", "--path", str(text_file), "--recovery-samples", "100000")
    all_of_it = calibration.load(make(tiny_model_folder, tmp_path / "x", *flags))
    available = json.loads((tmp_path / "x" / "info.json").read_text())["splits"]["recovery"]["tokens_available"]
    assert len(all_of_it.recovery) == available // 64 > 10
    assert torch.equal(all_of_it.calibration, calibration.load(made).calibration)


@pytest.mark.parametrize("key", ["length", "reward_length", "recovery_length", "context"])
def test_windows_that_are_longer_than_the_model_takes_are_refused(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    flags = ("--source", "file", "--path", str(text_file), f"--{key.replace('_', '-')}", "131073")
    line = refused(capsys, tiny_model_folder, tmp_path / "x", *flags)
    assert f"calibration.{key}: 131073, but the model takes 131072 tokens" in line


def test_too_short_a_text_names_the_key_and_both_numbers(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--source", "file", "--path", str(text_file))
    line = refused(capsys, tiny_model_folder, tmp_path / "x", *flags, "--reward-samples", "100000")
    assert "calibration.reward_samples" in line
    assert "2400000" in line
    line = refused(capsys, tiny_model_folder, tmp_path / "x", *flags, "--recovery-length", "100000")
    assert "lower calibration.recovery_length or give more text" in line, "fewer windows would not help"
    line = refused(capsys, tiny_model_folder, tmp_path / "x", *flags, "--whole", "true", "--length", "5000")
    assert "0 documents of the calibration split" in line
    assert "calibration.whole: false" in line
    short = tmp_path / "short.txt"
    short.write_text("One short document.\n")
    line = refused(capsys, tiny_model_folder, tmp_path / "x", "--source", "file", "--path", str(short))
    assert "calibration." in line
    assert "more text" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--source", "file"), ("calibration.path", "missing")),
        (("--source", "file", "--path", "nowhere.txt"), ("calibration.path", "nowhere.txt")),
        (("--source", "file", "--path", "{latin}"), ("calibration.path", "UTF-8")),
        (("--source", "file", "--path", "{rows}"), ("calibration.path", "line 2")),
        (("--source", "file", "--path", "{text}", "--test-source", "file"), ("calibration.test_path", "missing")),
        (
            ("--source", "file", "--path", "{text}", "--test-source", "file", "--test-path", "{text}"),
            ("calibration.test_path", "the same as calibration.path"),
        ),
        (("--source", "hub"), ("calibration.dataset", "Open-Platypus", "calibration.source: file")),
        (
            ("--source", "file", "--path", "{text}", "--test-source", "hub"),
            ("calibration.test_dataset", "Salesforce/wikitext", "calibration.test_source: rows"),
        ),
    ],
)
def test_wrong_keys_are_named(
    tiny_model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    files = {"text": text_file, "latin": tmp_path / "latin.txt", "rows": tmp_path / "rows.jsonl"}
    files["latin"].write_bytes(b"caf\xe9 " * 100)
    files["rows"].write_text('{"text": "fine"}\n{"texts": "not fine"}\n')
    line = refused(capsys, tiny_model_folder, tmp_path / "x", *(flag.format(**files) for flag in flags))
    assert all(word in line for word in words), line


def test_jsonl_gives_one_document_a_line(tiny_model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": part[:30], "answer": part[30:]} for part in text_file.read_text().split("\n\n")]
    rows[1]["answer"] += "\u2028a line separator is part of its string"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows, rows[0]]) + "\n")
    flags = ("--source", "file", "--path", str(path), "--columns", "question,answer")
    made = make(tiny_model_folder, tmp_path / "made", *flags)
    assert calibration.load(made).calibration.shape == (6, 40)
    texts = splits.split_texts(calibration.Settings(source="file", path=str(path), columns=("question", "answer")))
    documents = [document.text for split in texts.documents.values() for document in split]
    assert len(documents) == len(set(documents)) == len(rows)  # the repeated row is in one split only
    assert rows[0]["question"] + "\n" + rows[0]["answer"] in documents


def test_a_file_without_blank_lines_has_one_document_a_line(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lines.txt"
    path.write_text(
        "\n\n" + text_file.read_text().strip().replace("\n\n", "\n") + "\n\n"
    )  # at the ends they say nothing
    made = make(tiny_model_folder, tmp_path / "made", "--source", "file", "--path", str(path))
    entries = json.loads((made / "info.json").read_text())["splits"]
    assert len(entries["test"]["documents"]) > 30


def test_whole_samples_are_beginnings_of_documents(tiny_model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    flags = ("--source", "file", "--path", str(text_file), "--whole")
    made = make(tiny_model_folder, tmp_path / "made", *flags)
    tokenizer = models.load_tokenizer(tiny_model_folder)
    documents = [part.strip() for part in text_file.read_text().split("\n\n")]
    titles = json.loads((made / "info.json").read_text())["splits"]["calibration"]["documents"]
    for window, title in zip(calibration.load(made).calibration, titles, strict=True):
        assert tokenizer(documents[int(title.split()[1]) - 1]).input_ids[:40] == window.tolist()


def test_rows_are_joined_as_for_wikitext(tiny_model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    lines = [" = Title = ", " ", *(f" Line {number} of the river . " for number in range(60))]
    path.write_text("".join(line + "\n" for line in lines))
    flags = ("--source", "file", "--path", str(text_file), "--test-source", "rows", "--test-path", str(path))
    made = calibration.load(make(tiny_model_folder, tmp_path / "made", *flags))
    rows = [line + "\n" if line.strip() else "" for line in lines]
    tokenizer = models.load_tokenizer(tiny_model_folder)
    expected = tokenizer("\n\n".join(rows)).input_ids
    assert made.test.flatten().tolist() == expected[: len(expected) // 128 * 128]
    assert made.test_name == "wiki.test"
    assert not list(made.folder.glob("*.jsonl"))


@pytest.mark.parametrize("source", ["file", "rows"])
def test_test_text_may_be_jsonl(tiny_model_folder: Path, text_file: Path, tmp_path: Path, source: str) -> None:
    path = tmp_path / "other.jsonl"
    rows = [f"The quiet harbour of town {number} is near the library." for number in range(60)]
    path.write_text("".join(json.dumps({"id": 3, "text": row}) + "\n" for row in rows))
    flags = ("--source", "file", "--path", str(text_file), "--test-source", source, "--test-path", str(path))
    made = calibration.load(make(tiny_model_folder, tmp_path / "made", *flags))
    expected = models.load_tokenizer(tiny_model_folder)("\n\n".join(rows)).input_ids
    assert made.test.flatten().tolist() == expected[: len(expected) // 128 * 128]


def test_test_text_may_come_from_another_file(tiny_model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    path.write_text("The quiet harbour is near the library.\n\n" * 100)
    flags = ("--source", "file", "--path", str(text_file), "--test-source", "file", "--test-path", str(path))
    made = calibration.load(make(tiny_model_folder, tmp_path / "made", *flags))
    assert models.load_tokenizer(tiny_model_folder).decode(made.test[0]) in path.read_text()


@pytest.mark.parametrize(("key", "flag", "count"), [("calibration", "samples", 250), ("reward", "reward-samples", 200)])
def test_recovery_gives_documents_to_a_split_with_too_few(
    made: Path, tiny_model_folder: Path, text_file: Path, tmp_path: Path, key: str, flag: str, count: int
) -> None:
    flags = ("--source", "file", "--path", str(text_file))
    before = json.loads((made / "info.json").read_text())["splits"]
    length = before[key]["length"]
    lent = make(tiny_model_folder, tmp_path / "made", *flags, f"--{flag}", str(count), "--recovery-samples", "100000")
    entries = json.loads((lent / "info.json").read_text())["splits"]
    assert entries[key]["windows"] == count
    assert count * length <= entries[key]["tokens_available"] < count * length + 1000, "a document too many at most"
    used = [title for entry in entries.values() for title in entry["documents"]]
    assert len(used) == len(set(used))
    assert set(before[key]["documents"]) < set(entries[key]["documents"])
    assert torch.equal(calibration.load(lent).test, calibration.load(made).test)


def test_recovery_gives_whole_documents_to_whole_samples(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    flags = ("--source", "file", "--path", str(text_file), "--whole", "--samples", "20")  # of 80 documents 12 % are 10
    made = make(tiny_model_folder, tmp_path / "made", *flags)
    assert len(set(json.loads((made / "info.json").read_text())["splits"]["calibration"]["documents"])) == 20


def test_articles_come_out_of_their_wheel(
    tiny_model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    make_wheel: Callable[[str, bytes], sources.WheelFile],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = "".join(
        f"<page><title>T{number}</title><ns>0</ns><revision><text>{text}</text></revision></page>"
        for number, text in enumerate(text_file.read_text().split("\n\n"))
    )
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{pages}</mediawiki>'
    monkeypatch.setattr(sources, "ARTICLES", make_wheel("x/dump.bz2", bz2.compress(xml.encode())))
    made = make(tiny_model_folder, tmp_path / "made")
    info = json.loads((made / "info.json").read_text())
    assert info["test_name"] == "wikipedia"
    assert info["source"]["training"] == "pypi:wqtestdata==1.0/x/dump.bz2"
    # Another training text leaves the test windows and the tasks as they are.
    flags = ("--source", "file", "--path", str(text_file), "--test-source", "articles")
    other = make(tiny_model_folder, tmp_path / "other", *flags)
    assert torch.equal(calibration.load(other).test, calibration.load(made).test)
    assert (other / "cloze.jsonl").read_bytes() == (made / "cloze.jsonl").read_bytes()


def test_damaged_artifact_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens.safetensors").write_bytes((made / "tokens.safetensors").read_bytes()[:-9])
    (tmp_path / "info.json").write_bytes((made / "info.json").read_bytes())
    with pytest.raises(WindquantError, match="delete it and run again"):
        calibration.load(tmp_path)


def test_a_data_set_is_not_tested_on_what_it_is_trained_on() -> None:
    settings = calibration.Settings(
        source="hub", dataset="a/b", subset="c", split="train",
        test_source="hub", test_dataset="a/b", test_subset="c", test_split="train",
    )  # fmt: skip
    with pytest.raises(WindquantError, match="the test text would be trained on"):
        splits.split_texts(settings)


def test_nothing_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"instruction": "Say one.", "output": null}\n{"instruction": "Say two.", "output": "Two."}\n')
    found = texts.documents(calibration.Settings(source="file", path=str(path)))
    assert [paragraph for article in found for paragraph in article.paragraphs] == ["Say one.", "Say two.\nTwo."]
