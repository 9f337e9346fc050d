"""Results that last: a grid's folder, finished or not, as a few small files that can be merged with later runs.

::

    DIR/README.md           the tables, and what made them
    DIR/rows.jsonl          every evaluation of every task
    DIR/runs.jsonl          every run: status, cost at its evaluations, versions, machine
    DIR/settings.yaml       what each agent was run with on each suite
    DIR/spec.yaml           the grid's spec, if there was one; of several, with the suites, agents and seeds of all
    DIR/curves-*.svg        IQM over training

Runs that a folder holds already stay in it. What would not compare is refused: another protocol, other settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mtrl.benchmark import charts
from mtrl.benchmark.analysis import Entry, Reached, SuiteResult, analyse, reached
from mtrl.benchmark.attempt import BenchmarkError
from mtrl.benchmark.engine import SPEC
from mtrl.benchmark.report import machines, versions
from mtrl.benchmark.settings import changed, essential
from mtrl.benchmark.spec import Spec, dump_spec, load_spec, slug
from mtrl.benchmark.store import Cost, Run, Store, load, settings_of
from mtrl.benchmark.svg import line_chart, standalone
from mtrl.benchmark.tables import markdown, rows_of
from mtrl.files import write_text

ROWS, RUNS, SETTINGS, README = "rows.jsonl", "runs.jsonl", "settings.yaml", "README.md"
IDENTITY = ("agent", "suite", "seed")
LEVELS = (0.5, 0.7, 0.8, 0.9)
_SHOWN = 4  # evaluations in a table
Settings = dict[str, dict[str, Any]]
"""``AGENT on SUITE`` (``, TASK alone``) -> fields of a run."""


def keep(sources: Sequence[Path], target: Path, command: str = "") -> list[Path]:
    """Write the runs of all sources, and those that ``target`` holds already, to ``target``.

    Of a run that comes twice (same agent, suite and seed) the one that is further is kept.

    Args:
        sources: folders of grids or of runs, or kept ones.
        target: where to.
        command: that made the runs, for the README.

    Returns:
        the files written.

    Raises:
        BenchmarkError: no runs, or runs that may not stand in one table; names the first difference.
    """
    stores, settings = [], Settings()
    places = [target, *sources] if is_kept(target) and target not in sources else sources
    for place in places:
        found, theirs = _read(place) if is_kept(place) else _of(load(place))
        for name in theirs:
            if name in settings and (apart := changed(settings[name], theirs[name])):
                raise BenchmarkError(f"{place}: {name} was run with other settings ({', '.join(apart)}): {_APART}")
        stores.append(found)
        settings |= theirs
    spec = _joint([store.spec for store in stores if store.spec])
    order = [*spec.agents] if spec else []
    order += [run.agent for store in stores for run in store.runs if run.agent not in order]
    runs = sorted(_merge(run for store in stores for run in store.runs), key=lambda run: order.index(run.agent))
    _comparable(runs, settings)
    return _write(Store(target, tuple(runs), spec), settings, command)


def read(folder: Path) -> Store:
    """Results in a folder: kept ones, or those of a grid, a folder of runs or one run.

    Raises:
        BenchmarkError: there are none, or a kept file is damaged.
    """
    return _read(folder)[0] if is_kept(folder) else load(folder)


def is_kept(folder: Path) -> bool:
    """Whether ``keep`` wrote it."""
    return (folder / RUNS).is_file()


def after(store: Store, step: int, actions: str) -> Store:
    """The runs on suites that have such an evaluation, as they were after it; those stopped before do not count.

    Args:
        store: what ``read`` found.
        step: environment steps of a run, of all its tasks together.
        actions: ``greedy`` or ``sampled``.

    Raises:
        BenchmarkError: no run was evaluated then.
    """
    store = replace(store, runs=tuple(map(_ended, store.runs)))
    there = {(row["step"], run.suite) for run in store.runs for row in run.rows if row["actions"] == actions}
    steps = {one for one, _ in there}
    if step not in steps:
        near = ", ".join(map(str, sorted(sorted(steps, key=lambda one: abs(one - step))[:4])))
        raise BenchmarkError(f"no evaluation with {actions} actions after {step} steps; the nearest: {near or 'none'}")
    suites = dict.fromkeys(run.suite for run in store.runs if (step, run.suite) in there)
    return replace(store, runs=tuple(run for suite in suites for run in at(store, suite, step).runs))


def _joint(specs: Sequence[Spec]) -> Spec | None:
    """The first, with what the others add, if all share the rest; else the last."""
    if not specs:
        return None
    if any((essential(spec.run), spec.threads) != (essential(specs[0].run), specs[0].threads) for spec in specs):
        return specs[-1]
    joint: dict[str, Any] = {"seeds": tuple(sorted({seed for spec in specs for seed in spec.seeds}))}
    for field in ("suites", "agents"):
        joint[field] = {}
        for spec in specs:
            joint[field] |= {name: part for name, part in getattr(spec, field).items() if name not in joint[field]}
    return specs[0].model_copy(update=joint)


_APART = "keep it in a folder of its own, or under another label"


def _of(store: Store) -> tuple[Store, Settings]:
    """What is kept of a store: no part of a run, costs at its evaluations, settings apart."""
    runs, settings = [], Settings()
    for run in store.runs:
        for part in run.parts or (run,):
            alone = f", {part.task} alone" if part.task else ""
            settings.setdefault(f"{run.agent} on {run.suite}{alone}", settings_of(part))  # as of the other seeds
        runs.append(replace(run, cost=_thin(run), config={}, parts=(), command=(), reason=""))
    return replace(store, runs=tuple(runs)), settings


def _thin(run: Run) -> Cost | None:
    """Marks at the evaluations and at the end."""
    if run.cost is None or not run.cost.marks:
        return run.cost
    last = run.cost.marks[-1][0]
    steps = sorted({min(row["step"], last) for row in run.rows} | {last})
    return replace(run.cost, marks=tuple((step, round(run.cost.seconds_at(step), 3)) for step in steps))


def _merge(runs: Iterable[Run]) -> list[Run]:
    best: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        key = (run.agent, run.suite, run.seed)
        other = best.setdefault(key, run)
        if (run.step, run.usable) == (other.step, other.usable) and [*run.rows] != [*other.rows]:
            named = f"{run.agent} on {run.suite}, seed {run.seed},"
            raise BenchmarkError(f"{named} comes twice, with other results: {_APART}")
        if (run.step, run.usable) > (other.step, other.usable):
            best[key] = run
    return list(best.values())


def _comparable(runs: Sequence[Run], settings: Settings) -> None:
    protocols = dict.fromkeys(run.protocol for run in runs)
    if len(protocols) > 1:
        raise BenchmarkError(f"runs of protocol versions {' and '.join(protocols)} do not compare: keep them apart")
    for field in ("episodes", "seed"):
        values = {part["eval"][field]: name for name, part in settings.items() if "eval" in part}
        if len(values) > 1:
            shown = "; ".join(f"{value} for {name}" for value, name in values.items())
            raise BenchmarkError(f"eval.{field} differs, so that the results do not compare: {shown}")


def _read(folder: Path) -> tuple[Store, Settings]:
    """What ``_write`` wrote."""
    rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in _lines(folder / ROWS, {*IDENTITY, "step", "actions", "task"}):
        rows.setdefault((row["agent"], row["suite"], row["seed"]), []).append(row)
    runs = []
    for kept in _lines(folder / RUNS, {*IDENTITY, "status", "cost"}):
        cost = kept.pop("cost")
        if cost is not None:
            cost = Cost(**{**cost, "marks": tuple((step, seconds) for step, seconds in cost["marks"])})
        own = rows.get((kept["agent"], kept["suite"], kept["seed"]), [])
        kept["tasks"] = tuple(kept.get("tasks", ()))
        runs.append(Run(**kept, rows=tuple(own), folder=folder, cost=cost))
    spec = load_spec(folder / SPEC) if (folder / SPEC).is_file() else None
    settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    return Store(folder, tuple(runs), spec), settings


def _lines(path: Path, names: Set[str]) -> Iterable[dict[str, Any]]:
    """The objects in a file of JSON lines, which hold at least these names."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}: a kept folder needs it") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not names <= {*found}:
            raise BenchmarkError(f"{path}: line {number} is damaged: take the file from where it was kept once more")
        yield found


