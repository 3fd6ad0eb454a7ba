"""`python -m windquant why`: how an artifact came about, and whether it is current."""

import re
import shutil
from pathlib import Path

from tests.workflow.commands import changed, hidden, refused, windquant
from tests.workflow.conftest import BITS, LOCAL, MODEL, RESULT
from windquant.manifest import Manifest

BANK = f"data/bank/{MODEL}.safetensors"
PLAN = f"data/plans/{MODEL}_{BITS}bits.ppo.json"


def test_how_it_came_about(finished: Path) -> None:
    lines = windquant(finished, "why", BANK).splitlines()
    document = Manifest.load(finished / BANK)
    told = dict(line.strip().split(maxsplit=1) for line in lines[1 : lines.index("made from")])
    assert lines[0] == BANK
    assert told["step"] == "bank"
    assert told["settings"] == "chunk=16 protected=0.0 treatment=trellis order=saliency window=12 jobs=1 part=0"
    assert told["seed"] == "0"
    assert told["sha256"] == document.output["sha256"]
    assert told["started"] == document.started
    assert told["command"].startswith(f"python -m windquant.bank --model resources/models/{MODEL} --statistics data/")
    assert lines[-1] == "current: configuration, code and inputs are what they were"
    tree = lines[lines.index("made from") + 1 : -2]
    assert [line.split(":")[0] for line in tree] == [
        "  model",
        "    nothing of this project",
        "  statistics",
        "    calibration",
    ]
    assert (
        f"data/calibration/{MODEL}  {Manifest.load(finished / f'data/calibration/{MODEL}').output['sha256'][:12]}"
        in tree[-1]
    )
    assert tree[-1].endswith("; from model above")
    assert windquant(finished, "why", f"{BANK}.manifest.json").splitlines() == lines
    assert windquant(finished, "why", str(finished / BANK)).splitlines() == lines


def test_what_has_changed_since(finished: Path) -> None:
    def end(artifact: str) -> list[str]:
        lines = windquant(finished, "why", artifact).splitlines()
        return lines[lines.index("not current") + 1 :]

    config = finished / "config" / "config.yaml"
    with changed(config, config.read_text().replace("steps: 2", "steps: 3")):
        quantized, result, plan = end(RESULT)
        assert quantized == f"  data/checkpoints/{MODEL}_{BITS}bits.ppo/quantized: steps was 2, is 3"
        assert re.fullmatch(f"  {RESULT}: config-sha256 was [0-9a-f]{{12}}, is [0-9a-f]{{12}}", result)
        assert plan == "would run: recovery, perplexity, zero_shot, result"
        assert "current: configuration" in windquant(finished, "why", PLAN)
    module = finished / "windquant" / "bank.py"
    with changed(module, f"{module.read_text()}\nUNUSED = 1\n"):
        code = Manifest.load(finished / BANK).code
        assert end(BANK)[0].startswith(f"  {BANK}: code was {code}, is ")
        assert end(BANK)[-1] == "would run: bank"
    text = finished / LOCAL / "text.txt"
    with changed(text, text.read_text() + "\nOne more.\n"):
        cause, *_, plan = end(RESULT)
        assert cause == f"  data/calibration/{MODEL}: Updated input files: {LOCAL}/text.txt"
        assert plan.startswith("would run: calibration, ")
        assert ", perplexity (2), " in plan
    with hidden(finished / PLAN):
        assert f"  plan: {PLAN} (no longer here)" in windquant(finished, "why", RESULT)


def test_damage_and_foreign_artifacts(finished: Path) -> None:
    with changed(finished / PLAN, "{}"):
        assert "damaged: its content is not what its manifest says" in windquant(finished, "why", PLAN)
    for name in ("", ".manifest.json"):
        shutil.copy(f"{finished / BANK}{name}", f"{finished}/data/bank/other.safetensors{name}")
    output = windquant(finished, "why", "data/bank/other.safetensors")
    assert "not the workflow's: unknown model other" in output
    for path in finished.glob("data/bank/other.*"):
        path.unlink()


def test_what_cannot_be_told(finished: Path) -> None:
    assert f"data/bank/tin: no such file or folder; there is {BANK}" in refused(finished, "why", "data/bank/tin")
    assert "config/config.yaml: has no manifest beside it" in refused(finished, "why", "config/config.yaml")
    assert "not in " in refused(finished, "why", "/etc/passwd")
    with changed(finished / f"{BANK}.manifest.json", "{"):
        assert "tiny.safetensors.manifest.json: not a readable manifest" in refused(finished, "why", BANK)
