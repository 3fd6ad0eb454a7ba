"""`python -m windquant`: inspect, generate, and what they say of bad input."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.making import Made
from windquant.__main__ import COMMANDS, main
from windquant.checkpoint.inspection import table


def test_inspect(whole: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(whole.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("effective bits") and f"{whole.measured.effective_bits:.4f}" in line for line in lines)
    assert any(f"{(whole.folder / 'model.safetensors').stat().st_size:,} bytes" in line for line in lines)
    layers = next(place for place, line in enumerate(lines) if line.startswith("layer "))
    assert lines[layers].split()[1:4] == ["q_proj", "k_proj", "v_proj"]
    assert [line.split()[0] for line in lines[layers + 1 : layers + 4]] == ["0", "1", "all"]
    assert lines[layers + 3].split()[-1] == f"{whole.measured.effective_bits:.2f}"
    kinds = next(place for place, line in enumerate(lines) if line.startswith("kind "))
    assert "trellis-1.5" in lines[kinds]
    shares = [float(cell.rstrip("%")) for cell in lines[-1].split()[1:]]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_a_reader_that_has_seen_enough_is_no_error(whole: Made) -> None:
    """As with `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "windquant", "inspect", str(whole.folder)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_generate_continues_the_text(whole: Made, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for flags in ([], [], ["--temperature", "1", "--seed", "1"]):
        assert main(["generate", str(whole.folder), "w7 w9", "--tokens", "5", *flags]) == 0
        texts.append(capsys.readouterr().out)
        assert texts[-1].startswith("w7 w9")
    assert texts[0] == texts[1] != texts[2]


def test_generate_whatever_the_tokenizer_and_the_generation_say(
    whole: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "other"))
    for name, change in (
        ("tokenizer_config.json", {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}),
        ("generation_config.json", {"num_beams": 4}),
    ):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | change))
    texts = []
    for one in (whole.folder, folder):
        assert main(["generate", str(one), "w7 w9", "--tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_generate_ends_where_the_model_does(whole: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """All tiny models have 128 positions."""
    assert main(["generate", str(whole.folder), "w7 " * 126, "--tokens", "5"]) == 0
    assert len(capsys.readouterr().out.split()) == 128
    assert main(["generate", str(whole.folder), "w7 " * 128]) == 2
    assert "the text has 128 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(errno.ENOSPC, "", "x/y"), 2, "error: x/y: No space left on device; make room and run again"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr("windquant.doctor.main", stopped)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["inspect", "{nowhere}"], "config.json: missing"),
        (["inspect", "{source}"], "not the configuration of a windquant checkpoint"),
        (["generate", "{nowhere}", "w1"], "no such folder"),
        (["generate", "{folder}", "w1", "--tokens", "0"], "--tokens"),
        (["generate", "{folder}", "w1", "--temperature", "nan"], "--temperature"),
        (["generate", "{folder}", "w1", "--seed", "-1"], "--seed"),
        (["generate", "{folder}", ""], "no tokens"),
    ],
)
def test_bad_input_is_one_line(
    whole: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    places = {"nowhere": tmp_path / "nowhere", "source": whole.source, "folder": whole.folder}
    assert main([argument.format(**places) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert word in lines[0]


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["what"]) == 2
    text = capsys.readouterr().err
    assert all(text.count(f"\n  {name} ") == 2 for name in COMMANDS)
    done = subprocess.run([sys.executable, "-m", "windquant", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


def test_table() -> None:
    assert table([["a", "bits"], ["long", "2"]]) == "a     bits\nlong     2"
