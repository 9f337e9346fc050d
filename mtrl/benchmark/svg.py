"""Charts as SVG text, written by hand: colours are CSS variables, so that a page decides how they look.

A chart is 460 x 300 units, so that its text stays readable from a phone to half a desktop page. ``standalone`` makes a
file of one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from mtrl.types import Array

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 12, 44
COLOURS = ("#2f6fed", "#e0533d", "#12946f", "#a24fd8", "#c98a00", "#0a93b5", "#d6397f", "#66758a")
DASHES = ("", "7 4", "2 4", "9 3 2 3")  # a new pattern for every round through the colours


@dataclass(frozen=True)
class Series:
    """One agent's line: points [n], and the ends of their intervals [n] or None."""

    index: int
    label: str
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None
    steps: bool = False  # a staircase instead of straight lines


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    y_range: tuple[float, float] | None = None,
    describe: str = "",
    compact: bool = False,
) -> str:
    """An SVG line chart with interval bands, and the data that hovering needs in its ``data-chart`` attribute.

    Args:
        series: finite points only.
        x_label: below the axis.
        y_label: above the axis' end.
        y_range: of the axis; None: 0 .. 1, widened to what the points need.
        describe: for those who cannot see it.
        compact: half the height, for small multiples.
    """
    height = HEIGHT // 2 + 20 if compact else HEIGHT
    xs = np.concatenate([one.x for one in series]) if series else np.zeros(1)
    ys = np.concatenate([part for one in series for part in (one.y, one.low, one.high) if part is not None] or [[0.0]])
    x0, x1 = (0.0, float(xs.max()) or 1.0) if xs.min() >= 0 else (float(xs.min()), float(xs.max()))
    y0, y1 = y_range or (min(0.0, float(ys.min())), max(1.0, float(ys.max())))

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return height - BOTTOM - (y - y0) / (y1 - y0) * (height - TOP - BOTTOM)

    parts = [_axes(px, py, (x0, x1), (y0, y1), height, x_label, y_label, compact)]
    for one in series:
        parts.append(f'<g data-agent="{one.index}" class="{_classes(one.index)}">')
        if one.low is not None and one.high is not None and len(one.x) > 1:
            edge = [*zip(one.x, one.high, strict=True), *reversed([*zip(one.x, one.low, strict=True)])]
            parts.append(f'<path class="band" d="M{_path(edge, px, py)}Z"/>')
        if one.low is not None and one.high is not None and len(one.x) == 1:
            x, low, high = px(float(one.x[0])), py(float(one.low[0])), py(float(one.high[0]))
            parts.append(f'<path class="line" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        points = [*zip(one.x, one.y, strict=True)]
        if one.steps:
            points = [p for a, b in itertools.pairwise(points) for p in (a, (b[0], a[1]))] + points[-1:]
        parts.append(f'<path class="line" d="M{_path(points, px, py)}"/>')
        if len(one.x) <= 30 and not one.steps:
            marks = (f'<circle class="dot" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6"/>' for x, y in points)
            parts.extend(marks)
        parts.append("</g>")
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{height - BOTTOM}" visibility="hidden"/>')
    data = {
        "box": [LEFT, WIDTH - RIGHT],
        "x": [x0, x1],
        "xLabel": x_label,
        "series": [
            {
                "agent": one.index,
                "x": _round(one.x),
                "y": _round(one.y),
                **({"low": _round(one.low), "high": _round(one.high)} if one.low is not None else {}),
            }
            for one in series
        ],
    }
    attribute = escape(json.dumps(data, separators=(",", ":")), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(describe or y_label)}" '
        f'data-chart="{attribute}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class Bar:
    """One row of a forest plot."""

    label: str
    value: float
    low: float
    high: float
    index: int
    rival: int | None = None  # the other agent of a pair: the row hides with either


def forest(bars: Sequence[Bar], x_label: str, *, reference: float | None = None, describe: str = "") -> str:
    """Point estimates with their intervals, one under the other, on an axis from 0 to 1."""
    row, left = 26, 188
    height = TOP + row * len(bars) + 40
    bottom = height - 40

    def px(x: float) -> float:
        return left + min(max(x, 0.0), 1.0) * (WIDTH - left - RIGHT - 44)

    parts = [f'<g class="axis"><line x1="{left}" x2="{px(1):.1f}" y1="{bottom}" y2="{bottom}"/>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{px(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{px(0.5):.1f}" y="{bottom + 34}" text-anchor="middle" class="name">{escape(x_label)}</text>'
    )
    parts.append("</g>")
    if reference is not None:
        parts.append(
            f'<line class="reference" x1="{px(reference):.1f}" x2="{px(reference):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
    for i, bar in enumerate(bars):
        y = TOP + row * (i + 0.5)
        hides = f' data-rival="{bar.rival}"' if bar.rival is not None else ""
        tip = escape(f"{bar.label}: {bar.value:.3f} ({bar.low:.3f} to {bar.high:.3f})", quote=True)
        parts.append(
            f'<g data-agent="{bar.index}"{hides} class="{_classes(bar.index)}" data-tip="{tip}">'
            f'<rect class="hit" x="0" y="{y - row / 2:.1f}" width="{WIDTH}" height="{row}"/>'
            f'<text x="{left - 10}" y="{y + 4.5:.1f}" text-anchor="end">{escape(fit(bar.label, 24))}</text>'
            f'<line class="whisker" x1="{px(bar.low):.1f}" x2="{px(bar.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="dot" cx="{px(bar.value):.1f}" cy="{y:.1f}" r="4.5"/>'
            f'<text x="{WIDTH - RIGHT}" y="{y + 4.5:.1f}" text-anchor="end">{bar.value:.2f}</text></g>'
        )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(describe or x_label)}">'
        f"{''.join(parts)}</svg>"
    )


