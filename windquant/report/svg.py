"""Small SVG pictures: shapes, scales, and a plot with axes.

Colours are CSS classes, so that one picture is right on light and dark pages. Series differ in the shape of their
marks too, not in colour alone; the colours are those of Okabe and Ito, which colour-blind people can tell apart.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

#: Colours by class: `--s0` ... are those of series. Dark pages get lighter ones.
THEME = """
:root { color-scheme: light dark;
  --page: #ffffff; --ink: #1c1f24; --soft: #5b6470; --line: #d7dbe0; --panel: #f5f6f8; --link: #0b5cad;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b5589a; --s4: #9a7400;
  --s5: #117733; --s6: #882255; --s7: #5f6c7b; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171c; --ink: #e6e9ed; --soft: #a3acb8; --line: #383e47; --panel: #1d2127; --link: #7fb8f0;
  --s0: #56b4e9; --s1: #ff8f3f; --s2: #2ec99a; --s3: #dd8fc4; --s4: #e0b83a;
  --s5: #8fd18b; --s6: #e58ab0; --s7: #a9b4c2; } }
@media print { :root { color-scheme: light;
  --page: #ffffff; --ink: #1c1f24; --soft: #5b6470; --line: #d7dbe0; --panel: #f5f6f8; --link: #0b5cad;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b5589a; --s4: #9a7400;
  --s5: #117733; --s6: #882255; --s7: #5f6c7b; } }
"""
STYLE = (
    """
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } svg .small { font-size: 11px; } svg .strong { font-weight: 600; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .thin { fill: none; stroke-width: 1.25; }
svg .dashed { stroke-dasharray: 5 4; } svg .dotted { stroke-dasharray: 1.5 3; }
svg .band { fill: var(--ink); opacity: .05; } svg .mark { stroke: var(--page); stroke-width: 1; }
svg .ghost { fill: transparent; } svg .halo { paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
svg .frame { fill: none; stroke: var(--line); }
svg .hollow { fill: var(--page); stroke-width: 1.75; }
"""
    + "\n".join(
        f"svg .s{i} {{ stroke: var(--s{i}); }} svg .f{i} {{ fill: var(--s{i}); }} svg .h{i} {{ stroke: var(--s{i}); }}"
        for i in range(8)
    )
    + "\n"
)
SERIES = 8  # number of colours
ROOM = 0.06  # around values, as a share of their span
Point = tuple[float, float]


def element(tag: str, *content: str, **attributes: object) -> str:
    """`<tag>` with its content (SVG already). `class_` is class, `_` in names is `-`, None leaves an attribute out."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(shown(value), quote=True)}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(content)
    return f"<{tag}{given}>{inner}</{tag}>" if inner else f"<{tag}{given}/>"


def shown(value: object) -> str:
    """A number with at most two digits after the point: more cannot be seen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(
    x: float,
    y: float,
    content: str,
    class_: str = "",
    anchor: str = "start",
    rotate: bool = False,
    style: str | None = None,
) -> str:
    turn = f"rotate(-90 {shown(x)} {shown(y)})" if rotate else None
    return element(
        "text", escape(content), x=x, y=y, class_=class_ or None, text_anchor=anchor if anchor != "start" else None,
        transform=turn, style=style,
    )  # fmt: skip


def title(content: str) -> str:
    """What a pointer over the shape shows."""
    return element("title", escape(content))


def picture(width: float, height: float, *content: str, name: str, description: str) -> str:
    """An `<svg>`; `name` and `description` are what people hear who do not see it."""
    mark = f"p{hashlib.sha256(f'{name} {description}'.encode()).hexdigest()[:8]}"
    return element(
        "svg",
        element("title", escape(name), id=f"{mark}t"),
        element("desc", escape(description), id=f"{mark}d"),
        *content,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {shown(float(width))} {shown(float(height))}",
        role="img", aria_labelledby=f"{mark}t {mark}d",
    )  # fmt: skip


def standalone(svg: str, width: float) -> str:
    """A picture as a file of its own, with the colours that the page would give it."""
    paper = element("rect", width="100%", height="100%", style="fill: var(--page)")
    head, _, rest = svg.partition("</desc>")
    head = head.replace("<svg", f'<svg width="{shown(float(width))}"', 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}</desc><style>{THEME}{STYLE}</style>{paper}{rest}\n'


#: Marks of series, by index: circle, square, triangle, diamond, cross, triangles to the right and to the left, triangle
#: upside down. `r` is half their size.
SHAPES: tuple[Callable[[float, float, float], str], ...] = (
    lambda x, y, r: f"M{shown(x - r)} {shown(y)}a{shown(r)} {shown(r)} 0 1 0 {shown(2 * r)} 0"
    f"a{shown(r)} {shown(r)} 0 1 0 {shown(-2 * r)} 0z",
    lambda x, y, r: _polygon([(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]),
    lambda x, y, r: _polygon([(x, y - 1.2 * r), (x + 1.15 * r, y + 0.9 * r), (x - 1.15 * r, y + 0.9 * r)]),
    lambda x, y, r: _polygon([(x, y - 1.3 * r), (x + 1.3 * r, y), (x, y + 1.3 * r), (x - 1.3 * r, y)]),
    lambda x, y, r: _polygon(
        [(x + a * r, y + b * r) for a, b in (
            (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
            (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4),
        )]
    ),
    lambda x, y, r: _polygon([(x + 1.2 * r, y), (x - 0.9 * r, y + 1.15 * r), (x - 0.9 * r, y - 1.15 * r)]),
    lambda x, y, r: _polygon([(x - 1.2 * r, y), (x + 0.9 * r, y + 1.15 * r), (x + 0.9 * r, y - 1.15 * r)]),
    lambda x, y, r: _polygon([(x, y + 1.2 * r), (x + 1.15 * r, y - 0.9 * r), (x - 1.15 * r, y - 0.9 * r)]),
)  # fmt: skip


def _polygon(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{shown(float(x))} {shown(float(y))}" for x, y in points) + "z"


def mark(x: float, y: float, series: int, hint: str, hollow: bool = False, size: float = 5.0) -> str:
    """A mark of a series; `hint` is shown under a pointer."""
    index = series % SERIES
    kind = f"hollow h{index}" if hollow else f"mark f{index}"
    return element("path", title(hint), d=SHAPES[index](x, y, size), class_=kind)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten from `low` to `high`; finer ones where these are too few."""
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        found = [s * 10.0**p for p in range(start, end + 1) for s in steps if low <= s * 10.0**p <= high * 1.0001]
        if len(found) >= 3:
            return found
    return nice_ticks(low, high, 4)


@dataclass(frozen=True)
class Scale:
    """From values to places on the paper."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        share = ((math.log(value) if self.log else value) - low) / ((high - low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)


def extent(values: Iterable[float], log: bool = False, least: float = 0.0) -> tuple[float, float]:
    """Lowest and highest value with some room; at least `least` apart (as a ratio minus one on a log scale)."""
    found = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(found), max(found)
    if log:
        room = max(math.log(high / low) * ROOM, math.log1p(least) / 2, 0.02)
        return low * math.exp(-room), high * math.exp(room)
    room = max((high - low) * ROOM, (least - (high - low)) / 2, abs(high) * 1e-3, 1e-9)
    return low - room, high + room


@dataclass
class Plot:
    """Axes with a grid; shapes are added in the order in which they lie on top of each other."""

    x: tuple[float, float]  # values from, to
    y: tuple[float, float]
    x_label: str
    y_label: str
    width: float = 480.0
    height: float = 330.0
    y_log: bool = False
    parts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # above all else
    left: float = 58.0
    top: float = 14.0
    right: float = 16.0
    bottom: float = 46.0

    def __post_init__(self) -> None:
        self.sx = Scale(*self.x, self.left, self.width - self.right)
        self.sy = Scale(*self.y, self.height - self.bottom, self.top, self.y_log)

    def line(self, points: Sequence[Point], series: int, kind: str = "line") -> None:
        path = "L".join(f"{shown(self.sx(x))} {shown(self.sy(y))}" for x, y in points)
        self.parts.append(element("path", d=f"M{path}", class_=f"{kind} s{series % SERIES}"))

    def dot(self, x: float, y: float, series: int, hint: str, hollow: bool = False, size: float = 5.0) -> None:
        self.parts.append(mark(self.sx(x), self.sy(y), series, hint, hollow, size))

    def whisker(self, x: float, low: float, high: float, series: int) -> None:
        """A vertical error bar."""
        place, ends = self.sx(x), (self.sy(max(low, self.y[0])), self.sy(min(high, self.y[1])))
        self.parts.append(
            element("path", d=f"M{shown(place)} {shown(ends[0])}V{shown(ends[1])}", class_=f"thin s{series % SERIES}")
        )

    def level(self, y: float, label: str) -> None:
        """A dashed horizontal line with its name above it."""
        place = self.sy(y)
        line = f"M{shown(self.left)} {shown(place)}H{shown(self.width - self.right)}"
        self.parts.append(element("path", d=line, class_="axis dashed"))
        self.labels.append(text(self.width - self.right - 4, place - 5, label, "soft small halo", "end"))

    def label(self, x: float, y: float, content: str) -> None:
        """A name beside a point, on the side where there is room."""
        place, room = self.sx(x), 7.0 * len(content)
        left = place + room > self.width - self.right
        self.labels.append(
            text(place - 8 if left else place + 8, self.sy(y) + 4, content, "small halo", "end" if left else "start")
        )

    def axes(self) -> str:
        bottom, right = self.height - self.bottom, self.width - self.right
        lines = []
        for value in self.sx.ticks():
            place = self.sx(value)
            lines.append(element("path", d=f"M{shown(place)} {shown(bottom)}v4", class_="axis"))
            lines.append(text(place, bottom + 17, tick(value), "soft small", "middle"))
        for value in self.sy.ticks():
            place = self.sy(value)
            lines.append(element("path", d=f"M{shown(self.left)} {shown(place)}H{shown(right)}", class_="grid"))
            lines.append(text(self.left - 7, place + 4, tick(value), "soft small", "end"))
        lines.append(element("path", d=f"M{shown(self.left)} {shown(bottom)}H{shown(right)}", class_="axis"))
        lines.append(text((self.left + right) / 2, self.height - 8, self.x_label, "", "middle"))
        lines.append(text(14, (self.top + bottom) / 2, self.y_label, "", "middle", rotate=True))
        return "".join(lines)

    def picture(self, name: str, description: str) -> str:
        return picture(
            self.width, self.height, self.axes(), *self.parts, *self.labels, name=name, description=description
        )


def tick(value: float) -> str:
    """A number beside an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """A line of marks and names, as HTML: it wraps where a picture cannot."""
    shapes = [
        element(
            "span",
            element("svg", mark(8, 8, series, name), viewBox="0 0 16 16", width=16, height=16,
                    aria_hidden="true"),
            " " + escape(name),
        )
        for name, series in entries
    ]  # fmt: skip
    return element("p", *shapes, class_="legend")
