"""Your own model in one line: quantize it and get a checkpoint with its model card.

    python -m windquant quantize Qwen/Qwen3-0.6B --bits 2.0 --out qwen3-2bit
    python -m windquant quantize ./my-model --bits 2.5 --out my-model-2.5bit --text my-texts.txt

The same Snakemake workflow as everything else, with a configuration made for this one model, in a working folder beside
the output. The same line again goes on where an interrupted one was; another budget reuses what does not depend on it.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from windquant import atomic, configuration, manifest, naming, result_file, shape, summary, validation
from windquant.errors import WindquantError, did_you_mean
from windquant.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
RESULT = "result.json"  # in the output
NAMES = ".windquant"  # in the output: the names of what this command has put there
PATHS = ("path", "test_path", "data_dir")  # keys of the configuration
SMALL = 1024  # input channels below which a chunk of 256 columns would be a large part of a weight
#: What the default model is measured with, texts and tasks that need no Hub; fewer samples, because other vocabularies
#: make fewer tokens of the articles.
WITHOUT_HUB: dict[str, dict[str, Any]] = {
    "calibration": {"source": "articles", "whole": False, "samples": 192, "test_source": "same"},
    "evaluation": {"tasks": ["cloze", "next_sentence"], "windows": 16},
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m windquant quantize",
        description="Quantize a model of your own: a checkpoint with its model card, in one line.",
    )
    parser.add_argument("model", help="repository on the Hub, local folder, GGUF file, or a name in config/config.yaml")
    parser.add_argument("--bits", required=True, help="budget: effective bits per weight, all metadata included")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--text", help="what to calibrate and measure on: a text file, `articles` or `hub`")
    parser.add_argument("--allocator", default="ppo", help=f"one of {', '.join(naming.ALLOCATORS)} [ppo]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. recovery.steps=200; see config/README.md"
    )
    parser.add_argument("--work", type=Path, help="working folder [<out>.work]")
    parser.add_argument("--cores", default="all", help="for Snakemake [all]")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the steps; write only the configuration, into the working folder"
    )
    given = parser.parse_args(arguments)
    quantize(
        given.model, given.bits, given.out, given.text, given.allocator, given.set, given.work, given.cores,
        given.dry_run,
    )  # fmt: skip


def quantize(
    model: str,
    bits: str,
    out: Path,
    text: str | None = None,
    allocator: str = "ppo",
    changes: Sequence[str] = (),
    work: Path | None = None,
    cores: str = "all",
    dry_run: bool = False,
) -> None:
    """Make `out`. Raises WindquantError, before any work starts, for whatever can be known to be wrong by then."""
    if not (ROOT / "Snakefile").is_file():
        raise WindquantError(
            f"{ROOT}: holds no workflow; run this in a clone of the project, installed with `make env`"
        )
    number = naming.check_bits(_number(bits))
    naming.check_allocator(allocator)
    name, entry = describe(model, text)
    for change in changes:
        apply(entry, change)
    schema = configuration.load(ROOT / "workflow" / "schemas" / "config.schema.yaml")
    shared = configuration.load(ROOT / "config" / "config.yaml")
    document = validation.validate(anchored(shared) | {"models": {name: anchored(entry)}}, schema)
    check_output(out, work)
    out = out.resolve()  # "." has no name
    work = work or out.with_name(f"{out.name}.work")
    target = Path("results") / naming.result_name(name, number, allocator)
    checkpoint = work / "data" / "checkpoints" / f"{name}_{number}bits.{allocator}" / "quantized"
    (work / "config").mkdir(parents=True, exist_ok=True)
    atomic.write_text(work / "config" / "config.yaml", yaml.safe_dump(document, sort_keys=False))
    run_workflow(work, target, cores, dry_run)
    if not dry_run:
        deliver(checkpoint, work / target, out)
        summary.show(work / target)
        size = sum(path.stat().st_size for path in out.rglob("*")) / 1e6
        print(f"\n{out}: {size:,.1f} MB, with its model card in README.md. Try it:")
        print(f'  python -m windquant generate {out} "Once upon a time"')
        print(f"{work} holds what the steps made: keep it for another budget, or delete it.")


def describe(model: str, text: str | None) -> tuple[str, dict[str, Any]]:
    """Name and configuration entry of a model that a person names; WindquantError if it is nothing known."""
    ready = configuration.load(ROOT / "config" / "config.yaml")["models"]
    path = Path(model).expanduser()
    if path.exists():
        entry: dict[str, Any] = {"source": "folder", "path": str(path.resolve())}
        name = path.resolve().name.removesuffix(".gguf")
        if path.is_dir() and not (path / "config.json").is_file():
            raise WindquantError(f"{model}: no config.json; give a Hugging Face folder with *.safetensors")
    elif model in ready:
        name, entry = model, dict(ready[model])
    elif HUB_NAME.fullmatch(model):
        entry = {"source": "hub", "id": model}
        name = model.rpartition("/")[2]
    else:
        hint = did_you_mean(model, ready)
        raise WindquantError(
            f"{model}: neither a folder or file here nor a repository on the Hub (owner/name){hint or ';'} ready are "
            f"{', '.join(ready)}"
        )
    if text is None and entry["source"] == "folder":
        entry = {**WITHOUT_HUB, **entry}  # an entry of the configuration may have texts of its own
    elif text == "articles":
        entry |= WITHOUT_HUB
    elif text == "hub":  # what all models share: a ready one may have texts of its own
        entry = {key: value for key, value in entry.items() if key not in WITHOUT_HUB}
    elif text is not None:
        file = Path(text).expanduser()
        if not file.is_file():
            raise WindquantError(f"--text {text}: no such file; give a text file, articles or hub")
        entry["calibration"] = {"source": "file", "path": str(file.resolve()), "whole": False, "test_source": "same"}
        entry["evaluation"] = {"tasks": [], "windows": 16}
    if entry["source"] == "folder":
        entry |= units(hidden_size(path))
    return re.sub(r"[^a-z0-9.+-]+", "-", name.lower()).strip(".+-") or "model", entry  # names of files, in a shell too


def units(hidden: int) -> dict[str, Any]:
    """Settings of a local model with `hidden` channels; 0: unknown."""
    if not 0 < hidden < SMALL:
        return {}
    return {"units": {"chunk": max(64, min(256, hidden // 3 // 64 * 64)), "protected": 0.0}}  # a third, in 64s


def anchored(settings: Mapping[str, Any], folder: Path = ROOT) -> dict[str, Any]:
    """The settings with the paths in them absolute: in the project's configuration they start at its folder."""
    return {
        key: anchored(value, folder)
        if isinstance(value, Mapping)
        else str(folder / Path(value).expanduser())
        if key in PATHS and isinstance(value, str) and value
        else value
        for key, value in settings.items()
    }