def _write(store: Store, settings: Settings, command: str) -> list[Path]:
    target, lines = store.root, []
    for run in store.runs:
        names = ("agent", "suite", "seed", "status", "step", "budget", "protocol", "versions", "protocols", "tasks")
        lines.append({**{name: getattr(run, name) for name in names}, "cost": run.cost and vars(run.cost)})
    files = {
        ROWS: "".join(json.dumps(row) + "\n" for row in store.rows()),
        RUNS: "".join(json.dumps(line) + "\n" for line in lines),
        SETTINGS: yaml.safe_dump(settings, sort_keys=False),
    }
    if store.spec:
        files[SPEC] = dump_spec(store.spec)
    text, plots = _readme(store, command)
    for name, content in {**files, **plots, README: text}.items():
        write_text(target / name, content)
    return [target / name for name in (*files, *plots, README)]


def at(store: Store, suite: str, step: int) -> Store:
    """The runs on a suite as they were after ``step``: those evaluated then count as finished, the others do not."""
    runs = []
    for run in store.runs:
        if run.suite == suite:
            rows = tuple(row for row in run.rows if row["step"] <= step)
            seen = {row["task"] for row in rows if row["step"] == step}
            there = bool(seen) and seen >= {*run.tasks}
            cost, status = run.cost and run.cost.until(step), "finished" if there else "unfinished"
            runs.append(replace(run, rows=rows, cost=cost, status=status))
    return replace(store, runs=tuple(runs))


def _ended(run: Run) -> Run:
    """A finished run's end counts as its budget: vector steps of other sizes pass it by a few steps more or less."""
    last = max((row["step"] for row in run.rows), default=0)
    if not run.usable or last <= run.budget or run.status == "imported":
        return run
    rows = tuple({**row, "step": run.budget} if row["step"] == last else row for row in run.rows)
    return replace(run, rows=rows)


