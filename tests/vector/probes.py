"""Probe environments whose every number can be computed by hand, as a suite that worker processes can import.

Each observation carries what went into it (step count, last action, episode seed), so that a wrong reset, a stale
buffer or a swapped row shows up as a wrong number.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete

from mtrl.registry import UnknownNameError
from mtrl.types import Task

HORIZON = 7


class Counter(gym.Env):
    """Observation [step, last action, seed mod 1000]; reward step + action; ends by itself after a length that only
    the seed decides (1..10, so some episodes meet the horizon first); legal actions alternate with the step."""

    observation_space = spaces.Dict({"count": Box(-1.0, 2000.0, (3,)), "action_mask": spaces.MultiBinary(4)})
    action_space = Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._seed, self._steps, self._action = seed or 0, 0, -1
        self._length = int(self.np_random.integers(1, 11))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps, self._action = self._steps + 1, action
        return (
            self._observe(),
            float(self._steps + action),
            self._steps >= self._length,
            False,
            {"success": action == 3},
        )

    def _observe(self) -> dict[str, np.ndarray]:
        mask = np.array([1, self._steps % 2, 1, (self._steps + 1) % 2], np.int8)
        return {"count": np.array([self._steps, self._action, self._seed % 1000], np.float32), "action_mask": mask}


class Walk(gym.Env):
    """A point that moves by its action plus seeded noise; terminates beyond 3; success (``is_success``) above 1,
    told at odd steps only."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Box(-1.0, 1.0, (2,))

    def __init__(self, noise: float = 0.1) -> None:
        self._noise = noise

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._point, self._steps = self.np_random.normal(size=2), 0
        return self._point.astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._point = self._point + action + self._noise * self.np_random.normal(size=2)
        far = float(np.abs(self._point).max())
        self._steps += 1
        info = {"is_success": float(far > 1)} if self._steps % 2 else {}
        return self._point.astype(np.float32), -far / 3, far > 3, False, info


