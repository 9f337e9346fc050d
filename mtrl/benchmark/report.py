"""The report: one HTML file that opens offline, with everything in it - styles, script, charts, videos, protocol."""

from __future__ import annotations

import base64
import json
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mtrl.benchmark import charts
from mtrl.benchmark.analysis import Analysis, Entry, SuiteResult, analyse
from mtrl.benchmark.spec import PROTOCOL, dump_spec
from mtrl.benchmark.stats import Estimate
from mtrl.benchmark.store import Run, Store
from mtrl.benchmark.svg import COLOURS, DASHES, Bar, forest, line_chart
from mtrl.benchmark.tables import ranked
from mtrl.files import write_text
from mtrl.runs import VIDEOS

REPORT = "report.html"
_VIDEO_TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".webm": "video/webm"}
_VIDEO_BYTES = 12_000_000  # of all embedded videos; more are named, not embedded
_POLICY = (  # the browser itself makes sure that the page needs nothing but itself
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:"
)
_MANY_TASKS = 60  # more small charts than this help nobody


def write_report(store: Store, path: Path, *, actions: str = "greedy", videos: bool = True, live: str = "") -> Path:
    """Write the report of a store.

    Args:
        store: what ``mtrl.benchmark.store.load`` found.
        path: the HTML file.
        actions: ``greedy`` or ``sampled`` evaluations.
        videos: embed the best and worst episodes that were filmed.
        live: a script for a page that is served while runs go on.
    """
    write_text(path, render(analyse(store, actions), videos=videos, live=live))
    return path


def render(analysis: Analysis, *, videos: bool = True, live: str = "") -> str:
    """The whole page."""
    store = analysis.store
    page = _Page({agent: i for i, agent in enumerate(analysis.agents)})
    title = store.spec.name if store.spec else store.root.resolve().name
    assets = files("mtrl.benchmark") / "assets"
    css, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    chips = "".join(
        f'<button class="chip {page.colour(agent)}" value="{i}" aria-pressed="true" '
        f'title="click: show or hide; double click: only this one">{escape(agent)}</button>'
        for agent, i in page.index.items()
    )
    sections = [
        page.short_answer(analysis),
        page.headline(analysis),
        page.curves(analysis),
        page.comparison(analysis),
        page.tasks(analysis),
        page.transfer(analysis),
        page.cost(analysis),
        page.episodes(analysis) if videos else "",
        page.runs(store),
        page.protocol(analysis),
    ]
    return f"""<!doctype html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mtrl">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}{"; connect-src 'self'" if live else ""}">
<link rel="icon" href="data:,">
<title>{escape(title)} - mtrl benchmark</title>
<style>{css}</style>
</head>
<body>
<header><div><h1>{escape(title)}</h1>{_lead(analysis)}</div></header>
<nav class="bar" aria-label="agents"><div>{chips}<button id="theme" class="end">light / dark</button></div></nav>
<main>{"".join(sections)}
<footer>Written by <code>mtrl report</code> on {time.strftime("%Y-%m-%d %H:%M %Z")}. It needs no network.</footer>
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="agents">{_json(list(page.index))}</script>
<script>{script}</script>{f"<script>{live}</script>" if live else ""}
</body>
</html>
"""


