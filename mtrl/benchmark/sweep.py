"""Search for hyperparameters over a benchmark's spec with Optuna (the extra ``sweep``).

Every trial is one more agent of one growing grid, trained on all suites and seeds of the spec: it resumes like any
grid, and tables and report show all trials. The objective is the IQM of the final scores. The winner's score is one
that it was chosen by, which flatters it: compare it in a benchmark with other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrl import registry
from mtrl.benchmark import store
from mtrl.benchmark.analysis import analyse
from mtrl.benchmark.attempt import BenchmarkError
from mtrl.benchmark.engine import Grid
from mtrl.benchmark.spec import Range, Spec, plan
from mtrl.benchmark.stats import iqm
from mtrl.config import merge

STUDY = "study.log"


@dataclass(frozen=True)
class Found:
    """The best of the finished trials; ``complete`` says whether all were run."""

    label: str | None
    score: float
    values: Mapping[str, Any]
    trials: int
    complete: bool


def sweep(spec: Spec, root: Path, run: Callable[[Spec], Grid]) -> Found:
    """Try settings until ``spec.sweep.trials`` are finished, going on with what ``root`` holds already.

    Args:
        spec: with its ``sweep`` part.
        root: the grid's folder.
        run: runs a spec's unfinished jobs in ``root``, as ``run_grid`` with ``resume`` does.

    Raises:
        BenchmarkError: the spec has no ``sweep``, or Optuna is not installed.
        ConfigError: the swept agent or a field does not exist.
    """
    wanted = spec.sweep
    if wanted is None:
        raise BenchmarkError(f"{spec.name} has no sweep: say agent, trials and space, as docs/benchmark.md shows")
    if wanted.agent not in spec.agents:
        raise registry.UnknownNameError("agent to sweep", wanted.agent, spec.agents)
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BenchmarkError("Optuna is not installed: pip install 'mtrl-suite[sweep]'") from None
    # A field that does not exist shall not end as a trial.
    first = {name: part.low if part.choices is None else part.choices[0] for name, part in wanted.space.items()}
    plan(spec.model_copy(update={"agents": {wanted.agent: _fields(spec, wanted.agent, first)}}))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    root.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(root / STUDY))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=spec.name,
        direction="maximize",
        load_if_exists=True,
    )
    # A search that goes on must not draw again what it drew when it began.
    study.sampler = optuna.samplers.TPESampler(seed=wanted.seed + 1_000_003 * len(study.trials))
    states = optuna.trial.TrialState
    while True:
        begun = study.get_trials(states=(states.RUNNING,))  # by a process that was interrupted
        ended = study.get_trials(states=(states.COMPLETE, states.FAIL))
        whole = [trial for trial in begun if set(trial.params) == set(wanted.space)]
        for trial in begun:
            if trial not in whole:
                study.tell(trial.number, state=states.FAIL)
        if whole:
            number, values = whole[0].number, whole[0].params
        elif len(ended) < wanted.trials:
            trial = study.ask()
            number, values = trial.number, {name: _suggest(trial, name, part) for name, part in wanted.space.items()}
        else:
            break
        known = [one for one in ended if one.state == states.COMPLETE]  # failed ones are not tried again
        tried = {_label(one.number, wanted.agent): one.params for one in known} | {_label(number, wanted.agent): values}
        grown = spec.model_copy(
            update={"agents": {label: _fields(spec, wanted.agent, found) for label, found in tried.items()}}
        )
        grid = run(grown)
        if grid.signal is not None:
            break
        score = _score(root, _label(number, wanted.agent), spec)
        if score is None:
            study.tell(number, state=states.FAIL)
        else:
            study.tell(number, score)
    done = study.get_trials(states=(states.COMPLETE,))
    total = len(study.get_trials(states=(states.COMPLETE, states.FAIL)))
    if not done:
        return Found(None, 0.0, {}, total, total >= wanted.trials)
    best = study.best_trial
    label = _label(best.number, wanted.agent)
    return Found(label, float(best.values[0]), best.params, total, total >= wanted.trials)


def _label(number: int, agent: str) -> str:
    return f"{agent} trial {number:03d}"


def _suggest(trial: Any, name: str, part: Range) -> Any:
    if part.choices is not None:
        return trial.suggest_categorical(name, part.choices)
    suggest = trial.suggest_int if isinstance(part.low, int) and isinstance(part.high, int) else trial.suggest_float
    return suggest(name, part.low, part.high, log=part.log)


def _fields(spec: Spec, agent: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The swept agent's part of the spec with the values in their places: ``{"agent.lr": 1}`` is ``agent: {lr: 1}``."""
    found = spec.agents[agent]
    for name, value in values.items():
        nested: Any = value
        for key in reversed(name.split(".")):
            nested = {key: nested}
        found = merge([found, nested])
    return found


def _score(root: Path, label: str, spec: Spec) -> float | None:
    """IQM over the suites, each weighing the same; None if a run of the trial failed."""
    scores = [
        float(iqm(entry.scores))
        for suite in analyse(store.load(root)).suites
        for entry in suite.entries
        if entry.agent == label and len(entry.seeds) == len(spec.seeds)
    ]
    own = spec.agents[spec.sweep.agent].get("suites", spec.suites) if spec.sweep else spec.suites
    return sum(scores) / len(scores) if len(scores) == len(own) else None
