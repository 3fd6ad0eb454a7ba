"""The plan's file: written, read, compared; refused where it is not one."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from windquant.errors import WindquantError
from windquant.packed import Format
from windquant.plan import Plan, Units

PLAN = Plan(
    model="tiny",
    allocator="greedy",
    target_bits=2.5,
    effective_bits=2.4921875,
    bytes=1234,
    weights=3961,
    seed=7,
    actions={"model.layers.1.b": ["scalar-2", "skip"], "model.layers.0.a": ["trellis-2", "scalar-2"]},
    predicted_loss=0.1 + 0.2,
    fallback=True,
    search={"measured": [0.5, 0.25], "steps": 3},
    units=Units(chunk=32, protected=0.03, window=8, order="natural", dtype="bfloat16"),
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    found = Plan.load(path)
    assert found == PLAN
    assert list(found.actions) == list(PLAN.actions), "in the model's order"
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_person_can_compare_two_plans(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "one.json")
    other = dataclasses.replace(PLAN, actions={**PLAN.actions, "model.layers.0.a": ["trellis-2", "scalar-4"]})
    other.save(tmp_path / "other.json")
    one, two = ((tmp_path / name).read_text().splitlines() for name in ("one.json", "other.json"))
    changed = [
        (mine.strip(' ,"'), theirs.strip(' ,"')) for mine, theirs in zip(one, two, strict=True) if mine != theirs
    ]
    assert changed == [("scalar-2", "scalar-4")]


def test_units_give_the_format() -> None:
    assert PLAN.units.format() == Format(32, 0.03, 8, torch.bfloat16)


def damaged(**changes: object) -> str:
    document = {"format": 1, **dataclasses.asdict(PLAN)} | changes
    return json.dumps({key: value for key, value in document.items() if value is not None})


@pytest.mark.parametrize(
    "content",
    [
        "",
        damaged()[:-20],
        "[]",
        '"plan"',
        "{}",
        damaged(format=2),
        damaged(format=None),
        damaged(actions=None),
        damaged(units=None),
        damaged(units=[]),
        damaged(units={"chunk": 64, "colour": "blue"}),
        damaged(colour="blue"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(WindquantError, match=r"plan\.json: .*delete it and run again"):
        Plan.load(path)


def test_a_missing_plan_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WindquantError, match=r"plan\.json: "):
        Plan.load(tmp_path / "plan.json")


def test_another_format_names_both_versions(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(damaged(format=2))
    with pytest.raises(WindquantError, match="plan format 2, this version reads 1"):
        Plan.load(tmp_path / "plan.json")
