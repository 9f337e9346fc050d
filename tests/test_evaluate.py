"""Evaluation: the same episodes for everyone, every one counted once, training untouched."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest

from mtrl import registry
from mtrl.evaluate import Evaluation, evaluate, evaluation_seeds
from mtrl.monitor import Monitor
from mtrl.spaces import make_spec
from mtrl.types import Decision, Episode, Journal, Obs, Task, success_rate
from mtrl.vector import cost
from mtrl_agents.random import Random, RandomActor


def play(suite: str, **settings: Any) -> tuple[tuple[Task, ...], Evaluation]:
    tasks = registry.tasks(suite)
    spec = make_spec(tasks)
    agent = Random(spec, Random.Config(), seed=0, device="cpu")
    return tasks, evaluate(agent, tasks, spec=spec, **settings)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("episodes", [1, 7, 50])
def test_every_task_plays_exactly_its_seeds(episodes: int, workers: int) -> None:
    tasks, found = play("mtrl.testing:Probes/mix", episodes=episodes, seed=5, workers=workers)
    for task, result in zip(tasks, found.results, strict=True):
        assert [episode.seed for episode in result.episodes] == evaluation_seeds(5, task.name, episodes)


def test_seeds_depend_on_task_and_seed_only() -> None:
    assert evaluation_seeds(1, "a/b", 3) == evaluation_seeds(1, "a/b", 5)[:3]
    assert evaluation_seeds(1, "a/b", 3) != evaluation_seeds(1, "a/c", 3)
    assert evaluation_seeds(1, "a/b", 3) != evaluation_seeds(2, "a/b", 3)
    assert all(0 <= seed < 2**31 for seed in evaluation_seeds(3, "a/b", 100))
    assert len(set(evaluation_seeds(3, "a/b", 100))) == 100


def test_known_returns_scores_and_success() -> None:
    _, found = play("mtrl.testing:Probes/discrete", episodes=40, seed=0)
    by_name = {result.task.name: result for result in found.results}
    constant, action = by_name["probe/constant"], by_name["probe/action"]
    assert (constant.returns == 1.0).all()
    assert constant.score == 1.0
    assert constant.success is None
    assert set(np.unique(action.returns)) == {-1.0, 1.0}  # a random agent takes both actions in 40 episodes
    assert action.success == np.mean(action.returns == 1.0)
    metrics = found.metrics()
    assert metrics["eval/probe/action/success"] == action.success
    assert metrics["eval/mean_score"] == pytest.approx(np.mean([r.score for r in by_name.values()]))
    assert by_name["probe/endless"].episodes[0].length == 10


def test_success_that_is_told_with_success_only() -> None:
    """Many environments give the signal at the solving step and never else: other episodes count as not solved."""
    assert success_rate([True, None, None, None]) == 0.25
    assert success_rate([True, False]) == 0.5
    assert success_rate([None, None]) is None
    monitor = Monitor(make_spec(registry.tasks("mtrl.testing:Probes/constant")), 10)
    solved = Episode(0, 0, 0, 0, 1.0, 1, True, True, True, Journal("probe/constant", 0, np.zeros((1,), np.int64)))
    for success in (True, None, None, None):
        monitor.episode(replace(solved, success=success), 1)
    assert monitor.flush()["charts/probe/constant_success_rate"] == 0.25


def test_a_killed_worker_is_told_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, calm = play("mtrl.testing:Probes/mix", episodes=7, workers=2)
    acted, act = [], RandomActor.__call__

    def kill_once(self: RandomActor, obs: Obs) -> Decision:
        acted.append(None)
        if len(acted) == 3:
            workers = [child for child in psutil.Process().children() if "mtrl.vector.workers" in str(child.cmdline())]
            workers[0].kill()
        return act(self, obs)

    monkeypatch.setattr(RandomActor, "__call__", kill_once)
    _, hit = play("mtrl.testing:Probes/mix", episodes=7, workers=2)
    assert (len(calm.faults), len(hit.faults)) == (0, 1)
    assert hit.as_dict() == calm.as_dict()


@pytest.mark.parametrize(
    ("cores", "seconds", "slots", "steps", "workers"),
    [
        (4, 0.01, 40, 10_000, 4),
        (4, 0.01, 40, math.inf, 4),  # a training, which goes on
        (1, 0.01, 40, 10_000, 0),
        (64, 0.01, 40, 10_000, 40),  # no more than slots
        (4, 0.01, 40, 400, 0),  # over about as soon as processes have started
        (4, 2e-5, 40, 10_000_000, 0),  # steps too short to be worth an order
    ],
)
def test_workers_are_started_where_they_save_time(
    cores: int, seconds: float, slots: int, steps: float, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "usable_cores", lambda: cores)
    monkeypatch.setattr(cost, "step_seconds", lambda tasks: seconds * len(tasks))
    tasks = registry.tasks("mtrl.testing:Probes/mix")
    assert cost.useful_workers(tasks[1:], make_spec(tasks), slots, steps) == workers


def test_tasks_that_no_process_can_be_sent_are_played_in_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of an environment that is written in the script that trains."""
    monkeypatch.setattr(cost, "usable_cores", lambda: 4)
    monkeypatch.setattr(cost, "step_seconds", lambda tasks: 1.0)
    tasks = registry.tasks("tests.vector.probes:Probes/lambda")
    assert cost.useful_workers(tasks, make_spec(tasks), 4) == 0
    _, found = play("tests.vector.probes:Probes/lambda", episodes=2, workers="auto")
    assert len(found.results[0].episodes) == 2
