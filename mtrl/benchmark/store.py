"""Results of any number of runs as plain rows, whoever made them: a grid, single ``mtrl train`` runs, other projects.

Nothing is stored twice: runs are read from their own folders. ``write_tables`` leaves two files for other tools::

    pandas.read_csv("DIR/results.csv")    # one row per agent, suite, task, seed, evaluation: the same bits in every
                                          # repetition of the grid, interrupted or not
    pandas.read_csv("DIR/runs.csv")       # one row per run: status, cost, versions; depends on the machine

Curves of other projects are CSV files of ``step,task,seed,score`` (and optionally ``suite``, ``success``, ``return``),
brought in by ``import_curves``; they stand beside ours but have no cost.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mtrl import registry, runs
from mtrl.benchmark.attempt import MANIFEST, RUNS, BenchmarkError, read_json
from mtrl.benchmark.engine import SPEC
from mtrl.benchmark.settings import changed, essential
from mtrl.benchmark.spec import PROTOCOL, Spec, load_spec, slug
from mtrl.files import write_text
from mtrl.log import METRICS, read

ACTIONS = {"eval": "greedy", "eval_sampled": "sampled"}
VALUES = ("score", "success", "success_last", "return", "length")
COLUMNS = ("agent", "suite", "task", "seed", "step", "actions", *VALUES)
RESULTS, RUN_TABLE, IMPORTED = "results.csv", "runs.csv", "imported"
Row = Mapping[str, Any]
"""``COLUMNS`` of one task at one evaluation; values that a task does not have are missing."""


@dataclass(frozen=True)
class Cost:
    """What a run took. Training alone: evaluations and starting up are not counted.

    Attributes:
        marks: (environment steps, seconds of training up to there), increasing.
        cores: that it kept busy: torch threads and worker processes.
        memory: bytes of its largest process at the peak, or None if nobody watched.
        device: that the networks were on.
        hardware: the machine, as in the manifest.
    """

    marks: tuple[tuple[int, float], ...]
    cores: int
    memory: int | None = None
    device: str = "cpu"
    hardware: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of training, in all."""
        return self.marks[-1][1] if self.marks else 0.0

    @property
    def core_hours(self) -> float:
        """Of training, in all."""
        return self.seconds * self.cores / 3600

    @property
    def steps_per_second(self) -> float:
        """Environment steps per second of training; NaN before the first record."""
        return self.marks[-1][0] / self.seconds if self.seconds else math.nan

    def core_hours_at(self, step: int) -> float:
        """Core-hours of training up to an environment step."""
        return self.seconds_at(step) * self.cores / 3600

    def seconds_at(self, step: int) -> float:
        """Seconds of training up to an environment step."""
        below = (0, 0.0)
        for mark in self.marks:
            if mark[0] >= step:
                share = (step - below[0]) / max(mark[0] - below[0], 1)
                return below[1] + share * (mark[1] - below[1])
            below = mark
        return below[1]

    def until(self, step: int) -> Cost:
        """Of the training up to an environment step."""
        marks = tuple(mark for mark in self.marks if mark[0] <= step)
        return replace(self, marks=(*marks, (step, self.seconds_at(step))) if marks != self.marks else marks)


