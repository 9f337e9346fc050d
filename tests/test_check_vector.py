"""``check_vector_env``: silent on good vectors, and every defect is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from mtrl.testing import check_vector_env
from mtrl.vector import MultiTaskVectorEnv
from mtrl.vector.views import PaddedVectorEnv
from tests.vector.probes import tasks


def cartpoles(kind: type[VectorEnv], mode: AutoresetMode) -> VectorEnv:
    return kind([partial(gym.make, "CartPole-v1")] * 3, autoreset_mode=mode)  # type: ignore[call-arg]


def padded(workers: int) -> VectorEnv:
    return PaddedVectorEnv(MultiTaskVectorEnv(tasks("counter", "counter-b", "picture"), 2, workers=workers))


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_gymnasiums_own_vectors_pass(mode: AutoresetMode) -> None:
    report = check_vector_env(*(partial(cartpoles, kind, mode) for kind in (SyncVectorEnv, AsyncVectorEnv)), steps=120)
    assert not report.findings, report.render()


def test_our_padded_view_passes_on_both_backends() -> None:
    report = check_vector_env(partial(padded, 0), partial(padded, 2), steps=60)
    assert report.ok, report.render()


class Good(VectorEnv):
    """Two rows that count to a seeded length; SAME_STEP. Subclasses break one thing each."""

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}
    num_envs = 2

    def __init__(self) -> None:
        self.single_observation_space, self.single_action_space = Box(0.0, 100.0, (2,)), Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, 2)
        self.action_space = batch_space(self.single_action_space, 2)
        self._rng = np.random.default_rng(0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._now = np.stack([self._begin(), self._begin()])
        return self._now.copy(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self._now[:, 0] += 1
        ended = self._now[:, 0] > self._now[:, 1] / 10
        info: dict[str, Any] = {}
        if ended.any():
            info = {"final_obs": np.array([row.copy() for row in self._now] + [None], object)[:2], "_final_obs": ended}
        for row in np.flatnonzero(ended):
            self._now[row] = self._begin()
        return self._now.copy(), np.asarray(actions, float), ended, np.zeros(2, bool), info

    def _begin(self) -> np.ndarray:
        return np.array([0, self._rng.integers(10, 100)], np.float32)


class NoMode(Good):
    metadata: dict[str, Any] = {}


class WrongSpace(Good):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = batch_space(self.single_observation_space, 3)


class Unseeded(Good):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=None)


class Overwrites(Good):
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        _, *rest = super().step(actions)
        return (self._now, *rest)  # type: ignore[return-value]


class NoFinal(Good):
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        return (*super().step(actions)[:4], {})


class FinalOutside(Good):
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        *rest, info = super().step(actions)
        if info:
            info["final_obs"] = np.array([row - 500 for row in info["final_obs"]])
        return (*rest, info)  # type: ignore[return-value]


class PaysTwice(Good):
    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, *rest = super().step(actions)
        return obs, reward + 1, *rest  # type: ignore[return-value]


class IntReward(Good):
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, *rest = super().step(actions)
        return obs, reward.astype(int), *rest  # type: ignore[return-value]


class NoLegal(Good):
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        *rest, info = super().step(actions)
        return (*rest, info | {"action_mask": np.zeros((2, 3), bool)})  # type: ignore[return-value]


class Leaves(Good):
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, *rest = super().step(actions)
        return (obs + 99, *rest)  # type: ignore[return-value]


def test_a_good_one_passes() -> None:
    report = check_vector_env(Good)
    assert not report.findings, report.render()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NoMode, "metadata['autoreset_mode'] is None"),
        (WrongSpace, "observation_space is not 2 times single_observation_space"),
        (Unseeded, "two runs with the same seed in one vector differ: after 0 steps"),
        (Overwrites, "step() wrote over the observation handed out before"),
        (NoFinal, "has no info['final_obs']"),
        (FinalOutside, "final_obs of row"),
        (PaysTwice, "ended the step before, and is paid or ends again"),
        (IntReward, "reward is int64 [2]"),
        (NoLegal, "the action_mask has shape (2, 3) or a row without a legal action"),
        (Leaves, "is not in [0.0, 100.0]"),
    ],
)
def test_every_defect_is_named(broken: Callable[[], VectorEnv], message: str) -> None:
    report = check_vector_env(broken, steps=60)
    assert message in report.render()
    assert not report.ok


def test_backends_that_differ_are_named() -> None:
    class Other(Good):
        def _begin(self) -> np.ndarray:
            return super()._begin() + np.array([0, 1], np.float32)

    assert "the vector and backend 1 differ: after 0 steps" in check_vector_env(Good, Other, steps=20).render()


def test_short_episodes_are_asked_for() -> None:
    report = check_vector_env(Good, steps=1)
    assert report.ok
    assert "no episode ended within 1 steps" in report.render()
