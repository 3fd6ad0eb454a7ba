"""`python -m windquant verify`: a result made again elsewhere, and the table of what is the same."""

import json
import shutil
import sys
from pathlib import Path

from tests.workflow.commands import refused, run
from tests.workflow.conftest import BITS, GREEDY, MODEL
from windquant import manifest
from windquant.manifest import Manifest
from windquant.reproduce import verify

PERPLEXITY = f"data/evaluation/{MODEL}_{BITS}bits.greedy.quantized.perplexity.json"
PLAN = f"data/plans/{MODEL}_{BITS}bits.greedy.json"
BANK = f"data/bank/{MODEL}.safetensors"


def verdicts(output: str) -> dict[str, str]:
    """Artifact -> verdict, of the printed table."""
    rows = output.partition("verdict\n")[2].splitlines()
    return dict(row.split()[:2] for row in rows if row.startswith(("data/", "resources/", "results/")))


def test_result_is_made_again_and_compared(finished: Path) -> None:
    before = manifest.sha256(finished / "data"), manifest.sha256(finished / "resources")
    command = [sys.executable, "-m", "windquant", "verify", "--keep", "--cores", "1", GREEDY]
    done = run(finished, *command, MLFLOW_TRACKING_URI="sqlite:///team.db")
    assert done.returncode == 0, done.stdout[-3000:]
    found = verdicts(done.stdout)
    assert found.pop(f"resources/models/{MODEL}") == "reused"
    assert found.pop(GREEDY) == "equal"
    assert {PERPLEXITY, PLAN, BANK, f"data/checkpoints/{MODEL}_{BITS}bits.greedy/quantized"} < set(found)
    assert set(found.values()) == {"identical"}
    assert "data/ is not compared with its remote" in done.stdout, "this clone is not under git"
    assert done.stdout.rstrip().endswith("reproduced")
    assert (manifest.sha256(finished / "data"), manifest.sha256(finished / "resources")) == before
    assert not (finished / "team.db").exists()
    check_what_differs(finished)


def check_what_differs(finished: Path) -> None:
    """The same scratch folder against other data: it takes a minute to make."""
    evaluation = json.loads((finished / PERPLEXITY).read_text())
    name = next(iter(evaluation))
    text = (finished / PERPLEXITY).read_text()
    number = json.dumps(evaluation[name]["perplexity"])
    rewrite(finished / PERPLEXITY, text.replace(number, str(float(number) * 1.01)))
    (finished / PLAN).unlink()
    (finished / BANK).write_bytes((finished / BANK).read_bytes()[:-1])
    table = verify.compare(finished, finished / verify.SCRATCH, [])
    assert table[PERPLEXITY].status == "different"
    assert number in table[PERPLEXITY].detail
    assert table[PLAN].status == "missing"
    assert table[BANK].status == "different"
    assert table[BANK].detail.startswith("damaged, or changed since it was made")
    assert table[f"data/statistics/{MODEL}.safetensors"].status == "identical"


def rewrite(artifact: Path, text: str) -> None:
    """Another content, with a manifest that agrees."""
    document = Manifest.load(artifact)
    artifact.write_text(text)
    document.output["sha256"] = manifest.sha256(artifact)
    document.save(artifact)


def test_nothing_to_compare_with(finished: Path, tmp_path: Path) -> None:
    message = refused(finished, "verify", "results/nothing_2.0bits.json")
    assert "results/nothing_2.0bits.json: not here; `make pull` gets it, or `snakemake" in message
    shutil.copytree(finished / "windquant", tmp_path / "windquant")
    assert "results: holds no result to compare with" in refused(tmp_path, "verify")
