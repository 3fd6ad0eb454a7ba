"""The report as one HTML page: everything inline, nothing from a network, no script."""

from collections.abc import Sequence
from html import escape

from windquant.progress import duration
from windquant.report import model_charts, result_charts
from windquant.report.figure import Figure, Row, make
from windquant.report.gather import Experiment, Peer, by_model, by_tasks, datasets
from windquant.report.svg import STYLE, THEME

CSS = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0; } h2 { font-size: 1.4rem; margin: 3rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { margin: .5rem 0; } a { color: var(--link); } code, pre { font: 13px/1.5 ui-monospace, monospace; }
.lead, figcaption, .soft { color: var(--soft); } figcaption { font-size: .9rem; }
nav ul { padding: 0; margin: 1rem 0 0; list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2.2rem 1.6rem;
  margin-top: 1.2rem; }
figure { margin: 0; min-width: 0; break-inside: avoid; } figure.wide { grid-column: 1 / -1; }
figure > svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem .9rem; font-size: .85rem; margin: .2rem 0 .4rem; }
.legend span { white-space: nowrap; } .legend svg { vertical-align: -3px; }
.legend i { display: inline-block; width: .8em; height: .8em; vertical-align: -1px; }
details { font-size: .85rem; margin-top: .4rem; } summary { cursor: pointer; color: var(--link); }
pre { background: var(--panel); padding: .5rem .7rem; margin: .4rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; border-radius: 4px; max-height: 9rem; overflow-y: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; font-size: .85rem; }
th, td { padding: .22rem .7rem .22rem 0; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; } th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; } .words td { text-align: left; overflow-wrap: anywhere; }
.tall { max-height: 18rem; overflow: auto; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav, details { display: none; }
  a { color: inherit; } h2 { break-before: page; } h2.first { break-before: auto; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(found: Sequence[Experiment], peers: Sequence[Peer] = ()) -> str:
    """The whole document."""
    models = by_model(found)
    links = [f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name in models]
    links += [f'<li><a href="#{e.slug}">{escape(e.title)}</a></li>' for e in found]
    parts = [
        "<header><h1>WINDQuant report</h1>",
        f'<p class="lead">{len(found)} result{"s" * (len(found) != 1)} of {", ".join(map(escape, models))}. Every '
        "picture comes with its numbers and with the command that makes them again.</p>",
        f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav></header>',
    ]
    for index, (name, entries) in enumerate(models.items()):
        of_model = [peer for peer in peers if peer.model == name]
        parts.append(_heading(name, _anchor(name), first=index == 0))
        parts.append(table(overview(entries)))
        parts.append(figures([
            *model_charts.perplexity(name, entries, of_model), *model_charts.accuracy(name, entries),
            model_charts.proxy(name, entries), model_charts.shares(name, entries),
        ]))  # fmt: skip
        if of_model:
            parts += ["<h3>Other tools on the same text</h3>", table(peer_table(of_model))]
    for e in found:
        parts.append(_heading(e.title, e.slug))
        if e.result["fallback"]:
            parts.append("<p>The search's plan could not be used: this is the Lagrangian one.</p>")
        elif e.plan and (reason := e.plan.search.get("reason")):
            parts.append(f"<p>The plan is the {escape(e.plan.search['chosen'])} one: {escape(reason)}.</p>")
        drawn = [draw(e) for draw in result_charts.PICTURES]
        parts.append(figures(drawn))
        missing = [name for name in ("plan", "quantized") if e.manifest(name) is None]
        if missing:
            parts.append(
                f'<p class="soft">Not on this machine, or made anew since, so not shown: {" and ".join(missing)} of '
                "this result. <code>make pull</code> gets them, or the commands above make them.</p>"
            )
        parts.append(f"<details><summary>What this result was made from</summary>{table(making(e), 'words')}</details>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>WINDQuant report</title>\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{THEME}{STYLE}{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def figures(drawn: Sequence[Figure | None]) -> str:
    return f'<div class="figures">{"".join(figure(one) for one in drawn if one is not None)}</div>'


def figure(one: Figure) -> str:
    commands = escape("\n".join(one.commands))
    numbers = (
        f'<details><summary>Numbers</summary><div class="tall">{table(one.table)}</div></details>' if one.table else ""
    )
    return (
        f"<figure{' class=wide' if one.wide else ''}><h3>{escape(one.title)}</h3>{one.svg}{one.legend}"
        f"<figcaption>{escape(one.caption)}</figcaption><pre>{commands}</pre>{numbers}</figure>"
    )


def table(rows: Sequence[Row], kind: str = "") -> str:
    head, *body = rows
    lines = ["".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    content = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table{f" class={kind}" if kind else ""}>{content}</table></div>'


def overview(found: Sequence[Experiment]) -> list[Row]:
    """A row per result of a model, a column per text and set of tasks; a cell is empty where a result has none."""
    texts, tasks = datasets(found), by_tasks(found)
    accuracies = ["accuracy"] if len(tasks) == 1 else [f"accuracy, {' and '.join(names)}" for names in tasks]
    rows: list[Row] = [("result", "effective bits", *(f"perplexity, {name}" for name in texts), *accuracies, "time")]

    def cells(e: Experiment, which: str) -> list[str]:
        perplexities, average = e.result["perplexity"], e.result["zero_shot_average"][which]
        values = [f"{perplexities[name][which]:.2f}" if name in perplexities else "" for name in texts]
        return values + [f"{average:.1%}" if names == e.tasks else "" for names in tasks]

    originals = [cells(e, "original") for e in found]  # every column's first
    filled = [next(filter(None, column)) for column in zip(*originals, strict=True)]
    rows.append(("original", "16", *filled, ""))
    for e in found:
        name = f"{e.result['target_bits']:g} bits, {e.variant}"
        seconds = sum(e.result["seconds"].values())
        rows.append((name, f"{e.result['effective_bits']:.4f}", *cells(e, "quantized"), duration(seconds)))
    return rows


def peer_table(peers: Sequence[Peer]) -> list[Row]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows: list[Row] = [("tool", "recipe", "bits", "perplexity", "seconds", "peak memory, GB", "")]
    for p in peers:
        memory = None if p.peak_memory_bytes is None else p.peak_memory_bytes / 1e9
        numbers = (number(p.bits, ".4f"), number(p.perplexity, ".2f"), number(p.seconds, ",.0f"), number(memory, ".1f"))
        rows.append((p.peer, p.recipe, *numbers, p.reason))
    return rows


def making(e: Experiment) -> list[Row]:
    """Commit, versions, machine and digests of a result."""
    entry = e.result
    rows: list[Row] = [("", ""), ("file", str(e.path)), ("made by", make(e.path)), ("seed", str(entry["seed"]))]
    rows.append(("commit", entry["git_commit"] or "outside of git"))
    rows.append(("configuration", entry["config_sha256"]))
    if (manifest := e.manifest("quantized")) and manifest.machine:
        rows.append(("machine", ", ".join(f"{key} {value}" for key, value in manifest.machine.items() if value)))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in entry["versions"].items())))
    rows += [(f"sha256 of {name}", digest) for name, digest in entry["data"].items()]
    if entry["mlflow_run_id"]:
        rows.append(("MLflow run", entry["mlflow_run_id"]))
    return rows


def _anchor(model: str) -> str:
    return f"model-{model.replace('.', '-')}"


def _heading(content: str, anchor: str, first: bool = False) -> str:
    return f'<h2 id="{escape(anchor)}"{" class=first" if first else ""}>{escape(content)}</h2>'
