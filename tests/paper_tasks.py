"""Records of the paper's zero-shot tasks, in the columns of the Hub's data sets."""

import json
from pathlib import Path
from typing import Any

RECORDS: dict[str, dict[str, Any]] = {
    "arc_easy.test": {
        "id": "1",
        "question": "Which is a river?",
        "choices": {"text": ["a bridge", "a stream", "a castle"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "arc_challenge.test": {
        "id": "2",
        "question": "Which is old?",
        "choices": {"text": ["the engine", "the forest"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "boolq.validation": {"passage": "The river is wide.", "question": "is the river wide", "idx": 0, "label": 1},
    "piqa.validation": {"goal": "Cross a river", "sol1": "use a bridge", "sol2": "use a letter", "label": 0},
    "hellaswag.validation": {
        "ind": 0,
        "activity_label": "Crossing",
        "ctx_a": "A man sees a river. He",
        "ctx_b": "",
        "ctx": "A man sees a river. He",
        "endings": ["swims.", "reads [title] a letter.", "paints.", "sleeps."],
        "label": "0",
        "split": "val",
    },
    "winogrande.validation": {
        "sentence": "The bridge was near the river so _ was wet.",
        "option1": "the bridge",
        "option2": "the letter",
        "answer": "1",
    },
}


def write(folder: Path, copies: int) -> list[str]:
    """Files of all tasks, each with the same record several times; their names."""
    for name, record in RECORDS.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * copies)
    return [name.partition(".")[0] for name in RECORDS]
