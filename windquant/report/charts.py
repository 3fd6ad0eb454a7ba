"""The pictures of the report. Each one comes with a sentence that says what it shows, its numbers, and its command."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from windquant.configuration import ALLOCATORS
from windquant.progress import duration
from windquant.report import plan_picture
from windquant.report.gather import Experiment, Peer, correlation
from windquant.report.plan_picture import width_colour
from windquant.report.svg import SERIES, Plot, element, extent, legend, picture, text, title

Row = Sequence[str]
PEERS = SERIES - 1  # the series that other tools' points have
SMOOTH = 8  # updates or steps that a running mean is taken over


@dataclass(frozen=True)
class Figure:
    title: str
    svg: str
    caption: str  # plain text
    commands: tuple[str, ...]  # what makes its numbers again
    table: tuple[Row, ...] = ()  # the numbers, a header first
    legend: str = ""  # HTML
    wide: bool = False


def make(*targets: object) -> str:
    """The command that makes files; many with one beginning and ending in the shell's short form, a_{1,2}.json."""
    names = list(dict.fromkeys(map(str, targets)))
    if len(names) > 3:
        start = names[0].rpartition("_")[0]
        if start and all(name.startswith(f"{start}_") and name.endswith(".json") for name in names):
            middles = [name.removeprefix(f"{start}_").removesuffix(".json") for name in names]
            return f"snakemake --cores all {start}_{{{','.join(middles)}}}.json"
    return f"snakemake --cores all {' '.join(names)}"


#: Perplexity in originals from which on a peer is named but not drawn: such a model says nothing any more.
COLLAPSED = 20


def series(allocator: str) -> int:
    """The colour and mark of an allocator, the same in all pictures."""
    return ALLOCATORS.index(allocator) % PEERS if allocator in ALLOCATORS else PEERS


def key(names: Iterable[str], extra: Sequence[tuple[str, int]] = (), hollow: Sequence[tuple[str, int]] = ()) -> str:
    known = [name for name in ALLOCATORS if name in (found := set(names))]
    return legend([(name, series(name)) for name in [*known, *sorted(found - set(known))]] + list(extra), hollow)


def perplexity(model: str, found: Sequence[Experiment], peers: Sequence[Peer]) -> list[Figure]:
    """A picture per text: perplexity against effective bits."""
    return [perplexity_on(dataset, model, found, peers) for dataset in found[0].result["perplexity"]]


def perplexity_on(dataset: str, model: str, found: Sequence[Experiment], peers: Sequence[Peer]) -> Figure:
    rows = [(e, e.result["effective_bits"], e.result["perplexity"][dataset]) for e in found]
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
    for allocator, group in groupby(sorted(rows, key=lambda row: row[0].result["allocator"]), _allocator):
        points = sorted(((b, entry) for _, b, entry in group), key=lambda point: point[0])
        if len(points) > 1:
            plot.line([(b, entry["quantized"]) for b, entry in points], series(allocator))
        for b, entry in points:
            plot.line([(b, entry["before_recovery"]), (b, entry["quantized"])], series(allocator), "thin dotted")
            hint = f"{allocator}, {b:.4f} bits: perplexity"
            before = f"{hint} {entry['before_recovery']:.2f} before recovery"
            plot.dot(b, entry["before_recovery"], series(allocator), before, hollow=True, size=3.5)
            plot.dot(b, entry["quantized"], series(allocator), f"{hint} {entry['quantized']:.2f}")
    for peer in others:
        if peer.bits is not None and peer.perplexity is not None:
            plot.dot(peer.bits, peer.perplexity, PEERS, f"{peer.peer} {peer.recipe}: {peer.perplexity:.2f}")
            plot.label(peer.bits, peer.perplexity, peer.peer)
    best = min(rows, key=lambda row: row[2]["quantized"])
    says = (
        f"{model} on {dataset}: the original has a perplexity of {original:.2f}; {best_of(len(rows))} is "
        f"{best[2]['quantized']:.2f} at {best[1]:.4f} effective bits ({best[0].result['allocator']}, "
        f"{best[2]['before_recovery']:.2f} before recovery)."
    )
    collapsed = [peer for peer in measured if peer not in others]
    if collapsed:
        names = ", ".join(f"{peer.peer} ({peer.bits:.2f} bits)" for peer in collapsed)
        says += f" Beyond the picture, with more than {COLLAPSED} times the original's: {names}."
    table: list[Row] = [("allocator", "effective bits", "before recovery", "quantized", "original")]
    table += [
        (e.result["allocator"], f"{b:.4f}", *(f"{entry[k]:.2f}" for k in ("before_recovery", "quantized", "original")))
        for e, b, entry in rows
    ]
    return Figure(
        f"Perplexity against effective bits: {dataset}",
        plot.picture(f"Perplexity of {model} on {dataset} against effective bits", says),
        f"{says} Small hollow marks: before recovery. Lower is better.",
        (make(*(e.path for e in found)),),
        tuple(table),
        key({e.result["allocator"] for e in found}, [("other tools", PEERS)] if others else ()),
    )