@dataclass(frozen=True)
class Run:
    """One run. ``status``: ``finished``, ``running``, ``failed``, ``interrupted``, ``unfinished`` or ``imported``.

    Runs that trained the tasks of a suite one by one are ``parts`` of one: a step of it is a step of every task, and so
    counts as many as there are tasks.
    """

    agent: str
    suite: str
    seed: int
    status: str
    rows: tuple[Row, ...]
    folder: Path
    budget: int = 0
    step: int = 0
    cost: Cost | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    protocol: str = PROTOCOL
    reason: str = ""
    task: str = ""  # that a part trained
    tasks: tuple[str, ...] = ()  # of its suite
    parts: tuple[Run, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether its last row is the run's end, so that it counts in the tables."""
        return self.status in ("finished", "imported") and bool(self.rows)


@dataclass(frozen=True)
class Store:
    """All runs below a folder, and the spec of the grid that made them, if any."""

    root: Path
    runs: tuple[Run, ...]
    spec: Spec | None = None

    def rows(self) -> list[Row]:
        """Every evaluation of every task, ordered by agent, suite, seed, step, actions; tasks in the suite's order."""
        return [row for run in self.runs for row in run.rows]

    def to_csv(self) -> str:
        """``rows`` as CSV. Holds no clock and no machine: equal for equal results."""
        return _csv(COLUMNS, self.rows())


def load(root: Path) -> Store:
    """Read a grid's folder, a folder of runs, or one run.

    Raises:
        BenchmarkError: there is no run in it.
    """
    specs = [path for path in (root / SPEC,) if path.is_file()]
    spec = load_spec(specs[0]) if specs else None
    names = (runs.CONFIG, MANIFEST)  # a run that failed before it was set up has the latter alone
    places = [pattern + name for pattern in ("", "*/", f"{RUNS}/*/") for name in names]
    folders = sorted({path.parent for place in places for path in root.glob(place)})
    found = [_run(folder) for folder in folders if (folder / METRICS).exists() or (folder / MANIFEST).exists()]
    found = _join(_told_apart(found))
    brought = [run for path in sorted((root / IMPORTED).glob("*.csv")) for run in _imported(path)]
    for run in brought:
        _strange(run.agent, found, run.folder, f"call them otherwise in {run.folder}")
    found += brought
    if not any(run.status == "imported" or (run.folder / METRICS).exists() for run in found):
        raise BenchmarkError(f"{root} holds no run with records: give a folder that mtrl benchmark or train wrote")
    order = list(spec.agents) if spec else []
    suites = list(spec.suites) if spec else []
    found.sort(key=lambda run: (_place(run.agent, order), _place(run.suite, suites), run.seed))
    return Store(root, tuple(found), spec)


def evaluations(record: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows {step, actions, task, return, score, ...} of one record, tasks in its order."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in record.items():
        root, _, rest = key.partition("/")
        if root in ACTIONS and "/" in rest:  # a task's; means over tasks have none
            task, _, name = rest.rpartition("/")
            found.setdefault((ACTIONS[root], task), {})[name] = value
    for (actions, task), values in found.items():
        yield {"step": record["step"], "actions": actions, "task": task, **values}


def import_curves(root: Path, source: Path, *, agent: str | None = None, suite: str | None = None) -> Path:
    """Put a CSV of another project's curves beside the runs in ``root``; the last step of each seed is its result.

    Curves that were imported under the same name stay, but for those of the same suite and seed.

    Args:
        root: where to.
        source: columns ``step,task,seed,score``; optionally ``suite,success,success_last,return,length``.
        agent: what to call it; None: what a column of that name says, or else the file's name.
        suite: for all rows, if the file has no such column; None: the suite in ``root`` that has these tasks.

    Returns:
        the file written: ``root/imported/AGENT.csv``.

    Raises:
        BenchmarkError: columns are missing, a value is no number or comes twice, the suite cannot be told, or a run
            in ``root`` has the same label.
    """
    rows = _parse(source)
    try:
        found = load(root).runs
    except BenchmarkError:  # no runs yet
        if suite is None and "suite" not in rows[0]:
            raise
        found = ()
    if len({"suite" in row for row in rows}) > 1 and suite is None:
        raise BenchmarkError(f"{source}: some rows name their suite and some do not: fill them in, or give one --suite")
    if suite is None and "suite" not in rows[0]:
        tasks = {row["task"] for row in rows}
        known = {run.suite for run in found if tasks <= {row["task"] for row in run.rows}}
        if len(known) != 1:
            several = f"{len(known)} suites in {root} have" if known else f"no suite in {root} has"
            raise BenchmarkError(
                f"{source}: {several} the tasks {', '.join(sorted(tasks)[:4])}: say which with --suite"
            )
        (suite,) = known
    given = {**({"agent": agent} if agent else {}), **({"suite": suite} if suite else {})}
    for column, name in given.items():
        if len(several := dict.fromkeys(str(row[column]) for row in rows if column in row)) > 1:
            what = f"{column} {name!r} cannot be the name of several, {', '.join(several)}"
            raise BenchmarkError(f"{source}: {what}: leave --{column} out, or give a file of one")
    whole = [{"actions": "greedy", "agent": source.stem, **row, **given} for row in rows]
    for label in dict.fromkeys(row["agent"] for row in whole):
        _strange(label, [run for run in found if run.status != "imported"], source, "call the curves by --agent NAME")
    seen: set[tuple[Any, ...]] = set()
    for row in whole:
        key = tuple(row.get(name) for name in ("agent", "suite", "seed", "step", "actions", "task"))
        if key in seen:
            raise BenchmarkError(f"{source}: {key[0]} has seed {key[2]} of {key[5]} at step {key[3]} twice")
        seen.add(key)
    path = root / IMPORTED / f"{slug(agent or source.stem)}.csv"
    new = {(row["agent"], row.get("suite"), row["seed"]) for row in whole}
    old = _parse(path) if path.exists() else []
    return write_rows(path, [row for row in old if (row["agent"], row.get("suite"), row["seed"]) not in new] + whole)


def _strange(label: str, ours: Iterable[Run], source: Path, fix: str) -> None:
    """Raises BenchmarkError if curves of ``source`` would count as seeds of an agent of our own."""
    if any(run.agent == label for run in ours):
        raise BenchmarkError(f"{source}: there are runs of our own of {label!r}: {fix}")


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows (``COLUMNS``) as CSV; below a store's ``imported`` folder they stand beside its runs."""
    write_text(path, _csv(COLUMNS, rows))
    return path


def write_tables(store: Store) -> tuple[Path, Path]:
    """Write ``results.csv`` and ``runs.csv`` into the store's folder."""
    results, table = store.root / RESULTS, store.root / RUN_TABLE
    write_text(results, store.to_csv())
    rows = [run_row(part) for run in store.runs for part in run.parts or (run,)]
    write_text(table, _csv(tuple(rows[0]), rows))
    return results, table


def run_row(run: Run) -> dict[str, Any]:
    """One run as a row: who, how far, at what cost, made by what."""
    cost = run.cost or Cost((), 0)
    return {
        "agent": run.agent,
        "suite": run.config.get("suite", run.suite),
        "seed": run.seed,
        "status": run.status,
        "step": run.step,
        "budget": run.budget,
        "train_seconds": round(cost.seconds, 3),
        "cores": cost.cores,
        "core_hours": round(cost.core_hours, 6),
        "steps_per_second": round(cost.steps_per_second, 1) if cost.seconds else "",
        "peak_memory": cost.memory or "",
        "device": cost.device,
        "cpu": cost.hardware.get("cpu", ""),
        "mtrl": run.versions.get("git", run.versions.get("mtrl", "")),
        "torch": run.versions.get("torch", ""),
        "protocol": run.protocol,
        "folder": str(run.folder),
    }


def _run(folder: Path) -> Run:
    manifest = read_json(folder / MANIFEST)
    summary = read_json(folder / runs.SUMMARY)
    config = _config(folder / runs.CONFIG) if (folder / runs.CONFIG).exists() else manifest.get("config")
    if not config:
        raise BenchmarkError(f"{folder / runs.CONFIG} is empty: move {folder} away, or run it again")
    records = read(folder / METRICS) if (folder / METRICS).exists() else []
    agent, suite = manifest.get("agent", config["agent"]["kind"]), manifest.get("suite", config["suite"])
    # A run that was killed between its last evaluation and its summary wrote that evaluation twice, bit for bit.
    unique = {
        (row["step"], row["actions"], row["task"]): {"agent": agent, "suite": suite, "seed": config["seed"], **row}
        for record in records
        for row in evaluations(record)
    }
    attempts = manifest.get("attempts", [])
    memory = [attempt["peak_memory"] for attempt in attempts if "peak_memory" in attempt]
    # What "as many as cores" came to is in the summary: before it is written, such a run's cost is not known.
    threads, workers = (summary.get(name, config[name]) for name in ("threads", "workers"))
    cost = None
    if threads and workers != "auto":
        memory = max(memory, default=None)
        cost = Cost(_marks(records), threads + workers, memory, config["device"], manifest.get("hardware", {}))
    ends = max((row["step"] for row in unique.values()), default=0)  # at less, if records were lost
    complete = config["steps"] <= summary.get("steps", 0) <= ends
    status = "finished" if complete else manifest.get("status", "unfinished")
    protocols = {name: task["protocol"] for name, task in summary.get("evaluation", {}).get("tasks", {}).items()}
    return Run(
        agent=agent,
        suite=suite,
        seed=config["seed"],
        status=status if status != "finished" or complete else "unfinished",
        rows=tuple(unique.values()),
        folder=folder,
        budget=config["steps"],
        step=records[-1]["step"] if records else 0,
        cost=cost,
        config=config,
        versions=summary.get("versions", manifest.get("versions", {})),
        command=tuple(manifest.get("command", ())),
        protocols=protocols,
        protocol=manifest.get("protocol", PROTOCOL),
        task=manifest.get("task", ""),
        tasks=tuple(manifest.get("tasks", ())),
    )


def settings_of(run: Run) -> dict[str, Any]:
    """A run's configuration without what its results do not depend on."""
    return essential(run.config)


def _told_apart(found: Sequence[Run]) -> list[Run]:
    """Runs of one agent and suite whose settings differ are no seeds of one another: the label says what differs.

    A grid's labels tell them apart already: what was started beside it gets another one if its settings are others.

    Raises:
        BenchmarkError: a seed comes twice with the same settings, or runs of one label of a grid differ in theirs.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in found:
        groups.setdefault((run.agent, run.suite, run.task), []).append(run)
    told = []
    for group in groups.values():
        group.sort(key=lambda run: not run.command)  # stable
        first = group[0]
        differ = [changed(first.config, run.config) for run in group]
        for run, places in zip(group, differ, strict=True):
            if run.command and places:
                raise BenchmarkError(
                    f"{first.folder} and {run.folder} are both {run.agent} on {run.suite}, with other settings "
                    f"({', '.join(places)}): move one of them away"
                )
        places = dict.fromkeys(place for own in differ for place in own)
        seeds: dict[tuple[str, int], Run] = {}
        for run, own in zip(group, differ, strict=True):
            if places and (own or not first.command):
                settings = settings_of(run)
                shown = [f"{place.removeprefix('agent.')}={_value(settings, place)}" for place in places]
                label = f"{run.agent} ({', '.join(shown)})"  # all of it: a part could be another run's, too
                run = replace(run, agent=label, rows=tuple({**row, "agent": label} for row in run.rows))
            other = seeds.setdefault((run.agent, run.seed), run)
            if other is not run:
                both = f"{other.folder} and {run.folder}"
                raise BenchmarkError(f"{both} are both {run.agent} with seed {run.seed}: move one of them away")
            told.append(run)
    return told


def _value(settings: Mapping[str, Any], place: str) -> Any:
    found: Any = settings
    for key in place.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _join(found: Sequence[Run]) -> list[Run]:
    """The runs, those of single tasks brought together."""
    parts: dict[tuple[str, str, int], list[Run]] = {}
    for run in found:
        if run.task:
            parts.setdefault((run.agent, run.suite, run.seed), []).append(run)
    return [run for run in found if not run.task] + [_joined(runs) for runs in parts.values()]


def _joined(parts: Sequence[Run]) -> Run:
    tasks = parts[0].tasks
    parts = sorted(parts, key=lambda run: tasks.index(run.task))
    rows = [{**row, "step": row["step"] * len(tasks)} for run in parts for row in run.rows]
    rows.sort(key=lambda row: (row["step"], row["actions"], tasks.index(row["task"])))
    found = {run.status for run in parts}
    worst = next((status for status in ("failed", "interrupted", "running") if status in found), "unfinished")
    return replace(
        parts[0],
        status="finished" if found == {"finished"} and len(parts) == len(tasks) else worst,
        rows=tuple(rows),
        budget=parts[0].budget * len(tasks),
        step=sum(run.step for run in parts),
        cost=_costs([run.cost for run in parts if run.cost], len(tasks)) if all(run.cost for run in parts) else None,
        protocols={name: kept for run in parts for name, kept in run.protocols.items()},
        reason="; ".join(run.reason for run in parts if run.reason),
        task="",
        parts=tuple(parts),
    )


def _costs(costs: Sequence[Cost], tasks: int) -> Cost:
    """Of runs of single tasks, as if one after the other had taken each of their steps."""
    reach = min((cost.marks[-1][0] if cost.marks else 0 for cost in costs), default=0)
    steps = sorted({step for cost in costs for step, _ in cost.marks if step <= reach})
    return replace(
        costs[0],
        marks=tuple((step * tasks, sum(cost.seconds_at(step) for cost in costs)) for step in steps),
        memory=max((cost.memory for cost in costs if cost.memory), default=None),
    )


def _marks(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    """Seconds of training at each record: its speed, which leaves evaluations out, times the steps since the last.

    Wall-clock stamps would count what lay between an interruption and the resumption as well.
    """
    marks: list[tuple[int, float]] = []
    step, seconds = 0, 0.0
    for record in records:
        speed = record.get("time/SPS")
        if speed and record["step"] > step:
            seconds += (record["step"] - step) / speed
            step = record["step"]
            marks.append((step, seconds))
    return tuple(marks)


def _parse(source: Path) -> list[dict[str, Any]]:
    if not source.is_file():
        near = registry.nearest(source.name, [path.name for path in source.parent.glob("*.csv")])
        raise BenchmarkError(f"{source} does not exist" + (f"; did you mean {source.parent / near}?" if near else ""))
    with source.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
        reader = csv.DictReader(file)
        try:
            columns = list(reader.fieldnames or ())
        except UnicodeDecodeError:
            raise BenchmarkError(f"{source} is no text: a CSV file is needed") from None
        missing = [name for name in ("step", "task", "seed", "score") if name not in columns]
        if missing:
            like = {name: registry.nearest(name, columns) for name in missing}
            near = [f"{name} (is it {known!r}?)" if known else name for name, known in like.items()]
            raise BenchmarkError(f"{source}: no column {', '.join(near)}; needed: step,task,seed,score")
        rows: list[dict[str, Any]] = []
        for number, raw in enumerate(reader, start=2):
            row: dict[str, Any] = {}
            for name in COLUMNS:
                text = raw.get(name)
                if text in (None, ""):
                    continue
                try:
                    value: Any = (
                        int(float(text)) if name in ("step", "seed") else float(text) if name in VALUES else text
                    )
                except ValueError:
                    raise BenchmarkError(f"{source}, line {number}: {name} is {text!r}, not a number") from None
                if name in VALUES and not math.isfinite(value):
                    raise BenchmarkError(f"{source}, line {number}: {name} is {text}: leave out runs that failed")
                row[name] = value
            if empty := [name for name in ("step", "task", "seed", "score") if name not in row]:
                raise BenchmarkError(f"{source}, line {number}: no {', '.join(empty)}")
            rows.append(row)
    if not rows:
        raise BenchmarkError(f"{source}: no rows below the header")
    return rows


def _imported(path: Path) -> list[Run]:
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in _parse(path):
        groups.setdefault((row["agent"], row["suite"], row["seed"]), []).append(row)
    found = []
    for (agent, suite, seed), rows in groups.items():
        rows.sort(key=lambda row: row["step"])
        last = rows[-1]["step"]
        found.append(Run(agent, suite, seed, "imported", tuple(rows), path, budget=last, step=last))
    return found


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def _config(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} is damaged ({error}): move {path.parent} away, or run it again") from None


def _place(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)