def _readme(store: Store, command: str) -> tuple[str, dict[str, str]]:
    store, spec = replace(store, runs=tuple(map(_ended, store.runs))), store.spec
    parts = [f"# {spec.name if spec else store.root.name}", ""]
    parts += [spec.about, ""] if spec and spec.about else []
    counts: dict[str, int] = {}
    for run in store.runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    parts += ["Runs: " + ", ".join(f"{count} {status}" for status, count in counts.items()) + "."]
    parts += [
        "Score: 0 is a random policy, 1 the reference; IQM over runs x tasks, 95 % stratified bootstrap intervals. "
        "IQM of runs: tasks averaged first, as some papers do."
    ]
    parts += ["", f"Command: `{command}`"] if command else []
    plots: dict[str, str] = {}
    index = {agent: i for i, agent in enumerate(dict.fromkeys(run.agent for run in store.runs))}
    for suite in dict.fromkeys(run.suite for run in store.runs):
        for actions in ("greedy", "sampled"):
            text, chart = _suite(store, suite, actions, index)
            parts += text
            if chart:
                name = f"curves-{slug(suite)}-{actions}.svg"
                plots[name] = standalone(chart, [*index])
                parts += ["", f"![curves]({name})"]
    where = machines(store.runs) or "machine unknown"
    parts += ["", "## Made by", "", f"Protocol version {store.runs[0].protocol}; {where}."]
    parts += ["", *rows_of(("package", "version"), [*versions(store.runs).items()])]
    return "\n".join(parts) + "\n", plots


def _suite(store: Store, suite: str, actions: str, index: Mapping[str, int]) -> tuple[list[str], str]:
    """Markdown lines and a chart; nothing if no run was evaluated so."""
    runs = [run for run in store.runs if run.suite == suite]
    steps = sorted({row["step"] for run in runs for row in run.rows if row["actions"] == actions})
    longest = max((run.budget for run in runs if run.status != "imported"), default=0)
    steps = [step for step in steps if any(run.budget == longest and _has(run, step, actions) for run in runs)]
    if not steps:
        return [], ""
    steps = steps[::-1][:: -(-len(steps) // _SHOWN)][::-1]
    found: dict[int, SuiteResult] = {}
    for step in steps:
        for result in analyse(at(store, suite, step), actions).suites:
            found[step] = result
    last = found[max(found)]
    tasks = len(last.tasks)
    agents = [agent for agent in index if any(run.agent == agent for run in runs)]
    body = []
    for agent in agents:
        cells = []
        for step in found:
            entry = next((entry for entry in found[step].entries if entry.agent == agent), None)
            cells.append(_interval(entry) if entry else "-")
        body.append((agent, *cells))
    head = ("agent", *(f"{step / tasks:,.0f} steps per task" for step in found))
    lines = ["", f"## {suite}, {actions} actions", "", *rows_of(head, body), ""]
    reach = []
    for agent in agents:
        mine = [run for run in runs if run.agent == agent]
        reach.append((agent, *(_shown(reached(mine, actions, level), tasks) for level in LEVELS)))
    lines += _shorter(store, suite, actions, [agent for agent, *cells in body if set(cells) == {"-"}])
    lines += ["First evaluation with a mean score of at least (median of the runs that got there):", ""]
    lines += rows_of(("agent", *(f"{level:g}" for level in LEVELS)), reach)
    whole = analyse(at(store, suite, max(found)), actions)
    lines += ["", f"After {max(found) / tasks:,.0f} steps per task:", "", markdown(whole).partition("\n")[2].strip()]
    chart = line_chart(charts.curves(last, index), "environment steps", "IQM of the score", describe=suite)
    return lines, chart


def _shorter(store: Store, suite: str, actions: str, agents: Sequence[str]) -> list[str]:
    """Of agents that were meant to take fewer steps: their own last evaluation."""
    lines = []
    for agent in agents:
        runs = [run for run in store.runs if (run.suite, run.agent) == (suite, agent)]
        steps = [row["step"] for run in runs for row in run.rows if row["actions"] == actions]
        found = analyse(at(replace(store, runs=tuple(runs)), suite, max(steps)), actions).suites if steps else ()
        for entry in (entry for result in found for entry in result.entries):
            lines += [f"{agent}, after {max(steps) / len(entry.tasks):,.0f} steps per task: {_interval(entry)}.", ""]
    return lines


def _interval(entry: Entry) -> str:
    runs = "1 run" if len(entry.seeds) == 1 else f"{len(entry.seeds)} runs"
    return f"{entry.iqm.value:.3f} ({entry.iqm.low:.3f} to {entry.iqm.high:.3f}), {runs}"


def _has(run: Run, step: int, actions: str) -> bool:
    return any(row["step"] == step and row["actions"] == actions for row in run.rows)


def _shown(found: Reached, tasks: int) -> str:
    if found.steps is None:
        return f"0 of {found.of}"
    hours = f", {found.hours:.2g} core-hours" if found.hours is not None else ""
    return f"{found.runs} of {found.of}: {found.steps / tasks:,.0f} steps per task{hours}"