def best_of(count: int) -> str:
    return "the result" if count == 1 else f"the best of {count} results"


def _allocator(row: tuple[Experiment, object, object]) -> str:
    return str(row[0].result["allocator"])


def accuracy(model: str, found: Sequence[Experiment]) -> Figure | None:
    """Mean accuracy of the zero-shot tasks against effective bits; None where there are no tasks."""
    rows = [e for e in found if e.result["zero_shot"]]
    if not rows:
        return None
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
    for allocator, entries in groupby(
        sorted(points, key=lambda p: p[0].result["allocator"]), lambda p: p[0].result["allocator"]
    ):
        group = sorted(entries, key=lambda point: point[1])
        if len(group) > 1:
            plot.line([(b, y) for _, b, y, _ in group], series(allocator))
        for _, b, y, error in group:
            plot.whisker(b, y - error, y + error, series(allocator))
            plot.dot(b, y, series(allocator), f"{allocator}, {b:.4f} bits: {y:.1f} % ± {error:.1f}")
    tasks = list(rows[0].result["zero_shot"])
    best = max(points, key=lambda point: point[2])
    says = (
        f"{model}, mean of {', '.join(tasks)}: the original is right in {original:.1f} %, "
        f"{best_of(len(points))} in {best[2]:.1f} % ± {best[3]:.1f} "
        f"({best[0].result['allocator']}, {best[1]:.4f} bits)."
    )
    table: list[Row] = [("allocator", "effective bits", *(f"{task}" for task in tasks), "mean")]
    table.append(
        ("original", "16", *(f"{rows[0].result['zero_shot'][t]['original']:.1%}" for t in tasks), f"{original:.1f}%")
    )
    for e, b, y, _ in points:
        each = [e.result["zero_shot"][task] for task in tasks if task in e.result["zero_shot"]]
        cells = [f"{task['quantized']:.1%} ± {task['stderr']:.1%}" for task in each]
        table.append((e.result["allocator"], f"{b:.4f}", *cells, f"{y:.1f}%"))
    return Figure(
        "Accuracy against effective bits",
        plot.picture(f"Zero-shot accuracy of {model} against effective bits", says),
        f"{says} Bars: standard error. Higher is better.",
        (make(*(e.path for e in rows)),),
        tuple(table),
        key({e.result["allocator"] for e in rows}),
    )


def shares(model: str, found: Sequence[Experiment]) -> Figure:
    """Share of the weights per action, a bar per result."""
    left, bar, pitch, width = 150.0, 18.0, 28.0, 980.0
    names = sorted(
        {name for e in found for name in e.result["actions"]}, key=lambda name: (plan_picture.bits(name), name)
    )
    parts, table = [], [("result", *names)]
    for place, e in enumerate(found):
        y, x = 10 + place * pitch, left
        parts.append(
            text(left - 10, y + 13, f"{e.result['allocator']}, {e.result['target_bits']:g} bits", "small", "end")
        )
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


def plan(e: Experiment) -> Figure | None:
    if e.plan is None:
        return None
    drawn = plan_picture.draw(e.plan, e.energies)
    shown = (
        "the widths follow what the loss model makes of the energies on the right"
        if e.energies
        else "by kind and layer"
    )
    file = e.path.with_suffix(".plan.svg")
    return Figure(
        "The plan",
        drawn,
        f"A cell is a column chunk of {e.plan.units.chunk} input channels with all its output rows; a row is a decoder "
        f"layer; {shown}. A pointer over a linear shows its numbers.",
        (make(file),),
        wide=True,
    )


