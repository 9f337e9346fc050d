"""Tables and plots for a paper: Markdown, LaTeX, SVG, and PNG (which needs the extra ``report``: matplotlib)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtrl.benchmark import charts
from mtrl.benchmark.analysis import Analysis, analyse
from mtrl.benchmark.spec import slug
from mtrl.benchmark.store import Store
from mtrl.benchmark.svg import COLOURS, DASHES, Series, line_chart, standalone
from mtrl.benchmark.tables import latex, markdown
from mtrl.files import write_text

_STYLES = ("solid", "dashed", "dotted", "dashdot")  # as DASHES


def write_paper(store: Store, folder: Path, *, actions: str = "greedy") -> list[Path]:
    """Write ``tables.md``, ``tables.tex`` and, for each suite, learning curves and performance profiles.

    Returns:
        the files written; no PNG if matplotlib is not installed.
    """
    analysis = analyse(store, actions)
    written = [folder / "tables.md", folder / "tables.tex"]
    write_text(written[0], markdown(analysis))
    write_text(written[1], latex(analysis))
    for name, series, x_label, y_label in _charts(analysis):
        svg = line_chart(series, x_label, y_label, describe=name)
        write_text(folder / f"{name}.svg", standalone(svg, analysis.agents))
        written.append(folder / f"{name}.svg")
        if find_spec("matplotlib"):
            chart = partial(_draw, series=series, x_label=x_label, y_label=y_label)
            written.append(save_png(folder / f"{name}.png", chart))
    return written


def _charts(analysis: Analysis) -> list[tuple[str, list[Series], str, str]]:
    index = {agent: i for i, agent in enumerate(analysis.agents)}
    found = []
    for suite in analysis.suites:
        name = slug(suite.suite)
        found.append((f"curves-{name}", charts.curves(suite, index), "environment steps", "IQM of the score"))
        found.append((f"profiles-{name}", charts.profiles(suite, index), "score", "share of runs x tasks above"))
    return found


def save_png(path: Path, plot: Callable[[Any, int], None], count: int = 1, columns: int = 1) -> Path:
    """Write ``count`` charts, each put on its axes by ``plot(axes, k)``, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")  # without pyplot, whose state is global
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows, columns, squeeze=False).flat
    for k, one in enumerate(axes):
        if k < count:
            plot(one, k)
        else:
            one.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp.png")
    figure.savefig(part, dpi=200)
    return part.replace(path)


def _draw(axes: Any, k: int, *, series: Sequence[Series], x_label: str, y_label: str) -> None:
    draw(axes, series, x_label, y_label)


def draw(axes: Any, series: Sequence[Series], x_label: str, y_label: str) -> None:
    """A line chart, as ``svg.line_chart`` draws it, on matplotlib's axes."""
    for one in series:
        colour = COLOURS[one.index % len(COLOURS)]
        style = _STYLES[one.index // len(COLOURS) % len(DASHES)]
        shape = {"drawstyle": "steps-post"} if one.steps else {}
        axes.plot(one.x, one.y, color=colour, linestyle=style, label=one.label, **shape)
        if one.low is not None:
            step = {"step": "post"} if one.steps else {}
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.15, linewidth=0, **step)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
