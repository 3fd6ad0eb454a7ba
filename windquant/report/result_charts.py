"""The pictures of one result."""

from collections.abc import Callable
from itertools import groupby

from windquant.progress import duration
from windquant.report import plan_picture
from windquant.report.figure import PEERS, SMOOTH, Figure, make, running, show
from windquant.report.gather import Experiment, correlation
from windquant.report.svg import Plot, element, extent, legend, picture, text


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
    way = f" The lowest targets of the curriculum are {', '.join(named)} bits." if named else ""
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
    sources = {"lagrangian": 1, "sampled": 0, "deterministic": 2, "evolution": 0}
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
        f"{len(pairs)} measured plans of all budgets of the search. Pearson's r of measured and predicted loss: "
        f"{show(bank)} for the bank, {show(corrected)} for the loss model that the measurements before had corrected."
    )
    return Figure(
        "Predicted against measured loss in the search",
        plot.picture(f"Predicted against measured loss of the plans of {e.title}", says),
        f"{says} Hollow: the bank; full: corrected; dashed: equal. Most of what differs is the budget. (The paper "
        "reports 0.997 for its proxy and the final perplexity.)",
        (make(e.inputs["plan"]),),
        (("plan", "bits", "predicted", "corrected", "measured"),
         *((p.source, f"{p.target:.4g}" if p.target else "",
            *(f"{value:.4f}" for value in (p.predicted, p.corrected, p.measured))) for p in pairs)),
        legend([(name, index) for name, index in sources.items() if any(p.source == name for p in pairs)]),
    )  # fmt: skip


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


#: In their order.
PICTURES: tuple[Callable[[Experiment], Figure | None], ...] = (plan, learning, predicted, recovery, resources)