def learning(e: Experiment) -> Figure | None:
    """The policy's reward over its updates, with the curriculum's targets behind it."""
    rewards = [point["reward"] for point in e.curve]
    if len(rewards) < 2:
        return None
    count = len(rewards)
    plot = Plot((0, count), extent(rewards), "update of the policy", "mean reward per decision")
    stages = [(target, len(list(group))) for target, group in groupby(point.get("target") for point in e.curve)]
    start = 0
    for index, (target, length) in enumerate(stages):
        if target is not None:
            left, right = plot.sx(start), plot.sx(start + length)
            if index % 2 == 0:
                plot.parts.insert(0, element("rect", x=left, y=plot.top, width=right - left,
                                             height=plot.height - plot.bottom - plot.top, class_="band"))  # fmt: skip
            plot.parts.append(text((left + right) / 2, plot.top + 14, f"{target:g} bits", "soft small", "middle"))
        start += length
    plot.line([(i + 0.5, value) for i, value in enumerate(rewards)], 0, "thin dotted")
    plot.line([(i + 0.5, value) for i, value in enumerate(running(rewards))], 0)
    first, last = (sum(part) / len(part) for part in (rewards[:SMOOTH], rewards[-SMOOTH:]))
    named = [f"{target:g}" for target, _ in stages if target is not None]
    way = f" The curriculum's targets are {', '.join(named)} bits." if named else ""
    says = (
        f"{count} updates; the mean reward goes from {first:.4f} in the first {SMOOTH} to {last:.4f} in the last.{way}"
    )
    return Figure(
        "The policy's learning curve",
        plot.picture(f"Learning curve of PPO for {e.title}", says),
        f"{says} 0 is the best that is possible under the loss model of the moment. Dotted: every update; line: mean "
        f"of the last {SMOOTH}.",
        (make(e.inputs["plan"]),),
        (("update", "target", "reward"),
         *((str(i), f"{p['target']:g}" if "target" in p else "", f"{p['reward']:.6f}") for i, p in enumerate(e.curve))),
    )  # fmt: skip


def predicted(e: Experiment) -> Figure | None:
    """Losses that the search has measured against those predicted for the same plans."""
    pairs = e.pairs
    if len(pairs) < 2:
        return None
    sources = {"lagrangian": 1, "sampled": 0, "deterministic": 2}
    values = [value for p in pairs for value in (p.predicted, p.corrected, p.measured)]
    span = extent(values)
    plot = Plot(span, span, "predicted loss increase, nats per token", "measured, nats per token")
    plot.line([(span[0], span[0]), (span[1], span[1])], PEERS, "thin dashed")
    for p in pairs:
        hint = f"{p.source}: predicted {p.predicted:.4f}, corrected {p.corrected:.4f}, measured {p.measured:.4f}"
        plot.dot(p.predicted, p.measured, sources.get(p.source, PEERS), hint, hollow=True, size=4)
    for p in pairs:
        hint = f"{p.source}: corrected prediction {p.corrected:.4f}, measured {p.measured:.4f}"
        plot.dot(p.corrected, p.measured, sources.get(p.source, PEERS), hint, size=4.5)
    bank = correlation([(p.predicted, p.measured) for p in pairs])
    corrected = correlation([(p.corrected, p.measured) for p in pairs])
    says = (
        f"{len(pairs)} measured plans at the target. Pearson's r of measured and predicted loss: {show(bank)} for the "
        f"bank, {show(corrected)} for the loss model that the measurements before had corrected."
    )
    return Figure(
        "Predicted against measured loss in the search",
        plot.picture(f"Predicted against measured loss of the plans of {e.title}", says),
        f"{says} Hollow: the bank; full: corrected; dashed: equal. All of them are near the best plan, so they "
        "differ little. (The paper reports 0.997 for its proxy and the final perplexity.)",
        (make(e.inputs["plan"]),),
        (("plan", "predicted", "corrected", "measured"),
         *((p.source, f"{p.predicted:.4f}", f"{p.corrected:.4f}", f"{p.measured:.4f}") for p in pairs)),
        legend([(name, index) for name, index in sources.items() if any(p.source == name for p in pairs)]),
    )  # fmt: skip


def proxy(model: str, found: Sequence[Experiment]) -> Figure | None:
    """The bank's prediction against the loss on the test text, over all results of a model."""
    rows = []
    for e in found:
        values = next(iter(e.result["perplexity"].values()))
        if e.plan is not None:
            rows.append((e, e.plan.predicted_loss, math.log(values["before_recovery"] / values["original"])))
    if len(rows) < 2:
        return None
    span = extent([value for _, x, y in rows for value in (x, y)])
    plot = Plot(span, span, "predicted loss increase, nats per token", "on the test text, nats per token")
    plot.line([(span[0], span[0]), (span[1], span[1])], PEERS, "thin dashed")
    for e, x, y in rows:
        plot.dot(x, y, series(e.result["allocator"]), f"{e.title}: predicted {x:.4f}, measured {y:.4f}")
    r = correlation([(x, y) for _, x, y in rows])
    says = f"{len(rows)} quantized models before recovery: Pearson's r of predicted and final loss is {show(r)}."
    return Figure(
        "Prediction against final loss",
        plot.picture(f"Predicted against final loss of {model}", says),
        f"{says} Dashed: equal. The paper reports 0.997 for its proxy.",
        (make(*(e.path for e, _, _ in rows)),),
        (("result", "predicted", "final"), *((e.path.stem, f"{x:.4f}", f"{y:.4f}") for e, x, y in rows)),
        key({e.result["allocator"] for e, _, _ in rows}),
    )