class Picture(gym.Env):
    """An image that is filled with the step count, in one array that is written over at every step (as emulators do);
    truncates and terminates at once after five steps. No success signal. Renders its image."""

    observation_space = Box(0, 255, (6, 5, 3), np.uint8)
    action_space = Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self._image = np.zeros((6, 5, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._image[...] = 0
        self._image[..., 1] = (seed or 0) % 200
        return self._image, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._image[..., 0] += 1
        steps = int(self._image[0, 0, 0])
        return self._image, float(action), steps >= 5, steps >= 5, {}

    def render(self) -> Any:
        return self._image.copy() if self.render_mode == "rgb_array" else None


class Team:
    """A PettingZoo ``ParallelEnv`` of three: agent i observes [i, step, seed mod 1000] and earns its action; agent 2
    dies after step 2; the team ends after a seeded length of 2..6, by truncation of the living if the seed is odd. The
    state lists the step and who lives."""

    metadata: dict[str, Any] = {"name": "team"}
    render_mode = None
    possible_agents = ["a0", "a1", "a2"]
    state_space = Box(0.0, 100.0, (4,))

    def observation_space(self, agent: str) -> gym.Space[Any]:
        return Box(0.0, 2000.0, (3,))

    def action_space(self, agent: str) -> gym.Space[Any]:
        return Discrete(3)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.agents, self._seed, self._steps = list(self.possible_agents), seed or 0, 0
        self._length = int(np.random.default_rng(seed).integers(2, 7))
        return self._observe(), {agent: {"action_mask": np.array([1, 1, 0], np.int8)} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[Any, Any, Any, Any, Any]:
        if set(actions) != set(self.agents):
            raise ValueError(f"actions for {sorted(actions)}, but alive are {self.agents}")
        self._steps += 1
        over, odd = self._steps >= self._length, bool(self._seed % 2)
        acted = self.agents
        died = {agent: agent == "a2" and self._steps == 2 for agent in acted}
        terminations = {agent: died[agent] or (over and not odd) for agent in acted}
        truncations = {agent: over and odd and not died[agent] for agent in acted}
        rewards = {agent: float(actions[agent]) for agent in acted}
        infos = {
            agent: {"action_mask": np.array([1, 0, 1], np.int8), "success": self._steps == 3 and agent == "a1"}
            for agent in acted
        }
        observations = self._observe()
        self.agents = [] if over else [agent for agent in acted if not died[agent]]
        return observations, rewards, terminations, truncations, infos

    def state(self) -> np.ndarray:
        return np.array([self._steps, *(agent in self.agents for agent in self.possible_agents)], np.float32)

    def close(self) -> None:
        pass

    def _observe(self) -> dict[str, np.ndarray]:
        return {
            agent: np.array([int(agent[1]), self._steps, self._seed % 1000], np.float32)
            for agent in self.possible_agents
            if agent in self.agents
        }


WRONG: dict[str, Any] = {
    "text": (np.zeros(1, np.float32), "1.0", False, False, {}),
    "rewards": (np.zeros(1, np.float32), np.zeros(2), False, False, {}),
    "four": (np.zeros(1, np.float32), 1.0, False, {}),
    "info": (np.zeros(1, np.float32), 1.0, False, False, None),
    "success": (np.zeros(1, np.float32), 1.0, False, False, {"success": "yes"}),
}


class Faulty(gym.Env):
    """Goes wrong at step 3 in the way named by ``fault``."""

    observation_space = Box(0.0, 10.0, (1,))
    action_space = Discrete(2)

    def __init__(self, fault: str) -> None:
        self._fault = fault
        if fault == "build":
            raise OSError("no such ROM")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._steps, self._gain = 0, time.time_ns() % 1_000_003 if self._fault == "unseeded" else 1
        if self._fault == "reset":
            raise OSError("no display")
        return np.full(1, np.inf if self._fault == "first" else 0, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        observation, reward = np.zeros(1, np.float32), float(self._gain)
        if self._steps == 3:
            if self._fault == "raise":
                raise ZeroDivisionError("the physics exploded")
            if self._fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._fault == "hang":
                time.sleep(3600)
            if self._fault == "reward":
                reward = float("nan")
            if self._fault == "shape":
                observation = np.zeros(4, np.float32)
            if self._fault in WRONG:
                return WRONG[self._fault]
            if self._fault == "observation":
                observation[0] = np.nan
        return observation, reward, False, False, {}


class Slow(Counter):
    """A counter that takes ``seconds`` per step."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(self._seconds)
        return super().step(action)


_TASKS = {
    "counter": Task("probe/counter", Counter, HORIZON),
    "counter-b": Task("probe/counter-b", Counter, 4),
    "walk": Task("probe/walk", Walk, 20),
    "walk-calm": Task(
        "probe/walk-calm", partial(Walk, noise=0.0), 9, spaces=(Walk.observation_space, Walk.action_space)
    ),
    "picture": Task("probe/picture", Picture, 100),
    "team": Task("probe/team", Team, 50, agents=3),
    "team-b": Task("probe/team-b", Team, 4, agents=3),
}
_FAULTS = (*WRONG, "build", "reset", "raise", "die", "hang", "reward", "shape", "observation", "first", "unseeded")


class Probes:
    """The suite: ``all`` are the well-behaved tasks; ``faulty-*``, ``slow-MILLISECONDS`` and ``lambda``, which cannot
    be pickled, come singly."""

    name = "probe"

    @property
    def groups(self) -> Sequence[str]:
        return ["all", *_TASKS]

    def tasks(self, group: str) -> Sequence[Task]:
        if group == "all":
            return list(_TASKS.values())
        kind, _, what = group.partition("-")
        if kind == "faulty" and what in _FAULTS:
            space = (Faulty.observation_space, Faulty.action_space)
            return [Task(f"probe/{group}", partial(Faulty, what), 50, spaces=space)]
        if kind == "slow":
            return [Task(f"probe/{group}", partial(Slow, int(what) / 1000), 50)]
        if group == "lambda":
            return [Task("probe/lambda", lambda: Slow(0.0), 50)]
        if group not in _TASKS:
            raise UnknownNameError("group of suite 'probe'", group, self.groups)
        return [_TASKS[group]]


def tasks(*groups: str) -> list[Task]:
    """Tasks of several groups, in order."""
    return [task for group in groups for task in Probes().tasks(group)]
