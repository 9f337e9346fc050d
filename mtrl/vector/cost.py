"""How long environments take: for choosing where to step them, never for what happens in them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from gymnasium.spaces import Discrete

from mtrl.types import Array, Decision, Group, Leaves, Task
from mtrl.vector.env import MultiTaskVectorEnv


def step_seconds(tasks: Sequence[Task], steps: int = 40) -> float:
    """Median seconds that one step of all ``tasks`` takes in this process, under random legal actions."""
    envs = MultiTaskVectorEnv(tasks)
    try:
        envs.reset(seed=0)
        rng = np.random.default_rng(0)
        taken = []
        for _ in range(steps):
            action = {g.name: _random(g, envs.obs.leaves[g.name], rng) for g in envs.spec.groups}
            before = time.perf_counter()
            envs.step_async(action)
            envs.step_wait(Decision(action, {}))
            taken.append(time.perf_counter() - before)
        return float(np.median(taken))
    finally:
        envs.close()


def _random(group: Group, leaves: Leaves, rng: np.random.Generator) -> Array:
    rows = len(next(iter(leaves.values())))
    if isinstance(group.action, Discrete):
        legal = leaves.get("legal", np.ones((rows, int(group.action.n)), bool))
        return np.argmax(rng.random(legal.shape) * legal, axis=1)
    return rng.uniform(group.action.low, group.action.high, (rows, *group.action.shape)).astype(np.float32)
