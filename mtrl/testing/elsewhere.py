"""Do tasks play the same episodes in another process? Texts hash otherwise there, and modules alone set things up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from mtrl.testing.compare import difference
from mtrl.types import Decision, Obs, Step, Task
from mtrl.vector import EnvironmentFailedError, MultiTaskVectorEnv
from mtrl.vector.actions import random_actions

_AT_ONCE = 8  # environments that each of the two processes holds


def elsewhere(tasks: Sequence[Task], seed: int, steps: int) -> Iterator[tuple[Task, str]]:
    """Play tasks here and in a worker process, with the same random legal actions.

    Args:
        tasks: of unique names, that keep the contract here and can be sent to a worker.
        seed: of both vectors.
        steps: to play.

    Yields:
        A task that is another there, and what differs first; or that fails there, and how.
    """
    for start in range(0, len(tasks), _AT_ONCE):
        rest = list(tasks[start : start + _AT_ONCE])
        while rest and (found := _first(rest, seed, steps)):
            yield found
            rest = [task for task in rest if task.name != found[0].name]


def _first(tasks: Sequence[Task], seed: int, steps: int) -> tuple[Task, str] | None:
    by_name = {task.name: task for task in tasks}
    with (
        contextlib.closing(MultiTaskVectorEnv(tasks, seed=seed)) as here,
        contextlib.closing(MultiTaskVectorEnv(tasks, seed=seed, workers=1)) as there,
    ):
        names = [info.name for info in here.spec.tasks]
        rng = np.random.default_rng(seed)
        try:
            here.reset()
            there.reset()
            found = _differ(here.obs, there.obs, "reset()")
            for number in range(1, steps + 1):
                if found:
                    break
                decision = Decision(random_actions(here, rng), {})
                for envs in (here, there):
                    envs.step_async(decision.action)
                (left, _), (right, _) = here.step_wait(decision), there.step_wait(decision)
                found = _paid(left, right, f"step {number}") or _differ(left.next, right.next, f"step {number}")
                found = found or _differ(here.obs, there.obs, f"step {number}, then reset()")
        except EnvironmentFailedError as error:
            if error.slot is None and len(tasks) > 1:  # whose fault it was is not known
                return next((one for task in tasks if (one := _first([task], seed, steps))), None)
            name = names[here.slot_tasks[error.slot or 0]]
            return by_name[name], str(error).splitlines()[0]
    return (by_name[names[found[0]]], found[1]) if found else None


def _paid(left: Step, right: Step, where: str) -> tuple[int, str] | None:
    """Task and place of the first difference in what came of the actions."""
    for name in ("reward", "terminated", "truncated", "success"):
        ours, theirs = getattr(left, name), getattr(right, name)
        for row in np.flatnonzero(ours != theirs)[:1]:
            return int(left.obs.task[row]), f"{where}, {name}: {ours[row]} and {theirs[row]}"
    return None


def _differ(left: Obs, right: Obs, where: str) -> tuple[int, str] | None:
    """The same of two observations."""
    start = 0
    for name, leaves in left.leaves.items():
        count = len(next(iter(leaves.values())))
        for row in range(count):
            ours, theirs = ({leaf: x[row] for leaf, x in obs.leaves[name].items()} for obs in (left, right))
            if what := difference(ours, theirs, f"{where}, observation"):
                return int(left.task[start + row]), what
        start += count
    return None
