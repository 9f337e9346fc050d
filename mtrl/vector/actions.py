"""Actions for looking at environments when no agent is there."""

from __future__ import annotations

import numpy as np
from gymnasium.spaces import Discrete

from mtrl.types import Array
from mtrl.vector.env import MultiTaskVectorEnv


def random_actions(envs: MultiTaskVectorEnv, rng: np.random.Generator) -> dict[str, Array]:
    """Actions drawn uniformly for every group, legal ones where rows say what is legal."""
    actions: dict[str, Array] = {}
    for name, rows in envs.layout.rows.items():
        space, n = envs.spec.group(name).action, rows.stop - rows.start
        if "legal" in (leaves := envs.obs.leaves[name]):
            actions[name] = np.where(leaves["legal"], rng.random(leaves["legal"].shape), -1.0).argmax(1)
        elif isinstance(space, Discrete):
            actions[name] = rng.integers(0, int(space.n), n)
        else:
            actions[name] = rng.uniform(space.low, space.high, (n, *space.shape)).astype(np.float32)
    return actions