@dataclass(frozen=True)
class _Page:
    """Writes the sections; ``index`` numbers the agents: their colour and what hides with them."""

    index: Mapping[str, int]

    def colour(self, agent: str) -> str:
        i = self.index[agent]
        return f"c{i % len(COLOURS)} d{i // len(COLOURS) % len(DASHES)}"

    def row(self, agent: str, cells: Sequence[str], extra: str = "") -> str:
        label = f'<td><span class="agent">{escape(agent)}</span>{extra}</td>'
        return f'<tr data-agent="{self.index[agent]}" class="{self.colour(agent)}">{label}{"".join(cells)}</tr>'

    def short_answer(self, analysis: Analysis) -> str:
        if not analysis.suites:
            why = "No run has finished yet"
            if any(run.usable for run in analysis.store.runs):
                why = (
                    f"No finished run was evaluated with {analysis.actions} actions (eval.stochastic adds sampled ones)"
                )
            return _section("In short", f"<p>{why}: there is nothing to compare.</p>")
        parts = [
            f'<p class="verdict"><b>{escape(suite.suite)}</b>: {escape(suite.verdict)}</p>' for suite in analysis.suites
        ]
        where: dict[str, list[str]] = {}
        for suite in analysis.suites:
            for text in suite.cautions:
                where.setdefault(text, []).append(suite.suite)
        if where:
            items = ""
            for text, named in where.items():
                place = "" if len(named) == len(analysis.suites) else f"{', '.join(named)}: "
                items += f"<li>{escape(place + text)}</li>"
            parts.append(f'<div class="caution"><b>What may not be concluded</b><ul>{items}</ul></div>')
        return _section("In short", "".join(parts))

    def headline(self, analysis: Analysis) -> str:
        parts = [
            f'<p class="note">Normalised score of the last checkpoint, {analysis.actions} actions: 0 is a random '
            "policy, 1 the reference. IQM is the mean of the middle half of all runs x tasks; gap is how far runs fall "
            f"short of 1 on average. Intervals are 95 %, from a bootstrap of {analysis.draws:,} replications that "
            "resamples runs within each task. A core-hour is an hour of training on one core.</p>"
        ]
        if analysis.overall:
            rows = "".join(
                self.row(agent, [*_estimates(estimates), _td(str(seeds))])
                for agent, (seeds, estimates) in analysis.overall.items()
            )
            head = ("agent", "", "IQM (95 % interval)", "median", "mean", "gap", "seeds")
            parts.append(f"<h3>over all suites</h3>{_table(head, rows)}")
        for suite in analysis.suites:
            rows = "".join(self.row(entry.agent, self._headline_cells(entry)) for entry in suite.entries)
            head = ("agent", "", "IQM (95 % interval)", "median", "mean", "gap", "success", "seeds")
            parts.append(f"<h3>{escape(suite.suite)}</h3>{_table((*head, 'one core-hour buys'), rows)}")
        return _section("Results", "".join(parts)) if analysis.suites else ""

    def _headline_cells(self, entry: Entry) -> list[str]:
        success = "-" if entry.success is None else f"{100 * entry.success.mean():.0f} %"
        buys = escape(entry.one_core_hour_buys())
        return [*_estimates(entry.estimates), _td(success), _td(str(len(entry.seeds))), _td(buys)]

    def curves(self, analysis: Analysis) -> str:
        figures = []
        for suite in analysis.suites:
            about, label = f"Learning curves on {suite.suite}", "IQM of the score"
            timed = charts.curves(suite, self.index, hours=True)
            steps = line_chart(charts.curves(suite, self.index), "environment steps", label, describe=about)
            hours = line_chart(timed, "core-hours of training", label, describe=about) if timed else ""
            views = _views(("environment steps", steps), ("core-hours", hours) if timed else None)
            figures.append(f"<figure><figcaption><b>{escape(suite.suite)}</b></figcaption>{views}</figure>")
        note = '<p class="note">IQM over runs and tasks at each evaluation; the band is its 95 % interval.</p>'
        small = "".join(self._task_curves(suite) for suite in analysis.suites if len(suite.tasks) <= _MANY_TASKS)
        return (
            _section("Learning curves", f'{note}<div class="grid">{"".join(figures)}</div>{small}') if figures else ""
        )

    def _task_curves(self, suite: SuiteResult) -> str:
        figures = []
        for task in suite.tasks:
            series = charts.task_curves(suite, task, self.index)
            chart = line_chart(
                series, "environment steps", "mean score", describe=f"{task} over training", compact=True
            )
            figures.append(f"<figure><figcaption>{escape(_short(task, suite))}</figcaption>{chart}</figure>")
        if len(figures) < 2:
            return ""
        summary = f"{escape(suite.suite)}: each of the {len(figures)} tasks (mean over runs)"
        return _details(summary, f'<div class="grid small">{"".join(figures)}</div>')

    def comparison(self, analysis: Analysis) -> str:
        parts = []
        for suite in analysis.suites:
            lines = charts.profiles(suite, self.index)
            chart = line_chart(lines, "score", "share of runs x tasks above", y_range=(0, 1), describe="profiles")
            figures = f"<figure><figcaption>performance profile</figcaption>{chart}</figure>"
            bars = [
                Bar(f"{a} > {b}", found.value, found.low, found.high, self.index[a], self.index[b])
                for a, b, found in ranked(suite)
            ]
            if bars:
                chart = forest(bars, "probability of improvement", reference=0.5)
                caption = "<figcaption>how likely a run of one beats a run of the other</figcaption>"
                figures += f"<figure>{caption}{chart}</figure>"
            parts.append(f'<h3>{escape(suite.suite)}</h3><div class="grid">{figures}</div>')
        note = (
            '<p class="note">A profile that lies above another everywhere belongs to the better agent. A difference is '
            "claimed only where the whole interval of the probability lies on one side of one half.</p>"
        )
        return _section("Who beats whom", note + "".join(parts)) if parts else ""

    def tasks(self, analysis: Analysis) -> str:
        parts = []
        for suite in analysis.suites:
            success = [e for e in suite.entries if e.success is not None]
            views = _views(
                ("score", self._heat(suite, {e.agent: e.scores for e in suite.entries})),
                ("success", self._heat(suite, {e.agent: e.success for e in success})) if success else None,
                ("lost since its best", self._heat(suite, {e.agent: e.forgotten[None] for e in suite.entries}))
                if any(len(e.curve.steps) > 1 for e in suite.entries)
                else None,
            )
            parts.append(f"<div><h3>{escape(suite.suite)}</h3>{views}</div>")
        note = (
            '<p class="note">Mean over runs at the end of training. "Lost since its best" is the best mean score of '
            "earlier evaluations minus the last: forgetting, and the noise of a maximum.</p>"
        )
        return _section("Task by task", note + "".join(parts)) if parts else ""

    def _heat(self, suite: SuiteResult, tables: Mapping[str, np.ndarray | None]) -> str:
        entries = [entry for entry in suite.entries if tables.get(entry.agent) is not None]
        head = "".join(
            f'<th data-agent="{self.index[e.agent]}" class="{self.colour(e.agent)}"><span class="agent">'
            f"{escape(e.agent)}</span></th>"
            for e in entries
        )
        rows = []
        for task in suite.tasks:
            cells = []
            for entry in entries:
                agent, table = f'data-agent="{self.index[entry.agent]}"', tables[entry.agent]
                if task not in entry.tasks or table is None:
                    cells.append(f'<td {agent}><span class="cell none">-</span></td>')
                    continue
                column = table[:, entry.tasks.index(task)]
                value, shade = float(column.mean()), float(np.clip(column.mean(), 0, 1))
                spread = f", runs from {column.min():.3f} to {column.max():.3f}" if len(column) > 1 else ""
                tip = escape(f"{entry.agent} on {task}: {value:.3f}{spread}", quote=True)
                full = " full" if shade > 0.66 else ""
                cell = f'<span class="cell{full}" style="--v:{shade:.2f}" data-tip="{tip}">{value:.2f}</span>'
                cells.append(f"<td {agent}>{cell}</td>")
            rows.append(f"<tr><td>{escape(_short(task, suite))}</td>{''.join(cells)}</tr>")
        table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        return f'<div class="wide"><table class="heat">{table}</table></div>'

    def transfer(self, analysis: Analysis) -> str:
        if not analysis.transfer:
            return ""
        rows = "".join(
            self.row(
                one.agent,
                [
                    f'<td class="left">{escape(one.task)}</td>',
                    _td(f"{one.alone:.2f} in {escape(one.alone_in)}"),
                    _td(f"{one.mixed:.2f} in {escape(one.mixed_in)}"),
                    _td(f"{one.mixed - one.alone:+.2f}", "strong"),
                ],
            )
            for one in analysis.transfer
        )
        note = '<p class="note">Mean score of a task, trained among few and among more tasks.</p>'
        return _section("Transfer", note + _table(("agent", "task", "fewer tasks", "more tasks", "difference"), rows))

    def cost(self, analysis: Analysis) -> str:
        rows = []
        for suite in analysis.suites:
            for entry in suite.entries:
                if entry.core_hours is None:
                    continue
                reached = entry.reached
                hours = f", {reached.hours:.2g} core-hours" if reached.hours is not None else ""
                when = f" after {reached.steps:,.0f} steps{hours}" if reached.steps is not None else ""
                cells = (
                    f'<td class="left">{escape(suite.suite)}</td>',
                    _td(f"{entry.steps_per_second or 0:,.0f}"),
                    _td("-" if entry.memory is None else f"{entry.memory / 2**30:.2f} GiB"),
                    _td(f"{entry.core_hours:.3g}"),
                    _td(f"{entry.steps_per_core_hour or 0:,.0f} steps: {escape(entry.one_core_hour_buys())}", "strong"),
                    _td(f"{reached.runs} of {reached.of}{when}"),
                )
                rows.append(self.row(entry.agent, cells))
        if not rows:
            return ""
        level = analysis.suites[0].entries[0].reached.level
        head = (
            "agent",
            "suite",
            "steps / s",
            "peak memory",
            "core-hours a run",
            "one core-hour buys",
        )
        note = (
            '<p class="note">Core-hours are seconds of training, evaluations left out, times the cores that a run '
            f"keeps busy. They hold for this machine: {escape(machines(analysis.store.runs) or 'not recorded')}. Runs "
            "that share a busy machine look slower than they are. Reached: runs whose mean score got there; the median "
            "of when.</p>"
        )
        return _section("Speed, memory, cost", note + _table((*head, f"reached {level:g}"), "".join(rows), left=2))

    def episodes(self, analysis: Analysis) -> str:
        figures, left, skipped = [], _VIDEO_BYTES, []
        for suite in analysis.suites:
            for entry in suite.entries:
                best = entry.runs[int(entry.scores.mean(1).argmax())]
                filmed = [path for run in best.parts or (best,) for path in run.folder.glob(f"{VIDEOS}/*")]
                for path in sorted(filmed):
                    kind = _VIDEO_TYPES.get(path.suffix)
                    if kind is None:
                        continue
                    if path.stat().st_size > left:
                        skipped.append(str(path))
                        continue
                    left -= path.stat().st_size
                    data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
                    label = f"{entry.agent} on {suite.suite}: {path.stem.partition('-')[0]} episodes"
                    shown = f'<img src="{data}" alt="{escape(label)}">'
                    if kind.startswith("video"):
                        shown = f'<video src="{data}" aria-label="{escape(label)}" controls loop muted></video>'
                    caption = f"<figcaption>{escape(label)}, seed {best.seed}</figcaption>"
                    figures.append(f'<figure data-agent="{self.index[entry.agent]}">{caption}{shown}</figure>')
        if not figures and not skipped:
            return ""
        more = f'<p class="note">Too large to embed: {escape(", ".join(skipped))}</p>' if skipped else ""
        note = '<p class="note">Of each agent\'s best run: the episodes with the highest and the lowest returns.</p>'
        return _section("Episodes", f'{note}<div class="grid episodes">{"".join(figures)}</div>{more}')

    def runs(self, store: Store) -> str:
        counts: dict[str, int] = {}
        for run in store.runs:
            counts[run.status] = counts.get(run.status, 0) + 1
        summary = ", ".join(f'<span class="status-{name}">{count} {name}</span>' for name, count in counts.items())
        rows = "".join(
            self.row(
                run.agent,
                [
                    f'<td class="left">{escape(run.suite)}</td>',
                    _td(str(run.seed)),
                    _td(f"{run.step:,} / {run.budget:,}"),
                    _td(run.status, f"status-{run.status}"),
                    _td("-" if run.cost is None or not run.cost.seconds else f"{run.cost.seconds / 60:.1f} min"),
                ],
            )
            for run in store.runs
        )
        table = _table(("agent", "suite", "seed", "steps", "status", "training"), rows, left=2)
        going_on = bool(set(counts) - {"finished", "imported"})
        return _section("Runs", f"<p>{summary}.</p>{_details('every run', table, going_on)}")

    def protocol(self, analysis: Analysis) -> str:
        store = analysis.store
        parts = [
            f"<p>Protocol version {PROTOCOL}: seeded evaluation episodes that are the same for every agent, on "
            f"environments of their own, {analysis.actions} actions, the last checkpoint and never the best; every "
            "task counts equally (<code>docs/protocol.md</code>).</p>"
        ]
        parts += [f"<p>{text}</p>" for text in _evaluations(store)]
        protocols = {task: kept for run in store.runs for task, kept in run.protocols.items() if kept}
        if protocols:
            keys = list(dict.fromkeys(key for kept in protocols.values() for key in kept))
            rows = ""
            for task, kept in protocols.items():
                cells = "".join(_td(escape(str(kept.get(key, "-"))), "left") for key in keys)
                rows += f"<tr><td>{escape(task)}</td>{cells}</tr>"
            parts.append(_details("what each task was", _table(("task", *keys), rows, left=1 + len(keys))))
        if store.spec:
            name = f"{escape(store.spec.name)}.yaml"
            parts.append(f"<h3>The whole benchmark</h3><pre>mtrl benchmark {name} --out DIR</pre>")
            parts.append(_details(name, f"<pre>{escape(dump_spec(store.spec))}</pre>"))
        commands = [_command(part) for run in store.runs if run.config for part in run.parts or (run,)]
        if commands:
            shown = escape("\n".join(commands))
            parts.append("<h3>Its runs</h3>" + _details(f"{len(commands)} commands", f"<pre>{shown}</pre>"))
        packages = versions(store.runs)
        if packages:
            rows = "".join(f"<tr><td>{escape(k)}</td>{_td(escape(v), 'left')}</tr>" for k, v in packages.items())
            table = _table(("package", "version"), rows, left=2)
            parts.append("<h3>Versions</h3>" + _details(f"{len(packages)} packages", table))
        return _section("Protocol and how to rerun", "".join(parts))