def standalone(svg: str, labels: Sequence[str] = ()) -> str:
    """A chart as an SVG file of its own, in the light colours, with a legend for ``labels`` (series 0, 1, ...)."""
    style = (
        "text{font:12px system-ui,sans-serif;fill:#444}.axis line{stroke:#999}.axis .grid{stroke:#e4e6ea}"
        ".name{fill:#222}.line{fill:none;stroke:var(--c);stroke-width:2.2}.band{fill:var(--c);opacity:.16}"
        ".dot{fill:var(--c)}.whisker{stroke:var(--c);stroke-width:3}.cursor,.hit{display:none}"
        ".reference{stroke:#888;stroke-dasharray:4 4}"
    )
    style += "".join(f".c{i}{{--c:{colour}}}" for i, colour in enumerate(COLOURS))
    style += "".join(f".d{i} .line,.d{i}.line{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES) if dash)
    start, _, rest = svg.partition(">")
    box = start.partition('viewBox="')[2].partition('"')[0].split()
    height = float(box[3])
    legend, x, y = [], LEFT, height + 6
    for i, label in enumerate(labels):
        width = 34 + 7 * len(label)
        if x + width > WIDTH and x > LEFT:
            x, y = LEFT, y + 20
        legend.append(f'<g class="{_classes(i)}"><path class="line" d="M{x} {y}h20"/>')
        legend.append(f'<text x="{x + 26}" y="{y + 4}">{escape(label)}</text></g>')
        x += width
    total = y + 14 if labels else height
    size = f'width="{WIDTH}" height="{total:.0f}" viewBox="0 0 {WIDTH} {total:.0f}"'
    paper = f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
    body = rest.removesuffix("</svg>") + "".join(legend)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{paper}{body}</svg>\n'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    span = high - low
    size = 10 ** math.floor(math.log10(span / count))
    step = size * next(k for k in (1, 2, 2.5, 5, 10) if span / (k * size) <= count + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(number: float) -> str:
    """A number for an axis: 1500000 is 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}" if number == 0 or abs(number) >= 1e-3 else f"{number:.0e}"


def _axes(
    px: Callable[[float], float],
    py: Callable[[float], float],
    x: tuple[float, float],
    y: tuple[float, float],
    height: int,
    x_label: str,
    y_label: str,
    compact: bool,
) -> str:
    bottom = height - BOTTOM
    parts = ['<g class="axis">']
    for tick in ticks(*y, 3 if compact else 5):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{py(tick) + 4:.1f}" text-anchor="end">{short(round(tick, 6))}</text>')
    for tick in ticks(*x):
        parts.append(f'<text x="{px(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{short(round(tick, 9))}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    if not compact:
        middle = (TOP + bottom) / 2
        parts.append(
            f'<text class="name" transform="rotate(-90 11 {middle})" x="11" y="{middle}" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
    return "".join(parts) + "</g>"


def _path(points: Sequence[tuple[float, float]], px: Callable[[float], float], py: Callable[[float], float]) -> str:
    return "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)


def _classes(index: int) -> str:
    return f"c{index % len(COLOURS)} d{index // len(COLOURS) % len(DASHES)}"


def _round(values: Array | None) -> list[float]:
    return (
        []
        if values is None
        else [float(f"{value:.4g}") if abs(value) < 100 else round(float(value), 1) for value in values]
    )


def fit(text: str, length: int) -> str:
    """``text``, cut to a length."""
    return text if len(text) <= length else text[: length - 1] + "…"