def hidden_size(path: Path) -> int:
    """Channels of a model, a Hugging Face folder or a GGUF file; 0 where it does not tell."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, WindquantError):
        if path.is_dir():
            return shape.read(path / "config.json").hidden
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        architecture = fields["general.architecture"].contents()
        return int(fields[f"{architecture}.embedding_length"].contents())
    return 0


def apply(entry: dict[str, Any], change: str) -> None:
    """Set "section.key=value" in a model's entry, a path from the current folder; the schema checks it afterwards."""
    where, sign, value = change.partition("=")
    section, dot, key = where.partition(".")
    if not sign or not section:
        raise WindquantError(f"--set {change}: give KEY=VALUE, e.g. recovery.steps=200; see config/README.md")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise WindquantError(f"--set {change}: {value} is not YAML; a text needs quotes, {where}='\"...\"'") from error
    if dot:
        own = entry.get(section)
        entry[section] = {**(own if isinstance(own, Mapping) else {}), **anchored({key: parsed}, Path.cwd())}
    else:
        entry |= anchored({section: parsed}, Path.cwd())


def check_output(out: Path, work: Path | None) -> None:
    """WindquantError if replacing `out` would remove something that this command did not make."""
    if work is not None and work.resolve().is_relative_to(out.resolve()):
        raise WindquantError(f"--work {work}: in the folder that --out replaces; choose another one")
    if not out.exists():
        return
    if not out.is_dir():
        raise WindquantError(f"--out {out}: is a file; give the name of a folder")
    made = {NAMES, *(out / NAMES).read_text().splitlines()} if (out / NAMES).is_file() else set()
    if others := sorted({path.name for path in out.iterdir()} - made):
        raise WindquantError(
            f"--out {out}: would be replaced, and {others[0]} in it was not made by this command; choose another folder"
        )


def run_workflow(work: Path, target: Path, cores: str, dry_run: bool) -> None:
    """Snakemake in the working folder; WindquantError with the step's own reason if it fails."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--workflow-profile", str(ROOT / "workflow" / "profiles" / "default"), "--cores", cores]
    command += ["--dry-run"] * dry_run
    started = time.time()
    done = subprocess.run([*command, "--", str(target)], cwd=work)
    if done.returncode:
        raise WindquantError(f"{reason(work, started)}; the same line again goes on from the last finished step")


def reason(work: Path, since: float) -> str:
    """The last error in the logs that steps have written to since then."""
    logs = [path for path in work.glob("logs/*/*.log") if path.stat().st_mtime >= since]
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        for line in reversed(path.read_text(errors="replace").splitlines()):
            if line.startswith("error: "):
                return line.removeprefix("error: ")
    return "the workflow has stopped for the reason above"


def deliver(checkpoint: Path, path: Path, out: Path) -> None:
    """Copy the checkpoint to `out`, whole or not at all; its card gets what was measured."""
    with atomic.output(out) as partial:
        shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns(manifest.SNAKEMAKE_MARK))
        card = partial / "README.md"
        found = measured(result_file.load(path), Manifest.load(path).notes)
        card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{found}", encoding="utf-8")
        shutil.copyfile(path, partial / RESULT)
        (partial / NAMES).write_text("".join(f"{file.name}\n" for file in sorted(partial.iterdir())))


def measured(entry: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """What was measured of the model, as a section of its card."""
    lines = [("", "original", "quantized"), ("---", "--:", "--:"), *summary.rows(entry, notes)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## Measured\n\n{table}\n\n`{RESULT}` has it all.\n"


def _number(text: str) -> str:
    try:
        float(text)
    except ValueError:
        raise WindquantError(f"--bits {text}: not a number; give e.g. 2.0") from None
    return text
