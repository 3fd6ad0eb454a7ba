"""One row of the table: run a recipe, measure what came out.

    python -m benchmarks.peers.row hqq-2-64 --model DIR --calibration DIR --output ROW.json

A peer that cannot be installed, crashes or takes too long leaves a row with the reason.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import environment
from benchmarks.peers.environment import PeerError
from benchmarks.peers.recipes import RECIPES, Recipe
from windquant import calibration, models
from windquant.evaluation import zero_shot
from windquant.evaluation.perplexity import Score, perplexity, spread

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
WINDOWS = 16  # of the held-out articles, as in the main job, and of WikiText-2
TASKS = ("arc_easy", "arc_challenge", "boolq", "piqa", "hellaswag", "winogrande")  # the paper's
SAMPLES = 100  # of each task


@dataclass(frozen=True)
class Texts:
    """What a checkpoint is measured on."""

    articles: Path  # calibration artifact
    wikitext2: Path | None = None  # calibration artifact whose test text is WikiText-2
    tasks: Path | None = None  # folder of <task>.<split>.jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES, help="of the recipe")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, in one safetensors file")
    parser.add_argument("--calibration", type=Path, required=True, help="artifact of the calibration step")
    parser.add_argument("--wikitext2", type=Path, help="calibration artifact whose test text is WikiText-2")
    parser.add_argument("--tasks", type=Path, help="folder of <task>.<split>.jsonl of the paper's tasks")
    parser.add_argument("--environments", type=Path, default=Path(".cache/peers"), help="where these are made")
    parser.add_argument("--hours", type=float, help="after which a peer is stopped (2; with --patient 12)")
    parser.add_argument("--patient", action="store_true", help="run what takes hours too")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    recipe = RECIPES[given.name]
    if recipe.hours and not given.patient:
        row = described(recipe) | {"reason": f"not run: takes {recipe.hours}"}
    else:
        texts = Texts(given.calibration, given.wikitext2, given.tasks)
        hours = given.hours or (12 if given.patient else 2)
        row = measure(recipe, given.model, texts, given.environments, hours)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row), file=sys.stderr)


def measure(
    recipe: Recipe,
    model: Path,
    texts: Texts,
    environments: Path,
    hours: float = 2,
    locks: Path = environment.LOCKS,
) -> Row:
    """The row of a recipe. Figures are None, and `reason` says why, where there are none."""
    row = described(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        try:
            run(recipe, model, texts.articles / "tokens.safetensors", folder, environments, hours, locks)
        except PeerError as error:
            return row | {"reason": str(error)}
        made = json.loads((folder / "peer.json").read_text())
        row |= {key: made[key] for key in ("seconds", "peak_memory_bytes")}
        row["bits"] = 8 * made["bytes"] / made["weights"]
        return row | evaluated(folder, texts)


def described(recipe: Recipe) -> Row:
    """The row of a recipe without figures."""
    none = ("bits", "perplexity", "standard_error", "wikitext2", "accuracy", "seconds", "peak_memory_bytes", "reason")
    return {"peer": recipe.peer, "recipe": recipe.recipe, **dict.fromkeys(none), "note": recipe.note or None}


def run(recipe: Recipe, model: Path, tokens: Path, output: Path, environments: Path, hours: float, locks: Path) -> None:
    """Run the recipe's script in its environment; PeerError if that fails or takes longer."""
    python = Path(sys.executable)
    if recipe.environment is not None:
        python = environment.interpreter(locks / f"{recipe.environment}.txt", environments.resolve())
    command = [
        str(python), "-m", f"benchmarks.peers.with_{recipe.script}", "--model", str(model), "--tokens", str(tokens),
        "--options", json.dumps(recipe.options), "--output", str(output),
    ]  # fmt: skip
    # A bin folder for the compilers that some peers call; no Hub, whatever they try.
    paths = os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])
    variables = {**os.environ, "PATH": paths, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=variables, stderr=subprocess.PIPE, text=True, timeout=hours * 3600)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"stopped after {hours:g} hours") from error
    if done.returncode:
        sys.stderr.write(done.stderr)
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise PeerError(f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}")


def evaluated(checkpoint: Path, texts: Texts) -> Row:
    """Perplexities of a checkpoint that transformers loads, and its mean accuracy; only those for which texts exist."""
    model = models.load_for(checkpoint)

    def score(text: Path) -> Score:
        return perplexity(model, spread(calibration.load(text).test, WINDOWS))

    found = score(texts.articles)
    row: Row = {"perplexity": found.perplexity, "standard_error": found.standard_error}
    if texts.wikitext2 is not None:
        row["wikitext2"] = score(texts.wikitext2).perplexity
    if texts.tasks is not None:
        files = {name: zero_shot.data_files(name, texts.articles, str(texts.tasks)) for name in TASKS}
        with tempfile.TemporaryDirectory() as scratch:
            tasks = zero_shot.load_tasks(files, Path(scratch))
            results = zero_shot.evaluate(model, models.load_tokenizer(checkpoint), tasks, SAMPLES)
        row["accuracy"] = sum(zero_shot.score(results, name, "acc")["accuracy"] for name in TASKS) / len(TASKS)
    return row


if __name__ == "__main__":
    main()