def _evaluations(store: Store) -> list[str]:
    """How runs were evaluated; first of all that they do not compare, if not all alike."""
    agents: dict[tuple[int, int], dict[str, None]] = {}
    for run in (run for run in store.runs if run.config):
        settings = run.config["eval"]
        agents.setdefault((settings["episodes"], settings["seed"]), {})[run.agent] = None
    texts = [
        f"{episodes} episodes per task and evaluation, evaluation seed {seed}"
        + (f": {escape(', '.join(own))}." if len(agents) > 1 else ".")
        for (episodes, seed), own in agents.items()
    ]
    if len(agents) > 1:
        texts.insert(0, "<b>Not all runs met the same evaluation episodes: their differences are partly those.</b>")
    return texts


def _short(task: str, suite: SuiteResult) -> str:
    """The task's name without its family, where all tasks of the suite are of one."""
    families = {name.partition("/")[0] for name in suite.tasks}
    return task.partition("/")[2] if len(families) == 1 and "/" in task else task


def _lead(analysis: Analysis) -> str:
    store, spec = analysis.store, analysis.store.spec
    ours = [run for run in store.runs if run.cost]
    hours = sum(run.cost.core_hours for run in ours if run.cost)
    planned = f" of about {spec.core_hours:g} planned" if spec and spec.core_hours else ""
    seeds = len({run.seed for run in store.runs})
    facts = {
        "agents": len(analysis.agents),
        "suites": len({run.suite for run in store.runs}),
        "tasks": len({row["task"] for run in store.runs for row in run.rows}),
        "seeds": seeds,
        "runs": f"{sum(run.usable for run in store.runs)} of {len(store.runs)} finished",
        "core-hours": f"{hours:.3g}{planned}" if ours else "",
        "machine": machines(store.runs),
        "protocol": f"version {PROTOCOL}",
    }
    items = "".join(f"<li>{name} <b>{escape(str(value))}</b></li>" for name, value in facts.items() if value != "")
    about = f"<p>{escape(spec.about)}</p>" if spec and spec.about else ""
    return f'{about}<ul class="facts">{items}</ul>'


