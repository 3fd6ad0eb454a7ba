"""Our rows, from results of the workflow, in the form of the peers'.

python -m benchmarks.peers.ours results/smollm2-135m_2.0bits.json --output benchmarks/peers/ours.json
python -m benchmarks.peers.ours ... --wikitext2 DIR --tasks DIR    # measures the results' checkpoints there too
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.peers.row import Row, Texts, evaluated
from windquant import naming
from windquant.manifest import Manifest

STAGES = {"before_recovery": "before recovery", "quantized": "recovered"}
#: Steps that make a checkpoint; the others measure it.
STEPS = ("statistics", "bank", "search", "allocation", "quantize", "recovery")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results/*.json")
    parser.add_argument("--wikitext2", type=Path, help="calibration artifact whose test text is WikiText-2")
    parser.add_argument("--tasks", type=Path, help="folder of <task>.<split>.jsonl of the paper's tasks")
    # What these two need
    parser.add_argument("--calibration", type=Path, help="artifact of the calibration step")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    results = [json.loads(path.read_text()) for path in given.results]
    rows = [row for path, result in zip(given.results, results, strict=True) for row in of_result(path, result)]
    original = next(iter(results[0]["perplexity"].values()))["original"]
    rows.insert(0, {"peer": "original", "recipe": "", "bits": 16.0, "perplexity": original})
    if given.wikitext2 or given.tasks:
        texts = Texts(given.calibration, given.wikitext2, given.tasks)
        for row in rows:
            folder = given.model if row["peer"] == "original" else Path(row["checkpoint"])
            found = evaluated(folder, texts)
            row |= {key: found[key] for key in ("wikitext2", "accuracy") if key in found}
    given.output.write_text(json.dumps(rows, indent=1) + "\n")


def of_result(path: Path, result: dict[str, Any]) -> list[Row]:
    """A row before recovery and one after it. SystemExit for a name that the workflow does not give."""
    variant = naming.variant_of(path)  # the result's own allocator is "ppo" for ppo-chunk32 too
    if variant is None:
        raise SystemExit(f"{path}: no name of a result of the workflow; give one of results/")
    measured = next(iter(result["perplexity"].values()))
    made_from = Manifest.load(path).inputs
    rows = []
    for stage, text in STAGES.items():
        steps = [step for step in STEPS if step != "recovery" or stage == "quantized"]
        memory = result["peak_memory_bytes"]
        rows.append(
            {
                "peer": "windquant",
                "recipe": f"{result['target_bits']:g} bits, {variant.name}, {text}",
                "bits": result["effective_bits"],
                "perplexity": measured[stage],
                "seconds": sum(result["seconds"].get(step, 0) for step in steps),
                "peak_memory_bytes": max(memory[step]["host"] for step in steps if step in memory),
                "checkpoint": made_from[stage]["path"],
            }
        )
    return rows


if __name__ == "__main__":
    main()