def recovery(e: Experiment) -> Figure | None:
    """Divergence from the original over the steps of recovery."""
    curve, held_out = e.note("quantized", "curve") or [], e.note("quantized", "divergence")
    if len(curve) < 2 or not held_out:
        return None
    before, after = held_out["before"], held_out["after"]
    plot = Plot(
        (0, len(curve)), extent([*curve, before, after]), "step", "divergence from the original, nats per token"
    )
    plot.level(before, f"held out, before: {before:.3f}")
    plot.level(after, f"held out, after: {after:.3f}")
    plot.line([(i + 0.5, value) for i, value in enumerate(curve)], 0, "thin dotted")
    plot.line([(i + 0.5, value) for i, value in enumerate(running(curve))], 0)
    says = (
        f"{len(curve)} steps: on text that it is not trained on, the divergence goes from {before:.3f} to {after:.3f} "
        + ("nats per token." if held_out["kept"] else "nats per token; that is no gain, so recovery was dropped.")
    )
    return Figure(
        "Recovery",
        plot.picture(f"Recovery of {e.title}", says),
        f"{says} Dotted: the window of every step; line: mean of the last {SMOOTH}.",
        (make(e.inputs["quantized"]),),
        (("step", "divergence"), *((str(i), f"{value:.5f}") for i, value in enumerate(curve))),
    )


def resources(e: Experiment) -> Figure:
    """Time and memory of every step."""
    seconds, memory = e.result["seconds"], e.result["peak_memory_bytes"]
    left, pitch, width = 190.0, 22.0, 980.0
    room = (width - left) / 2 - 80
    most, largest = max(seconds.values()) or 1.0, max(max(m.values()) for m in memory.values()) or 1
    parts = [
        text(left, 14, "time, minutes : seconds", "strong"),
        text(left + room + 80, 14, "peak memory, GB", "strong"),
    ]
    gpu = any(values["gpu"] for values in memory.values())
    for place, step in enumerate(seconds):
        y = 26 + place * pitch
        parts.append(text(left - 10, y + 12, step, "small", "end"))
        for start, share, said, index in (
            (left, seconds[step] / most, duration(seconds[step]), 0),
            (left + room + 80, memory[step]["host"] / largest, f"{memory[step]['host'] / 1e9:.1f}", 2),
        ):
            parts.append(element("rect", x=start, y=y, width=max(1.0, share * room), height=15, class_=f"f{index}"))
            parts.append(text(start + max(1.0, share * room) + 6, y + 12, said, "small soft"))
        if memory[step]["gpu"]:
            start = left + room + 80
            parts.append(
                element("rect", x=start, y=y + 10, width=memory[step]["gpu"] / largest * room, height=5, class_="f1")
            )
    total = sum(seconds.values())
    slowest = max(seconds, key=lambda step: seconds[step])
    says = (
        f"All steps together take {duration(total)}; the longest is {slowest} ({duration(seconds[slowest])}). The most "
        f"memory is {largest / 1e9:.1f} GB."
    )
    return Figure(
        "Time and memory per step",
        picture(width, 32 + pitch * len(seconds), *parts, name=f"Time and memory of {e.title}", description=says),
        f"{says} Steps that several results share are counted in each.{' Narrow bars: GPU memory.' if gpu else ''}",
        (f"python -m windquant why {e.path}",),
        (("step", "seconds", "host bytes", "GPU bytes"),
         *((s, f"{seconds[s]:.1f}", f"{memory[s]['host']:,}", f"{memory[s]['gpu']:,}") for s in seconds)),
        wide=True,
    )  # fmt: skip


def running(values: Sequence[float]) -> list[float]:
    """Mean of up to SMOOTH values that end with each one."""
    windows = (values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def show(r: float | None) -> str:
    return "not defined" if r is None else f"{r:.3f}"


#: The pictures of one result, in their order.
OF_RESULT: tuple[Callable[[Experiment], Figure | None], ...] = (plan, learning, predicted, recovery, resources)