def machines(runs: Iterable[Run]) -> str:
    """What they ran on, in words."""
    found = [run.cost.hardware for run in runs if run.cost and run.cost.hardware]
    names = dict.fromkeys(f"{one.get('cores', '?')} cores of {one.get('cpu', 'an unknown processor')}" for one in found)
    gpus = dict.fromkeys(str(one["gpu"]) for one in found if one.get("gpu"))
    return "; ".join([*names, *gpus])


def versions(runs: Iterable[Run]) -> dict[str, str]:
    """Package -> all its versions in these runs."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.versions.items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def _command(run: Run) -> str:
    if run.command:
        return shlex.join(run.command)
    return f"mtrl train {run.folder}/config.yaml --out DIR"


def _estimates(estimates: Mapping[str, Estimate]) -> list[str]:
    iqm = estimates["IQM"]
    left, right, dot = (100 * float(np.clip(value, 0, 1)) for value in (iqm.low, iqm.high, iqm.value))
    bar = (
        f'<span class="interval"><i style="left:{left:.1f}%;width:{max(right - left, 0.8):.1f}%"></i>'
        f'<b style="left:{dot:.1f}%"></b></span>'
    )
    shown = f"<b>{iqm.value:.3f}</b> ({iqm.low:.3f} to {iqm.high:.3f})"
    rest = [estimates[name] for name in ("median", "mean", "optimality gap")]
    cells = [_td(f'<span data-tip="95 %: {one.low:.3f} to {one.high:.3f}">{one.value:.3f}</span>') for one in rest]
    return [_td(bar), _td(shown), *cells]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _details(summary: str, body: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{summary}</summary>{body}</details>"


def _views(*views: tuple[str, str] | None) -> str:
    """Several views of the same thing and the buttons to choose between them."""
    shown = [view for view in views if view is not None]
    if len(shown) == 1:
        return shown[0][1]
    buttons = "".join(
        f'<button value="{escape(name)}" aria-pressed="false">{escape(name)}</button>' for name, _ in shown
    )
    bodies = "".join(f'<div data-view="{escape(name)}">{body}</div>' for name, body in shown)
    return f'<div class="choice" role="group">{buttons}</div>{bodies}'


def _table(head: Sequence[str], rows: str, left: int = 1) -> str:
    cells = "".join(f"<th{' class=left' if i < left else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>'


def _td(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def _json(value: Any) -> str:
    return json.dumps(value).replace("<", "\\u003c")
