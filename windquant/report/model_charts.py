"""The pictures of all results of one model."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from windquant.report import plan_picture
from windquant.report.figure import PEERS, Figure, Row, key, make, series, show
from windquant.report.gather import Experiment, Peer, by_tasks, correlation, datasets
from windquant.report.plan_picture import width_colour
from windquant.report.svg import Plot, element, extent, picture, text, title

#: Perplexity in originals from which on a peer is named but not drawn: such a model says nothing any more.
COLLAPSED = 20


def perplexity(model: str, found: Sequence[Experiment], peers: Sequence[Peer]) -> list[Figure]:
    """A picture per text: perplexity against effective bits."""
    return [perplexity_on(dataset, model, found, peers) for dataset in datasets(found)]


def perplexity_on(dataset: str, model: str, found: Sequence[Experiment], peers: Sequence[Peer]) -> Figure:
    rows = [
        (e, e.result["effective_bits"], e.result["perplexity"][dataset])
        for e in found
        if dataset in e.result["perplexity"]
    ]
    original = rows[0][2]["original"]
    measured = [peer for peer in peers if peer.bits is not None and peer.perplexity is not None]
    others = [peer for peer in measured if peer.perplexity is not None and peer.perplexity < COLLAPSED * original]
    bits = [bits for _, bits, _ in rows] + [peer.bits for peer in others if peer.bits is not None]
    values = [value for _, _, entry in rows for value in entry.values()]
    values += [peer.perplexity for peer in others if peer.perplexity is not None]
    plot = Plot(
        extent(bits, least=1.5), extent(values, log=True, least=0.5), "effective bits per weight",
        f"perplexity, {dataset}", y_log=True,
    )  # fmt: skip
    plot.level(original, f"original {original:.2f}")
    marks = series(e.variant for e in found)
    for variant, group in groupby(sorted(rows, key=_variant), _variant):
        points = sorted(((b, entry) for _, b, entry in group), key=lambda point: point[0])
        mark = marks[variant]
        if len(points) > 1:
            plot.line([(b, entry["quantized"]) for b, entry in points], mark)
        for b, entry in points:
            plot.line([(b, entry["before_recovery"]), (b, entry["quantized"])], mark, "thin dotted")
            hint = f"{variant}, {b:.4f} bits: perplexity"
            before = f"{hint} {entry['before_recovery']:.2f} before recovery"
            plot.dot(b, entry["before_recovery"], mark, before, hollow=True, size=3.5)
            plot.dot(b, entry["quantized"], mark, f"{hint} {entry['quantized']:.2f}")
    for peer in others:
        if peer.bits is not None and peer.perplexity is not None:
            plot.dot(peer.bits, peer.perplexity, PEERS, f"{peer.peer} {peer.recipe}: {peer.perplexity:.2f}")
            plot.label(peer.bits, peer.perplexity, peer.peer)
    best = min(rows, key=lambda row: row[2]["quantized"])
    says = (
        f"{model} on {dataset}: the original has a perplexity of {original:.2f}; {best_of(len(rows))} is "
        f"{best[2]['quantized']:.2f} at {best[1]:.4f} effective bits ({best[0].variant}, "
        f"{best[2]['before_recovery']:.2f} before recovery)."
    )
    collapsed = [peer for peer in measured if peer not in others]
    if collapsed:
        names = ", ".join(f"{peer.peer} ({peer.bits:.2f} bits)" for peer in collapsed)
        says += f" Beyond the picture, with more than {COLLAPSED} times the original's: {names}."
    table: list[Row] = [("allocator", "effective bits", "before recovery", "quantized", "original")]
    table += [
        (e.variant, f"{b:.4f}", *(f"{entry[k]:.2f}" for k in ("before_recovery", "quantized", "original")))
        for e, b, entry in rows
    ]
    return Figure(
        f"Perplexity against effective bits: {dataset}",
        plot.picture(f"Perplexity of {model} on {dataset} against effective bits", says),
        f"{says} Small hollow marks: before recovery. Lower is better.",
        (make(*(e.path for e, _, _ in rows)),),
        tuple(table),
        key(marks, (e.variant for e, _, _ in rows), [("other tools", PEERS)] if others else ()),
    )


def accuracy(model: str, found: Sequence[Experiment]) -> list[Figure]:
    """A picture per set of tasks: their mean accuracy against effective bits."""
    marks = series(e.variant for e in found)
    return [accuracy_on(tasks, model, rows, marks) for tasks, rows in by_tasks(found).items()]


def accuracy_on(tasks: Sequence[str], model: str, rows: Sequence[Experiment], marks: Mapping[str, int]) -> Figure:
    original = 100 * rows[0].result["zero_shot_average"]["original"]
    points = []
    for e in rows:
        errors = [task["stderr"] for task in e.result["zero_shot"].values()]
        error = 100 * math.sqrt(sum(value**2 for value in errors)) / len(errors)  # of the mean of independent tasks
        points.append((e, e.result["effective_bits"], 100 * e.result["zero_shot_average"]["quantized"], error))
    values = [original, *(y + s * error for _, _, y, error in points for s in (-1, 1))]
    plot = Plot(
        extent((b for _, b, _, _ in points), least=1.5), extent(values, least=10.0), "effective bits per weight",
        "accuracy in %, mean of the tasks",
    )  # fmt: skip
    plot.level(original, f"original {original:.1f} %")
    for variant, entries in groupby(sorted(points, key=_variant), _variant):
        group = sorted(entries, key=lambda point: point[1])
        if len(group) > 1:
            plot.line([(b, y) for _, b, y, _ in group], marks[variant])
        for _, b, y, error in group:
            plot.whisker(b, y - error, y + error, marks[variant])
            plot.dot(b, y, marks[variant], f"{variant}, {b:.4f} bits: {y:.1f} % ± {error:.1f}")
    best = max(points, key=lambda point: point[2])
    says = (
        f"{model}, mean of {', '.join(tasks)}: the original is right in {original:.1f} %, "
        f"{best_of(len(points))} in {best[2]:.1f} % ± {best[3]:.1f} "
        f"({best[0].variant}, {best[1]:.4f} bits)."
    )
    table: list[Row] = [("allocator", "effective bits", *(f"{task}" for task in tasks), "mean")]
    table.append(
        ("original", "16", *(f"{rows[0].result['zero_shot'][t]['original']:.1%}" for t in tasks), f"{original:.1f}%")
    )
    for e, b, y, _ in points:
        each = [e.result["zero_shot"][task] for task in tasks]
        cells = [f"{task['quantized']:.1%} ± {task['stderr']:.1%}" for task in each]
        table.append((e.variant, f"{b:.4f}", *cells, f"{y:.1f}%"))
    return Figure(
        "Accuracy against effective bits",
        plot.picture(f"Zero-shot accuracy of {model} against effective bits", says),
        f"{says} Bars: standard error. Higher is better.",
        (make(*(e.path for e in rows)),),
        tuple(table),
        key(marks, (e.variant for e in rows)),
    )


def shares(model: str, found: Sequence[Experiment]) -> Figure:
    """Share of the weights per action, a bar per result."""
    bar, pitch, width = 18.0, 28.0, 980.0
    labels = [f"{e.variant}, {e.result['target_bits']:g} bits" for e in found]
    left = max(150.0, 20 + 6.5 * max(map(len, labels)))
    names = sorted(
        {name for e in found for name in e.result["actions"]}, key=lambda name: (plan_picture.bits(name), name)
    )
    parts, table = [], [("result", *names)]
    for place, e in enumerate(found):
        y, x = 10 + place * pitch, left
        parts.append(text(left - 10, y + 13, labels[place], "small", "end"))
        for name in names:
            share = e.result["actions"].get(name, 0.0)
            breadth = share * (width - left - 10)
            colour = width_colour(plan_picture.bits(name))
            hint = title(f"{name}: {share:.1%} of the weights")
            parts.append(element("rect", hint, x=x, y=y, width=breadth, height=bar, fill=colour))
            if breadth > 34:
                ink = "#ffffff" if plan_picture.bits(name) <= 2 else "#111111"
                parts.append(text(x + breadth / 2, y + 13, f"{share:.0%}", "small", "middle", style=f"fill: {ink}"))
            x += breadth
        table.append((e.path.stem, *(f"{e.result['actions'].get(name, 0):.1%}" for name in names)))
    entries = [
        element(
            "span",
            f'<i style="background: {width_colour(plan_picture.bits(n))}"></i> {n}',
        )
        for n in names
    ]
    first = found[0].result["actions"]
    says = f"{found[0].title}: " + ", ".join(f"{name} {first[name]:.1%}" for name in names if name in first) + "."
    return Figure(
        "Share of the weights per action",
        picture(width, 14 + pitch * len(found), *parts, name=f"Share of the weights of {model} per action",
                description=says),
        says,
        (make(*(e.path for e in found)),),
        tuple(table),
        element("p", *entries, class_="legend"),
        wide=True,
    )  # fmt: skip


class Gaps(NamedTuple):
    """What was known of a plan beforehand, and what it cost on the test text; nats per token."""

    experiment: Experiment
    predicted: float  # by the bank
    reward: float | None  # divergence on the reward split before recovery; None: not here
    before: float  # recovery
    after: float


def proxy(model: str, found: Sequence[Experiment]) -> Figure | None:
    """The bank's prediction and the divergence on the reward split against the loss on the first text."""
    dataset = datasets(found)[0]
    rows = []
    for e in found:
        if e.plan is not None and (values := e.result["perplexity"].get(dataset)):
            reward = (e.note("quantized", "divergence") or {}).get("before")
            gaps = (math.log(values[stage] / values["original"]) for stage in ("before_recovery", "quantized"))
            rows.append(Gaps(e, e.plan.predicted_loss, reward, *gaps))
    if len(rows) < 2:
        return None
    rewarded = [(row, row.reward) for row in rows if row.reward is not None]
    values = [value for row in rows for value in (row.predicted, row.before)] + [reward for _, reward in rewarded]
    span = extent(values)
    plot = Plot(
        span, span, "predicted, or divergence on the reward split, nats per token", f"on {dataset}, nats per token"
    )
    plot.line([(span[0], span[0]), (span[1], span[1])], PEERS, "thin dashed")
    marks = series(e.variant for e in found)
    for row, reward in rewarded:
        hint = f"{row.experiment.title}: divergence {reward:.4f}, measured {row.before:.4f}"
        plot.dot(reward, row.before, marks[row.experiment.variant], hint, hollow=True, size=4)
    for row in rows:
        hint = f"{row.experiment.title}: predicted {row.predicted:.4f}, measured {row.before:.4f}"
        plot.dot(row.predicted, row.before, marks[row.experiment.variant], hint)
    measured: tuple[tuple[str, Callable[[Gaps], float]], ...]
    measured = ("before recovery", lambda row: row.before), ("after it", lambda row: row.after)
    says = f"{len(rows)} quantized models. Pearson's r with the loss gap on {dataset}: " + "; ".join(
        f"{stage} predicted loss {show(correlation([(row.predicted, gap(row)) for row in rows]))}, "
        f"divergence on the reward split {show(correlation([(reward, gap(row)) for row, reward in rewarded]))}"
        for stage, gap in measured
    )
    return Figure(
        "Prediction, reward and final loss",
        plot.picture(f"Predicted loss and divergence against the final loss of {model}", f"{says}."),
        f"{says}. Full: predicted; hollow: divergence; dashed: equal. The paper reports 0.997 for its proxy.",
        (make(*(row.experiment.path for row in rows)),),
        (("result", "predicted", "reward split", "before recovery", "after it"),
         *((e.path.stem, *("" if gap is None else f"{gap:.4f}" for gap in gaps)) for e, *gaps in rows)),
        key(marks, (row.experiment.variant for row in rows)),
    )  # fmt: skip


def best_of(count: int) -> str:
    return "the result" if count == 1 else f"the best of {count} results"


def _variant(row: Sequence[Any]) -> str:
    """Of a row that begins with its experiment."""
    return str(row[0].variant)
