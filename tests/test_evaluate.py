"""Evaluation: the same episodes for everyone, every one counted once, training untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtrl import registry
from mtrl.evaluate import Evaluation, evaluate, evaluation_seeds
from mtrl.spaces import make_spec
from mtrl.types import Task
from mtrl_agents.random import Random


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
