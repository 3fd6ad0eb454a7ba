"""What a person reads of a result in the terminal."""

from pathlib import Path

import pytest

from tests.result.experiment import assemble, chain
from windquant import summary


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assemble(chain())
    capsys.readouterr()
    summary.main(["results/r.json"])
    output = capsys.readouterr().out
    lines = [" ".join(word for word in line.split() if word not in "│┃|") for line in output.splitlines()]
    assert "perplexity, wikipedia 19.40 50.00" in lines
    assert "accuracy, cloze 50.0% 37.5% ± 4.0%" in lines
    assert "effective bits per weight 16 1.9950" in lines
    assert "checkpoint size (original: FP16) 0.8 MB 0.2 MB" in lines
    assert any(line.startswith("sum 0:0") for line in lines)
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in output
    assert "\x1b" not in output  # no colours in a pipe
    assert max(map(len, output.splitlines())) <= 120

    with pytest.raises(SystemExit) as caught:
        summary.main(["results/none.json"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: results/none.json: not a readable result")


def test_the_command_that_shows_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(Path.cwd() / ".venv"))
    assert summary.interface() == ".venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert summary.interface() == "open http://server:5000 in a browser"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@server:5000")
    assert summary.interface() == "open http://server:5000 in a browser"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:secret@server/db")
    assert summary.interface() == '.venv/bin/mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
