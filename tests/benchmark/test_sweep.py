"""The search: finds the better settings, goes on where it was interrupted, and says what is missing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtrl.benchmark.attempt import BenchmarkError, folder_of
from mtrl.benchmark.engine import Grid
from mtrl.benchmark.spec import Spec, parse_spec, plan
from mtrl.benchmark.sweep import sweep
from mtrl.config import ConfigError
from mtrl.registry import UnknownNameError

Writer = Callable[..., Path]


def spec(**changes: Any) -> Spec:
    space = {"agent.lr": {"low": 1e-5, "high": 1e-1, "log": True}, "agent.rollout": {"choices": [16, 32]}}
    return parse_spec(
        {
            "name": "search",
            "seeds": 2,
            "suites": ["mtrl.testing:Probes/discrete"],
            "agents": {"ppo": {"agent": {"kind": "ppo", "epochs": 2}}},
            "sweep": {"agent": "ppo", "trials": 12, "space": space},
            **changes,
        }
    )


def runner(root: Path, write: Writer, trials: int = 99) -> Callable[[Spec], Grid]:
    """Runs whose score depends on the learning rate alone, best at 1e-3; interrupted after ``trials``."""
    left = [trials]

    def run(grown: Spec) -> Grid:
        left[0] -= 1
        if left[0] < 0:
            return Grid(1, 0, (), 2)
        for job in plan(grown):
            if not folder_of(root, job).exists():
                skill = 1 - abs(math.log10(job.config.agent["lr"]) + 3) / 2
                made = write(root, job.agent, job.suite, job.seed, skill=skill)
                made.rename(folder_of(root, job))
        return Grid(1, 0, (), None)

    return run


@pytest.mark.filterwarnings("ignore")  # of Optuna itself
def test_the_search_finds_and_resumes(tmp_path: Path, run_writer: Writer) -> None:
    pytest.importorskip("optuna")
    first = sweep(spec(), tmp_path, runner(tmp_path, run_writer, trials=5))
    assert (first.trials, first.complete) == (5, False)
    found = sweep(spec(), tmp_path, runner(tmp_path, run_writer))
    assert (found.trials, found.complete) == (12, True)
    assert found.score >= first.score
    assert 1e-4 < found.values["agent.lr"] < 1e-2
    assert found.label is not None
    assert found.label.startswith("ppo trial ")
    assert len(list(tmp_path.glob("runs/*"))) == 12 * 2, "no trial ran twice, none was left out"


def test_what_cannot_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_writer: Writer) -> None:
    run = runner(tmp_path, run_writer)
    with pytest.raises(BenchmarkError, match="has no sweep"):
        sweep(spec(sweep=None), tmp_path, run)
    with pytest.raises(UnknownNameError, match="did you mean 'ppo'"):
        sweep(spec(sweep={"agent": "pppo", "space": {"x": {"choices": [1]}}}), tmp_path, run)
    with pytest.raises(ConfigError, match="give either choices, or low and high"):
        spec(sweep={"agent": "ppo", "space": {"x": {"low": 1}}})
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BenchmarkError, match=r"pip install 'mtrl-suite\[sweep\]'"):
        sweep(spec(), tmp_path, run)
