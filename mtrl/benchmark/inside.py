"""Charts of what networks do inside while they learn: the records ``diagnostics/*`` of runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mtrl import registry
from mtrl.benchmark.attempt import BenchmarkError
from mtrl.benchmark.paper import draw, save_png
from mtrl.benchmark.svg import WIDTH, Series, fit, line_chart, standalone
from mtrl.files import write_text
from mtrl.log import METRICS, read

STEPS = "environment steps"
COMMON = {
    "expert_cosine": "cosine of experts, mean over pairs",
    "expert_residual": "share of an expert that Gram-Schmidt leaves, least",
    "effective_rank": "effective rank of the features",
    "dormant": "share of dormant units",
    "gradient_negative": "share of task pairs with conflicting gradients",
    "gradient_cosine": "cosine of the tasks' gradients, mean over pairs",
    "gradient_imbalance": "largest gradient norm over smallest",
}
FORMATS = (".svg", ".html", ".png")
_COLUMNS = 3
_TITLE = 24  # units above a chart
_NAME = 22  # letters of a run's name


@dataclass(frozen=True)
class Panel:
    """One chart and what its lines are called."""

    title: str
    series: tuple[Series, ...]

    @property
    def labels(self) -> list[str]:
        """In the order of the series' indices."""
        return [one.label for one in self.series]


def plot(runs: Sequence[Path], out: Path) -> Path:
    """Write all charts of the runs to one file: ``.svg``, ``.html``, or ``.png`` (needs matplotlib).

    Raises:
        BenchmarkError: a folder is no run, no run has diagnostics, or matplotlib is missing.
        UnknownNameError: another ending.
    """
    if out.suffix not in FORMATS:
        raise registry.UnknownNameError("format", out.suffix, FORMATS)
    found = panels(runs)
    if out.suffix == ".png":
        if not find_spec("matplotlib"):
            raise BenchmarkError("PNG needs matplotlib: pip install 'mtrl-suite[report]', or write .svg or .html")
        return save_png(out, lambda axes, k: _draw(axes, found[k]), len(found), _COLUMNS)
    charts = [_chart(panel) for panel in found]
    write_text(out, _page(found, charts) if out.suffix == ".html" else _sheet(found, charts))
    return out


def panels(runs: Sequence[Path]) -> list[Panel]:
    """What all runs have in common, a line for each network of each run; then the use of experts, task by task."""
    names = dict(zip(runs, _short(runs), strict=True))
    lines: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for run in runs:
        for (net, key), (steps, values) in _diagnostics(run).items():
            who = f"{names[run]} {net}".strip()
            use = re.fullmatch(r"(.+)_expert(\d+)", key)
            if key in COMMON:
                lines.setdefault(COMMON[key], []).append((who, steps, values))
            elif use:
                lines.setdefault(f"{use[1]}, {who}: use of experts", []).append((f"expert {use[2]}", steps, values))
    if not lines:
        raise BenchmarkError("these runs have no diagnostics: ppo and sac record them unless agent.inspect_every=0")
    order = [*COMMON.values()]
    titles = sorted(lines, key=lambda title: order.index(title) if title in order else len(order))
    return [
        Panel(title, tuple(Series(i, label, x, y) for i, (label, x, y) in enumerate(lines[title]))) for title in titles
    ]


def _diagnostics(run: Path) -> Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(network, what) -> steps [n], values [n]."""
    if not (run / METRICS).is_file():
        near = registry.nearest(run.name, [path.parent.name for path in run.parent.glob(f"*/{METRICS}")])
        raise BenchmarkError(f"{run} holds no run" + (f"; did you mean {run.parent / near}?" if near else ""))
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in read(run / METRICS):
        for key, value in record.items():
            root, _, rest = key.partition("/")
            net, _, what = rest.partition("/")
            if root == "diagnostics" and np.isfinite(value):
                points.setdefault((net, what), []).append((record["step"], float(value)))
    return {key: (np.array([x for x, _ in own]), np.array([y for _, y in own])) for key, own in points.items()}


def _short(runs: Sequence[Path]) -> list[str]:
    """What tells the runs' folders apart: the parts of their names that differ, cut where they are long."""
    parts = [run.resolve().name.split("--") for run in runs]
    if len({len(own) for own in parts}) == 1:
        differ = [k for k, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        parts = [[own[k] for k in differ] for own in parts]
    if not any(parts):  # the same run of several grids: where their paths differ
        whole = [run.resolve().parts for run in runs]
        start, end = (_same(one[::way] for one in whole) for way in (1, -1))
        parts = [["/".join(one[start : len(one) - end])] for one in whole]
    return [fit(" ".join(own), _NAME) for own in parts] if len(runs) > 1 else [""]


def _same(paths: Iterable[Sequence[str]]) -> int:
    """How many parts the paths have in common at their start."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False)))


def _chart(panel: Panel) -> str:
    return standalone(line_chart(panel.series, STEPS, "", describe=panel.title), panel.labels).strip()


def _draw(axes: Any, panel: Panel) -> None:
    draw(axes, panel.series, STEPS, "")
    axes.set_title(panel.title, fontsize="small", loc="left")
    top = max(1.0, *(float(one.y.max()) for one in panel.series))
    axes.set_ylim(min(0.0, *(float(one.y.min()) for one in panel.series)), 1.02 * top)


def _page(found: Sequence[Panel], charts: Sequence[str]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(panel.title)}</figcaption>{chart}</figure>"
        for panel, chart in zip(found, charts, strict=True)
    )
    style = "body{font:14px system-ui,sans-serif;display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}"
    head = f'<meta charset="utf-8"><title>diagnostics</title><style>{style}</style>'
    return f'<!doctype html><html lang="en">{head}{figures}\n'


def _sheet(found: Sequence[Panel], charts: Sequence[str]) -> str:
    """All charts in one SVG, row by row."""
    heights = [_TITLE + float(chart.partition('height="')[2].partition('"')[0]) for chart in charts]
    parts, y = [], 0.0
    for start in range(0, len(charts), _COLUMNS):
        row = range(start, min(start + _COLUMNS, len(charts)))
        for column, k in enumerate(row):
            x = column * WIDTH
            parts.append(f'<text class="name" x="{x + 12}" y="{y + 17}">{escape(found[k].title)}</text>')
            parts.append(charts[k].replace("<svg ", f'<svg x="{x}" y="{y + _TITLE}" ', 1))
        y += max(heights[k] for k in row)
    size = f"{min(_COLUMNS, len(charts)) * WIDTH} {y:.0f}"
    width, height = size.split()
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {size}">'
        f"{paper}{''.join(parts)}</svg>\n"
    )
