"""From runs to what a report says: estimates, curves, comparisons, costs, and what may not be concluded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median_high

import numpy as np

from mtrl.benchmark import stats
from mtrl.benchmark.stats import Estimate
from mtrl.benchmark.store import Row, Run, Store
from mtrl.types import Array

TAUS = np.linspace(0.0, 1.0, 51)
_BUDGET = 150_000_000  # resampled scores of a whole report: a few seconds; small grids get the full 50,000 draws


@dataclass(frozen=True)
class Curve:
    """IQM of the score over training. ``hours`` are mean core-hours at each point, NaN for imported curves."""

    steps: Array
    hours: Array
    points: tuple[Estimate, ...]
    tasks: Array  # [points, tasks] mean over runs


@dataclass(frozen=True)
class Reached:
    """When runs first had a mean score of ``level``: how many did, and the median over those that did."""

    level: float
    runs: int
    of: int
    steps: float | None
    hours: float | None


@dataclass(frozen=True)
class Entry:
    """One agent on one suite, over its finished runs: N runs, M tasks."""

    agent: str
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    scores: Array  # [N, M] at the end of training
    success: Array | None  # [N, M], if all tasks have a success signal
    estimates: Mapping[str, Estimate]
    profile: tuple[Array, Array, Array]
    curve: Curve
    reached: Reached
    forgotten: Array  # [M] best earlier mean score minus the last one
    runs: tuple[Run, ...]

    @property
    def alone(self) -> bool:
        """Whether it learned each task by itself."""
        return all(run.tasks for run in self.runs)

    @property
    def iqm(self) -> Estimate:
        """The headline."""
        return self.estimates["IQM"]

    @property
    def iqm_of_runs(self) -> float:
        """Tasks averaged first, then an IQM over runs: what papers on few tasks often report (MOORE's replication)."""
        return float(stats.iqm(self.scores.mean(1, keepdims=True)))

    @cached_property
    def core_hours(self) -> float | None:
        """Of one run, on average."""
        found = [run.cost.core_hours for run in self.runs if run.cost and run.cost.seconds]
        return float(np.mean(found)) if found else None

    @cached_property
    def steps_per_core_hour(self) -> float | None:
        """Environment steps that one core-hour of training buys."""
        found = [run.cost.marks[-1][0] / run.cost.core_hours for run in self.runs if run.cost and run.cost.seconds]
        return float(np.mean(found)) if found else None

    @cached_property
    def steps_per_second(self) -> float | None:
        """Speed of one run, on average."""
        found = [run.cost.steps_per_second for run in self.runs if run.cost and run.cost.seconds]
        return float(np.mean(found)) if found else None

    @cached_property
    def memory(self) -> int | None:
        """Bytes of the largest process at its peak."""
        return max((run.cost.memory for run in self.runs if run.cost and run.cost.memory), default=None)

    def one_core_hour_buys(self) -> str:
        """In words: the score after one core-hour or, where a run is shorter, how many whole runs fit."""
        if self.core_hours is None:
            return "-"
        if self.core_hours < 1:
            return f"{1 / self.core_hours:.{0 if self.core_hours < 0.1 else 1}f} runs to {self.iqm.value:.2f}"
        within = [point.value for point, hours in zip(self.curve.points, self.curve.hours, strict=True) if hours <= 1]
        return f"a score of {within[-1]:.2f}" if within else "less than the first evaluation"


@dataclass(frozen=True)
class SuiteResult:
    """All agents on one suite, best IQM first. ``improvement[a, b]`` is P(a > b)."""

    suite: str
    tasks: tuple[str, ...]
    entries: tuple[Entry, ...]
    improvement: Mapping[tuple[str, str], Estimate]
    verdict: str
    cautions: tuple[str, ...]


@dataclass(frozen=True)
class Transfer:
    """Mean score of a task when its agent trained on a small suite and on a larger one that holds it."""

    agent: str
    task: str
    alone_in: str
    alone: float
    mixed_in: str
    mixed: float


@dataclass(frozen=True)
class Analysis:
    """Everything that a report shows, for greedy or for sampled actions."""

    store: Store
    actions: str
    agents: tuple[str, ...]
    suites: tuple[SuiteResult, ...]
    overall: Mapping[str, tuple[int, Mapping[str, Estimate]]]  # agent -> seeds, estimates over all suites
    transfer: tuple[Transfer, ...]
    draws: int


def analyse(store: Store, actions: str = "greedy") -> Analysis:
    """Compute all statistics of the finished runs in a store.

    Args:
        store: what ``mtrl.benchmark.store.load`` found.
        actions: ``greedy`` or ``sampled`` evaluations.
    """
    agents = tuple(dict.fromkeys(run.agent for run in store.runs))
    suites = tuple(dict.fromkeys(run.suite for run in store.runs))
    chosen = {
        (suite, agent): [run for run in store.runs if (run.suite, run.agent) == (suite, agent)]
        for suite in suites
        for agent in agents
    }
    tables = {key: _tables(runs, actions) for key, runs in chosen.items()}
    sizes = [[matrix.scores.size for matrix in table.curve] for table in tables.values() if table.curve]
    draws = int(np.clip(_BUDGET // max(1, sum(size[-1] for size in sizes)), 2_000, stats.DRAWS))
    few = int(np.clip(_BUDGET // max(1, sum(map(sum, sizes))), 500, stats.PROFILE_DRAWS))
    level = store.spec.solved if store.spec else 0.9
    found = []
    for suite in suites:
        ended = [(agent, tables[suite, agent]) for agent in agents if tables[suite, agent].final is not None]
        if ended:
            left_out = [run for agent in agents for run in tables[suite, agent].left_out]
            entries = [_entry(agent, table, draws, few, level, actions) for agent, table in ended]
            found.append(_suite(suite, entries, left_out, draws))
    return Analysis(store, actions, agents, tuple(found), _overall(found, draws), _transfer(found), draws)


@dataclass(frozen=True)
class _Matrix:
    """One evaluation of all runs: scores [N, M], success [N, M] if all tasks have it."""

    step: int
    scores: Array
    success: Array | None


@dataclass(frozen=True)
class _Tables:
    """The finished runs of one agent on one suite: each run's last evaluation, and those that all runs have."""

    runs: tuple[Run, ...]
    tasks: tuple[str, ...]
    final: _Matrix | None
    curve: tuple[_Matrix, ...]
    left_out: tuple[Run, ...]  # finished, but without a finite score for every task at the end


def _tables(runs: Sequence[Run], actions: str) -> _Tables:
    cells: list[tuple[Run, dict[tuple[int, str], Row]]] = []
    for run in runs:
        mine = {(row["step"], row["task"]): row for row in run.rows if row["actions"] == actions and "score" in row}
        if run.usable and mine:
            cells.append((run, mine))
    tasks = tuple(dict.fromkeys(task for _, mine in cells for _, task in mine))

    def line(mine: Mapping[tuple[int, str], Row], step: int) -> list[Row] | None:
        rows = [mine.get((step, task)) for task in tasks]
        found = [row for row in rows if row is not None and np.isfinite(row["score"])]
        return found if len(found) == len(tasks) else None

    def matrix(step: int, lines: Sequence[Sequence[Row]]) -> _Matrix:
        success = [[row.get("success") for row in one] for one in lines]
        known = all(value is not None for one in success for value in one)
        scores = np.array([[row["score"] for row in one] for one in lines])
        return _Matrix(step, scores, np.array(success, float) if known else None)

    last = [(run, mine, line(mine, max(step for step, _ in mine))) for run, mine in cells]
    whole = [(run, mine, found) for run, mine, found in last if found is not None]
    left_out = tuple(run for run, _, found in last if found is None)
    if not whole:
        return _Tables((), tasks, None, (), left_out)
    final = matrix(max(run.step for run, _, _ in whole), [found for _, _, found in whole])
    curve = []
    for step in sorted(set.intersection(*({step for step, _ in mine} for _, mine, _ in whole))):
        lines = [found for _, mine, _ in whole if (found := line(mine, step)) is not None]
        if len(lines) == len(whole):
            curve.append(matrix(step, lines))
    return _Tables(tuple(run for run, _, _ in whole), tasks, final, tuple(curve) or (final,), left_out)


def _entry(agent: str, tables: _Tables, draws: int, few: int, level: float, actions: str) -> Entry:
    final = tables.final
    assert final is not None
    tasks = np.array([matrix.scores.mean(0) for matrix in tables.curve])
    costs = [run.cost for run in tables.runs]
    hours = [
        np.mean([np.nan if cost is None else cost.core_hours_at(matrix.step) for cost in costs])
        for matrix in tables.curve
    ]
    curve = Curve(
        steps=np.array([matrix.step for matrix in tables.curve]),
        hours=np.array(hours),
        points=tuple(stats.estimate(matrix.scores, draws=few) for matrix in tables.curve),
        tasks=tasks,
    )
    return Entry(
        agent=agent,
        seeds=tuple(run.seed for run in tables.runs),
        tasks=tables.tasks,
        scores=final.scores,
        success=final.success,
        estimates=stats.estimates(final.scores, draws),
        profile=stats.profile(final.scores, TAUS),
        curve=curve,
        reached=reached(tables.runs, actions, level),
        forgotten=np.maximum(tasks.max(0) - final.scores.mean(0), 0.0),
        runs=tables.runs,
    )


def reached(runs: Sequence[Run], actions: str, level: float) -> Reached:
    """When the mean score over all tasks was first ``level`` in each run, at an evaluation with these actions."""
    steps, hours = [], []
    for run in runs:
        scores: dict[int, list[float]] = {}
        for row in run.rows:
            if row["actions"] == actions and "score" in row:
                scores.setdefault(row["step"], []).append(row["score"])
        tasks = len(run.tasks) or max(map(len, scores.values()), default=0)
        whole = sorted(step for step, found in scores.items() if len(found) == tasks)
        first = next((step for step in whole if np.mean(scores[step]) >= level), None)
        if first is not None:
            steps.append(first)
            if run.cost:
                hours.append(run.cost.core_hours_at(first))
    # The higher of the two in the middle: between them there was no evaluation.
    middle = (median_high(steps) if steps else None, median_high(hours) if hours else None)
    return Reached(level, len(steps), len(runs), *middle)


def _suite(suite: str, entries: Sequence[Entry], left_out: Sequence[Run], draws: int) -> SuiteResult:
    ordered = sorted(entries, key=lambda entry: -entry.iqm.value)
    improvement: dict[tuple[str, str], Estimate] = {}
    for a, b in itertools.combinations(ordered, 2):
        shared = [task for task in a.tasks if task in b.tasks]
        if shared:
            ours, theirs = (one.scores[:, [one.tasks.index(task) for task in shared]] for one in (a, b))
            found = stats.improvement(ours, theirs, draws)
            improvement[a.agent, b.agent] = found
            improvement[b.agent, a.agent] = Estimate(1 - found.value, 1 - found.high, 1 - found.low)
    verdict, cautions = _judge(ordered, improvement)
    if left_out:
        named = _and([f"{run.agent} (seed {run.seed})" for run in left_out])
        cautions += (f"Left out, since they lack a finite score for some task at the end: {named}.",)
    tasks = tuple(dict.fromkeys(task for entry in entries for task in entry.tasks))
    return SuiteResult(suite, tasks, tuple(ordered), improvement, verdict, cautions)


def _judge(entries: Sequence[Entry], improvement: Mapping[tuple[str, str], Estimate]) -> tuple[str, tuple[str, ...]]:
    """The answer in a sentence, and the sentences that keep a reader from concluding more."""
    best, rivals = entries[0], entries[1:]
    cautions = []
    if not rivals:
        verdict = f"Only {best.agent} has such runs: IQM of the score {best.iqm.value:.2f}. Nothing is compared."
    else:
        top = [entry.agent for entry in entries if entry.iqm.value == best.iqm.value]
        verdict = f"{_and(top)} {'have' if len(top) > 1 else 'has'} the highest IQM of the score, {best.iqm.value:.2f}"
        beaten: list[str] = []
        hinted: list[str] = []
        better: list[str] = []
        open_: list[str] = []
        for rival in rivals:
            found = improvement.get((best.agent, rival.agent))
            fewest = min(len(best.seeds), len(rival.seeds))
            if found is None or fewest < 2 or found.low <= 0.5 <= found.high:
                place = open_
            elif found.high < 0.5:
                place = better
            else:
                place = hinted if fewest < stats.FEW_RUNS else beaten
            place.append(rival.agent)
        who = "it" if len(top) == 1 else best.agent
        verdict += f"; {who} beats {_and(beaten)}" if beaten else ""
        verdict += f"; {who} seems to beat {_and(hinted)}" if hinted else ""
        verdict += "."
        if better:
            verdict += f" Yet {_and(better)} did better more often: IQM and probability of improvement disagree."
        if open_:
            verdict += f" Between {best.agent} and {_and(open_)} these runs show no difference that may be claimed."
        crossing = [f"{a.agent} and {b.agent}" for a, b in itertools.combinations(entries, 2) if a.iqm.overlaps(b.iqm)]
        if crossing:
            shown = "; ".join(crossing[:6]) + ("; ..." if len(crossing) > 6 else "")
            cautions.append(f"The intervals of the IQM overlap for {shown}: do not rank these by their IQM.")
        if len({frozenset(entry.tasks) for entry in entries}) > 1:
            cautions.append("The agents were not evaluated on the same tasks: only shared tasks are compared pairwise.")
    single = [entry.agent for entry in entries if len(entry.seeds) == 1]
    few = [f"{entry.agent} ({len(entry.seeds)})" for entry in entries if 1 < len(entry.seeds) < stats.FEW_RUNS]
    if single:
        cautions.append(
            f"One run says nothing about the spread between runs ({_and(single)}): its interval has no width, which is "
            "not certainty. No agent may be called better or worse from it."
        )
    if few:
        runs = min(len(entry.seeds) for entry in entries if len(entry.seeds) > 1)
        cautions.append(
            f"Few runs: {_and(few)}. A task with {runs} runs has only {stats.distinct_resamples(runs)} distinct "
            f"resamples, so these intervals are too narrow: read differences as hints until there are {stats.FEW_RUNS}."
        )
    return verdict, tuple(cautions)


def _overall(suites: Sequence[SuiteResult], draws: int) -> dict[str, tuple[int, Mapping[str, Estimate]]]:
    """Agents that finished every suite, over all tasks of all suites and the seeds that they share."""
    if len(suites) < 2:
        return {}
    by_agent = [{entry.agent: entry for entry in suite.entries} for suite in suites]
    found = {}
    for agent in by_agent[0]:
        mine = [entries[agent] for entries in by_agent if agent in entries]
        seeds = sorted(set.intersection(*(set(entry.seeds) for entry in mine)))
        whole = all(set(entry.tasks) == set(suite.tasks) for entry, suite in zip(mine, suites, strict=False))
        if len(mine) == len(suites) and seeds and whole:
            blocks = [entry.scores[[entry.seeds.index(seed) for seed in seeds]] for entry in mine]
            scores = np.concatenate(blocks, axis=1)
            estimates = stats.estimates(scores, draws)
            found[agent] = (len(seeds), estimates)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]["IQM"].value))


def _transfer(suites: Sequence[SuiteResult]) -> tuple[Transfer, ...]:
    means: dict[tuple[str, str], list[tuple[int, str, float]]] = {}
    for suite in suites:
        for entry in (entry for entry in suite.entries if not entry.alone):
            for task, score in zip(entry.tasks, entry.scores.mean(0), strict=True):
                means.setdefault((entry.agent, task), []).append((len(suite.tasks), suite.suite, float(score)))
    found = []
    for (agent, task), scores in means.items():
        (few, alone_in, alone), (many, mixed_in, mixed) = min(scores), max(scores)
        if many > few:
            found.append(Transfer(agent, task, alone_in, alone, mixed_in, mixed))
    return tuple(found)


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
