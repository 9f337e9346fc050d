"""Evaluation: N seeded episodes per task, on environments of its own, never on the training ones.

The episodes of a task depend on the evaluation seed and the task's name only, so that every agent, in whatever
mix it was trained, meets the same ones. Each slot plays a fixed list of episodes: short episodes cannot crowd out
long ones, the bias that counting "the first N to finish" has.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mtrl.types import Agent, Assignment, Episode, Spec, Task, success_rate
from mtrl.vector import EpisodeList, MultiTaskVectorEnv
from mtrl.vector.cost import useful_workers

MAX_SLOTS = 40  # environments alive at once; more copies batch better but cost memory


@dataclass(frozen=True)
class TaskResult:
    """The episodes of one task, in the order of their seeds."""

    task: Task
    episodes: tuple[Episode, ...]

    @property
    def returns(self) -> np.ndarray:
        """Raw undiscounted returns [episodes]."""
        return np.array([episode.ret for episode in self.episodes])

    @property
    def score(self) -> float:
        """Mean normalised score: 0 is the random policy's return, 1 the reference's."""
        return float(np.mean([self.task.normalise(ret) for ret in self.returns]))

    @property
    def success(self) -> float | None:
        """Share of episodes whose success signal was seen at any step; None if the task has none."""
        return success_rate([episode.success for episode in self.episodes])

    @property
    def success_last(self) -> float | None:
        """Share of episodes that ended in success; None if the task has no success signal."""
        return success_rate([episode.success_last for episode in self.episodes])


@dataclass(frozen=True)
class Evaluation:
    """Results of all tasks, in the order of the spec."""

    results: tuple[TaskResult, ...]
    seed: int
    explore: bool
    faults: tuple[str, ...] = field(default=(), compare=False)  # of workers that were replaced on the way

    def metrics(self) -> dict[str, float]:
        """Flat metrics: ``eval/<suite>/<task>/return|score|success|success_last|length`` and their means over tasks.

        Sampled actions go under ``eval_sampled/``.
        """
        root = "eval_sampled" if self.explore else "eval"
        flat: dict[str, float] = {}
        columns: dict[str, list[float]] = {}
        for result in self.results:
            values = {
                "return": float(result.returns.mean()),
                "score": result.score,
                "success": result.success,
                "success_last": result.success_last,
                "length": float(np.mean([episode.length for episode in result.episodes])),
            }
            for name, value in values.items():
                if value is not None:
                    flat[f"{root}/{result.task.name}/{name}"] = value
                    columns.setdefault(name, []).append(value)
        for name in ("score", "success"):
            if name in columns:
                flat[f"{root}/mean_{name}"] = float(np.mean(columns[name]))
        return flat

    def as_dict(self) -> dict[str, Any]:
        """Plain data with every episode, for JSON."""
        return {
            "seed": self.seed,
            "actions": "sampled" if self.explore else "greedy",
            "metrics": self.metrics(),
            "tasks": {
                result.task.name: {
                    "protocol": dict(result.task.protocol),
                    "horizon": result.task.horizon,
                    "score_scale": list(result.task.score),
                    "score_source": result.task.score_source,
                    "episodes": [
                        {
                            "seed": episode.seed,
                            "return": episode.ret,
                            "length": episode.length,
                            "success": episode.success,
                            "success_last": episode.success_last,
                        }
                        for episode in result.episodes
                    ],
                }
                for result in self.results
            },
        }


class StoppedError(Exception):
    """An evaluation that was not wanted any longer."""


def evaluation_seeds(seed: int, task: str, episodes: int) -> list[int]:
    """The episode seeds of one task: a function of the evaluation seed and the task's name only."""
    words = np.random.SeedSequence([seed, zlib.crc32(task.encode())]).generate_state(episodes, np.uint64)
    return [int(word >> np.uint64(33)) for word in words]  # uint31: what every environment accepts


def evaluate(
    agent: Agent,
    tasks: Sequence[Task],
    *,
    spec: Spec,
    episodes: int = 20,
    seed: int = 1_000_003,
    explore: bool = False,
    workers: int | Literal["auto"] = 0,
    patience: float = 300.0,
    stop: Sequence[object] = (),
) -> Evaluation:
    """Play ``episodes`` seeded episodes of every task.

    Args:
        agent: evaluated as it is; its training state is not touched.
        tasks: all of ``spec`` or some of them, in any order; so are the results.
        explore: False takes the greedy action (the distribution's mode), True samples.
        workers: worker processes for the environments; auto: one per core if that saves time.
        patience: seconds that a worker may take for a vector step before it is replaced.
        stop: what stops the evaluation as soon as there is anything in it.

    Raises:
        StoppedError: there was.
    """
    copies = max(1, min(episodes, MAX_SLOTS // len(tasks)))
    if workers == "auto":
        steps = episodes * sum(task.horizon for task in tasks)
        workers = useful_workers(tasks, spec, copies * len(tasks), steps)
    envs = MultiTaskVectorEnv(
        tasks,
        copies,
        workers=workers,
        patience=patience,
        spec=spec,
        schedule=_deal(tasks, spec, copies, episodes, seed),
    )
    finished: list[Episode] = []
    try:
        actor = agent.actor(envs.layout, explore=explore)
        envs.reset()
        while len(finished) < episodes * len(tasks):
            if stop:
                raise StoppedError(f"an evaluation was stopped after {len(finished)} of its episodes")
            decision = actor(envs.obs)
            envs.step_async(decision.action)
            envs.step_wait(decision)
            finished.extend(envs.episodes)
    finally:
        envs.close()
    by_task: dict[str, list[Episode]] = {task.name: [] for task in tasks}
    for episode in finished:
        by_task[episode.journal.task].append(episode)
    results = []
    for task in tasks:
        mine = by_task[task.name]
        order = {value: i for i, value in enumerate(evaluation_seeds(seed, task.name, episodes))}
        results.append(TaskResult(task, tuple(sorted(mine, key=lambda episode: order[episode.seed]))))
    return Evaluation(tuple(results), seed, explore, tuple(envs.faults))


def _deal(tasks: Sequence[Task], spec: Spec, copies: int, episodes: int, seed: int) -> EpisodeList:
    """Copy c of a task plays its episodes c, c + copies, ...; slots are ordered by group, task, copy."""
    lists: list[list[Assignment]] = []
    played = {task.name for task in tasks}
    for group in spec.groups:
        for index in group.tasks:
            if spec.tasks[index].name not in played:
                continue
            seeds = evaluation_seeds(seed, spec.tasks[index].name, episodes)
            lists.extend([[Assignment(index, value) for value in seeds[c::copies]] for c in range(copies)])
    return EpisodeList(lists)


def table(evaluation: Evaluation) -> list[Mapping[str, Any]]:
    """One row per task, for printing: task, episodes, return, score, success."""
    return [
        {
            "task": result.task.name,
            "episodes": len(result.episodes),
            "return": float(result.returns.mean()),
            "score": result.score,
            "success": result.success,
        }
        for result in evaluation.results
    ]
