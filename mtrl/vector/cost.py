"""How long environments take: for choosing where to step them, never for what happens in them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from mtrl.machine import usable_cores
from mtrl.types import Decision, Spec, Task
from mtrl.vector.actions import random_actions
from mtrl.vector.env import MultiTaskVectorEnv
from mtrl.vector.slots import EnvironmentFailedError
from mtrl.vector.workers import unsendable

WORTH_SHARING = 1e-3  # seconds per vector step; signalling worker processes takes about a tenth of that
_PATIENCE = 1.0  # seconds of looking, at steps that are slow beyond doubt
WORTH_STARTING = 5.0  # seconds of steps in all; worker processes take one to two to start


def useful_workers(tasks: Sequence[Task], spec: Spec, slots: int, steps: float = math.inf) -> int:
    """What ``workers="auto"`` means: one process per core if that saves time, else 0.

    The answer depends on how fast this machine is; what is played does not, it is bit-identical for any number.

    Args:
        tasks: all of ``spec`` or some of them.
        slots: environments that are stepped at once.
        steps: of environments, in all.
    """
    cores = min(usable_cores(), slots)
    if cores == 1 or any(map(unsendable, tasks)):
        return 0
    group = {task.name: task.group for task in spec.tasks}
    samples = list({group.get(task.name, ""): task for task in reversed(tasks)}.values())  # the first of each group
    try:
        seconds = step_seconds(samples) / len(samples)
    except EnvironmentFailedError:  # the run will meet it, and knows what to do
        return 0
    return cores if seconds * slots > WORTH_SHARING and seconds * steps > WORTH_STARTING else 0


def step_seconds(tasks: Sequence[Task], steps: int = 40) -> float:
    """Median seconds that one step of all ``tasks`` takes in this process, of up to ``steps`` random legal ones."""
    envs = MultiTaskVectorEnv(tasks)
    try:
        envs.reset(seed=0)
        rng = np.random.default_rng(0)
        taken = []
        end = time.perf_counter() + _PATIENCE
        while len(taken) < steps and (not taken or time.perf_counter() < end):
            action = random_actions(envs, rng)
            before = time.perf_counter()
            envs.step_async(action)
            envs.step_wait(Decision(action, {}))
            taken.append(time.perf_counter() - before)
        return float(np.median(taken))
    finally:
        envs.close()
