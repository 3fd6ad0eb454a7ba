"""Verdicts on two versions of an artifact: identical, equal within its kind's tolerance, different, missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from windquant.reproduce.differences import EXACT, TOLERANCES, Tolerance, Verdict, compare, tolerance


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Folders `old` and `new` with a folder results/ each."""
    for name in ("old", "new"):
        (tmp_path / name / "results").mkdir(parents=True)
    return tmp_path / "old", tmp_path / "new"


def documents(pair: tuple[Path, Path], name: str, old: Any, new: Any, allowed: Tolerance = EXACT) -> Verdict:
    for folder, content in zip(pair, (old, new), strict=True):
        (folder / name).write_text(json.dumps(content))
    return compare(pair[0] / name, pair[1] / name, allowed)


def tensors(pair: tuple[Path, Path], old: dict[str, Any], new: dict[str, Any], **metadata: str) -> Verdict:
    for folder, content, text in zip(pair, (old, new), ({}, metadata), strict=True):
        save_file(content, folder / "x.safetensors", metadata=text or None)
    return compare(pair[0] / "x.safetensors", pair[1] / "x.safetensors", Tolerance(relative=1e-4))


def test_same_bytes(pair: tuple[Path, Path]) -> None:
    assert documents(pair, "x.json", {"a": 1}, {"a": 1}) == Verdict("identical")


def test_missing(pair: tuple[Path, Path]) -> None:
    (pair[1] / "x").touch()
    assert compare(pair[0] / "x", pair[1] / "x", EXACT) == Verdict("missing")


def test_numbers_within_and_outside_of_the_tolerance(pair: tuple[Path, Path]) -> None:
    allowed = Tolerance(relative=1e-3, absolute=0.01)
    near = documents(pair, "x.json", {"a": {"b": [1, 30.0]}}, {"a": {"b": [1, 30.02]}}, allowed)
    assert near == Verdict("equal", "at most 6.7e-04 apart, relatively (allowed: 0.001 relative or 0.01 absolute)")
    far = documents(pair, "x.json", {"a": {"b": [1, 30.0]}}, {"a": {"b": [1, 30.1]}}, allowed)
    assert far == Verdict("different", "a.b[1]: 30.0 and 30.1")
    assert documents(pair, "x.json", {"a": 0.5}, {"a": 0.509}, allowed).status == "equal"
    assert documents(pair, "x.json", {"a": float("nan")}, {"a": 1.0}, allowed).status == "different"


@pytest.mark.parametrize(
    ("key", "old", "new", "status"),
    [
        ("effective_bits", 1.9998, 1.9868, "different"),
        ("protected_fraction", 0.0, 0.01, "different"),
        ("gap_wikipedia_quantized", 0.4247, 0.4120, "different"),
        ("gap_wikipedia_quantized", 0.4247, 0.4230, "equal"),
        ("zero_shot_average_quantized", 0.425, 0.438, "equal"),
        ("zero_shot", {"cloze": {"quantized": 0.40}}, {"cloze": {"quantized": 0.413}}, "equal"),
        ("zero_shot", {"cloze": {"quantized": 0.40}}, {"cloze": {"quantized": 0.42}}, "different"),
    ],
)
def test_only_accuracies_may_differ_by_a_record(
    pair: tuple[Path, Path], key: str, old: Any, new: Any, status: str
) -> None:
    assert documents(pair, "results/x.json", {key: old}, {key: new}, TOLERANCES["results"]).status == status


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ({"a": "x"}, {"a": "y"}, "a: x and y"),
        ({"a": 1}, {"a": 1, "b": 2}, "b: only in the new one"),
        ({"a": [1]}, {"a": [1, 2]}, "a: [1] and [1, 2]"),
        ({"a": None}, {"a": 1.0}, "a: None and 1.0"),
        ({"a": True}, {"a": False}, "a: True and False"),
    ],
)
def test_what_no_tolerance_covers(pair: tuple[Path, Path], old: Any, new: Any, where: str) -> None:
    assert documents(pair, "x.json", old, new, Tolerance(absolute=0.1)) == Verdict("different", where)


def test_exact_kinds_take_no_other_bytes(pair: tuple[Path, Path]) -> None:
    (pair[0] / "x.json").write_text('{"a":1}')
    (pair[1] / "x.json").write_text('{"a": 1}')
    assert compare(pair[0] / "x.json", pair[1] / "x.json", EXACT).status == "different"
    assert documents(pair, "x.json", {"a": 1.0}, {"a": 1.0 + 1e-15}) == Verdict(
        "different", "a: 1.0 and 1.000000000000001"
    )


def test_results_may_say_other_things_about_their_making(pair: tuple[Path, Path]) -> None:
    old, new = ({"perplexity": 31.0, "seconds": {"bank": seconds}} for seconds in (3, 4))
    verdict = documents(pair, "results/x.json", old, new, TOLERANCES["results"])
    assert verdict == Verdict("equal", "only what it says about its own making differs")
    assert documents(pair, "x.json", old, new, TOLERANCES["results"]).status == "different"
    for folder, seconds in zip(pair, (3, 4), strict=True):
        (folder / "results" / "x.csv").write_text(f"allocator,perplexity,seconds\nppo,31.0,{seconds}\n")
    assert compare(*(folder / "results" / "x.csv" for folder in pair), TOLERANCES["results"]).status == "equal"


def test_tensors(pair: tuple[Path, Path]) -> None:
    weight = torch.linspace(-2, 2, 32)
    codes = torch.arange(8, dtype=torch.int32)
    assert tensors(pair, {"w": weight}, {"w": weight}).status == "identical"
    assert tensors(pair, {"w": weight}, {"w": weight + 1e-4}).status == "equal", "1e-4 of the largest, 2"
    assert tensors(pair, {"w": weight}, {"w": weight + 3e-4}).status == "different"
    assert tensors(pair, {"w": weight}, {"w": weight, "v": codes}).detail == "v: only in one of them"
    assert "[32] torch.float32 and [31]" in tensors(pair, {"w": weight}, {"w": weight[1:]}).detail
    assert tensors(pair, {"w": codes}, {"w": codes + 1}).status == "different", "integers are no measurements"
    assert tensors(pair, {"w": weight}, {"w": weight}, format="2").detail == "metadata.format: only in the new one"
    (pair[0] / "x.safetensors").write_bytes(b"short")
    assert "not a readable safetensors file" in compare(*(f / "x.safetensors" for f in pair), EXACT).detail


def test_folders_name_the_file(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        (folder / "a").write_text("same")
        (folder / ".snakemake_timestamp").write_text(str(folder))
    assert compare(*pair, EXACT).status == "identical"
    (pair[1] / "b").touch()
    assert compare(*pair, EXACT) == Verdict("different", "b: only in the new one")
    (pair[0] / "b").write_text("x")
    assert compare(*pair, EXACT) == Verdict("different", "b: other bytes")


def test_every_kind_of_artifact_has_a_tolerance() -> None:
    assert tolerance("data/plans/x.json") == tolerance("data/search/x_ppo.safetensors") == EXACT
    assert tolerance("data/statistics/x.safetensors") == Tolerance(relative=1e-4)
    assert tolerance("results/x.json") == TOLERANCES["results"]
    assert tolerance("data/experiments/x.json") is None
