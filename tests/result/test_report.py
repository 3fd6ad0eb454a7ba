"""The report of results that differ in more than their budget."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.result.experiment import assemble, chain, checkpoint, make
from windquant import step
from windquant.plan import Plan
from windquant.report import __main__ as report, gather, model_charts, page

OTHER = {"original": 12.0, "before_recovery": 90.0, "quantized": 30.25}
PIQA = {"piqa": {"original": 0.8, "quantized": 0.7, "stderr": 0.05, "samples": 50}}


@pytest.fixture
def entry() -> dict[str, Any]:
    return assemble(chain("ppo", 50.0))


def save(name: str, entry: dict[str, Any], **changes: Any) -> str:
    path = Path("results") / name
    path.write_text(json.dumps(entry | changes))
    return str(path)


def written(*results: str) -> str:
    argv = ["--output", "results/report.html", "--results", *results]
    step.main("report", report.run, report.Settings, ("results+", "peers?"), argv=argv, light=True)
    return Path("results/report.html").read_text()


def test_results_on_other_texts_and_tasks(entry: dict[str, Any]) -> None:
    """As after a change of calibration.test_source, with one budget made again."""
    same = save("m_2.0bits.json", entry)
    changed = {"perplexity": {"wikitext-2-raw-v1": OTHER}, "zero_shot": PIQA}
    other = save(
        "m_2.5bits.json", entry, **changed, target_bits=2.5, zero_shot_average={"original": 0.8, "quantized": 0.7}
    )
    none = {"zero_shot": {}, "zero_shot_average": {"original": None, "quantized": None}}
    without = save("m_3.0bits.json", entry, **none, target_bits=3.0)
    text = written(same, other, without)
    for name in ("wikipedia", "wikitext-2-raw-v1"):
        assert text.count(f"<h3>Perplexity against effective bits: {name}</h3>") == 1
    assert text.count("<h3>Accuracy against effective bits</h3>") == 2, "means of other tasks are no comparison"
    head, original, *rows = page.overview(gather.experiments([Path(path) for path in (same, other, without)]))
    assert head[2:-1] == (
        "perplexity, wikipedia", "perplexity, wikitext-2-raw-v1", "accuracy, cloze and next_sentence", "accuracy, piqa"
    )  # fmt: skip
    assert original[2:-1] == ("19.40", "12.00", "55.0%", "80.0%")
    assert [row[2:-1] for row in rows] == [
        ("50.00", "", "42.5%", ""), ("", "30.25", "", "70.0%"), ("50.00", "", "", "")
    ]  # fmt: skip


def test_what_was_made_anew_since_is_not_shown_as_the_results_own(entry: dict[str, Any]) -> None:
    (found,) = gather.experiments([Path("results/r.json")])
    assert "quantized" in found.inputs
    make("recovery", "ppo.after", checkpoint(9, curve=[1.0, 0.5]), checkpoint="ppo.before")
    (found,) = gather.experiments([Path("results/r.json")])
    assert found.plan is not None
    assert "quantized" not in found.inputs


def test_changes_and_seeds_are_told_apart(entry: dict[str, Any]) -> None:
    names = {"": 2.0, ".ppo-chunk64": 2.0, ".ppo-1": 2.0}
    paths = [save(f"m_{bits}bits{name}.json", entry) for name, bits in names.items()]
    paths += [save("m_2.5bits.json", entry, target_bits=2.5), save("result.json", entry, target_bits=3.0)]
    text = written(*paths)
    for variant in ("ppo", "ppo-chunk64", "ppo-1"):
        assert f">m at 2 bits, {variant}</h2>" in text
        assert f"<td>2 bits, {variant}</td>" in text
        assert f"{variant}, 1.9950 bits: perplexity 50.00" in text
    assert ">m at 3 bits, ppo</h2>" in text
    picture = text.partition("<h3>Perplexity against")[2].partition("</figure>")[0]
    lines = [part for part in picture.split("<path") if 'class="line ' in part]
    assert len(lines) == 1, "the budgets of PPO, and nothing else"
    assert lines[0].count("L") == 2
    legend = picture.partition('class="legend"')[2].partition("</p>")[0]
    assert len({part.split('"')[0] for part in legend.split('class="mark ')[1:]}) == 3


def gaps(name: str, entry: dict[str, Any], predicted: float, reward: float | None, *after: float) -> gather.Experiment:
    """A result with these loss gaps on the first text, before recovery and after it."""
    plan, quantized = Path(f"{name}.plan.json"), Path(f"{name}.quantized")
    Plan("m", "ppo", 2.0, 2.0, 10, 40, 0, {"layers.0.q": ["scalar-2"]}, predicted_loss=predicted).save(plan)
    notes = {} if reward is None else {"divergence": {"before": reward, "after": 0.1, "kept": True}}
    make("recovery", str(quantized), checkpoint(10, **notes))
    values = dict(
        zip(("original", "before_recovery", "quantized"), (math.exp(3 + g) for g in (0, *after)), strict=True)
    )
    changed = entry | {"perplexity": {"wikipedia": values}}
    return gather.Experiment(Path(f"results/{name}.json"), changed, {"plan": plan, "quantized": quantized})


def test_predictions_and_rewards_are_compared_with_what_came(entry: dict[str, Any]) -> None:
    rows = [(0.5, 0.6, 0.55, 0.4), (0.7, 0.66, 0.8, 0.5), (0.6, 0.8, 0.9, 0.45), (0.9, None, 0.95, 0.8)]
    found = [gaps(f"m_2.0bits.ppo-{seed}", entry, *row) for seed, row in enumerate(rows)]
    elsewhere = gaps("m_2.0bits.ppo-4", entry, 9.0, 9.0, 0.0, 0.0)
    elsewhere.result["perplexity"] = {"wikitext-2-raw-v1": OTHER}
    figure = model_charts.proxy("m", [*found, elsewhere])
    assert figure is not None
    assert figure.table[1:] == tuple(
        (f"m_2.0bits.ppo-{seed}", *("" if gap is None else f"{gap:.4f}" for gap in row))
        for seed, row in enumerate(rows)
    ), "another text is no comparison"
    predicted, reward, before, after = (numpy.array(column, dtype=float) for column in zip(*rows, strict=True))
    for stage, measured in (("before recovery", before), ("after it", after)):
        every = numpy.corrcoef(predicted, measured)[0, 1]
        some = numpy.corrcoef(reward[:3], measured[:3])[0, 1]
        assert f"{stage} predicted loss {every:.3f}, divergence on the reward split {some:.3f}" in figure.caption
    assert "divergence 0.8000, measured 0.9000" in figure.svg
    assert model_charts.proxy("m", [found[0], elsewhere]) is None


def test_the_locale_does_not_decide_the_encoding(entry: dict[str, Any], tmp_path: Path) -> None:
    """Both hold more than ASCII, and say that they are UTF-8."""
    path = save("m_2.0bits.json", entry)
    script = f"""
import locale
from pathlib import Path
from windquant import atomic
assert locale.getpreferredencoding(False) != "UTF-8"
atomic.write_text(Path({str(tmp_path / "text")!r}), "\\u2264")
"""
    arguments = ["--results", path, "--output", "results/report.html"]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (["-c", script], ["-m", "windquant.report", *arguments]):
        done = subprocess.run([sys.executable, *command], env=plain, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "text").read_bytes() == "≤".encode()
    assert "±" in Path("results/report.html").read_text(encoding="utf-8")
