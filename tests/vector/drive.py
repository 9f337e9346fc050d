"""Driving vectors with actions that depend on nothing but the seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtrl.types import Decision, Episode, Obs, Step
from mtrl.vector import MultiTaskVectorEnv
from mtrl.vector.actions import random_actions


def drive(envs: MultiTaskVectorEnv, steps: int, seed: int = 0) -> list[tuple[Step, Obs, list[Episode]]]:
    """Transitions, following observations and finished episodes of ``steps`` random steps."""
    rng, seen = np.random.default_rng(seed), []
    for _ in range(steps):
        actions = random_actions(envs, rng)
        envs.step_async(actions)
        seen.append((*envs.step_wait(Decision(actions, {})), envs.episodes))
    return seen


def assert_same(one: Any, other: Any) -> None:
    """Bit-for-bit equality of nested tuples, lists, mappings and arrays."""
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, Episode):
        assert_same(vars(one) | {"journal": vars(one.journal)}, vars(other) | {"journal": vars(other.journal)})
    else:
        assert one == other


def begin_and_drive(envs: MultiTaskVectorEnv, steps: int = 5) -> None:
    """Reset, then random steps: for faults that may show at either."""
    envs.reset()
    drive(envs, steps)
