"""Two benchmarks of Gymnasium-Robotics (https://robotics.farama.org): the dexterous hand of Adroit (Rajeswaran et al.,
RSS 2018, arXiv:1709.10087) and the Franka kitchen (Gupta et al., CoRL 2019, arXiv:1910.11956).

Groups are ``adroit`` (door, hammer, pen, relocate with dense rewards), ``adroit-sparse`` (the same with sparse ones),
``kitchen`` (the seven sub-tasks, one at a time) and ``all`` (these and three combinations: ``kitchen-complete`` and
``kitchen-mixed``, the sub-tasks of D4RL's data sets of those names, arXiv:2004.07219, and ``kitchen-all``). Single
tasks: ``robotics/adroit-door``, ``robotics/adroit-door-sparse``, ``robotics/kitchen-microwave``.

Rewards are the package's. The dense ones of door, hammer and relocate differ from those that results were published
for: they pay for the hand's distance from the object, which was charged, a small part of the return (by the package's
notice they changed in version 1.2.1, Farama-Foundation/Gymnasium-Robotics#220). Its version is part of every result.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mtrl.opengl import release
from mtrl.registry import UnknownNameError
from mtrl.types import Task
from mtrl_envs.extras import needs
from mtrl_envs.mujoco_frames import FRAME_SIZE, check_mode, frame

ADROIT = {"door": (39, 28), "hammer": (46, 26), "pen": (45, 24), "relocate": (39, 30)}
"""Tasks of the hand: numbers in an observation and in an action."""

GOALS = {
    "bottom burner": 2, "top burner": 2, "light switch": 2, "slide cabinet": 1, "hinge cabinet": 2, "microwave": 1,
    "kettle": 7,
}  # fmt: skip
"""Sub-tasks of the kitchen in the package's order: numbers in a goal."""

KITCHEN: Mapping[str, tuple[str, ...]] = {
    **{f"kitchen-{goal.replace(' ', '_')}": (goal,) for goal in GOALS},
    "kitchen-complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-mixed": ("microwave", "kettle", "bottom burner", "light switch"),
    "kitchen-all": tuple(GOALS),
}
"""Tasks of the kitchen: the sub-tasks that are asked for."""

ADROIT_HORIZON, KITCHEN_HORIZON = 200, 280

_KITCHEN_SIZES = (59 + 2 * sum(GOALS.values()) + len(GOALS), 9)
_UNSTABLE = slice(4, None)  # of MuJoCo's warnings: bad positions, velocities, accelerations and controls


class AdroitEnv(gym.Env[np.ndarray, np.ndarray]):
    """A task of the Adroit hand whose ``reset(seed=...)`` decides the whole episode.

    Observation: the package's as float32, [39], [46], [45] or [39] for door, hammer, pen and relocate; the goal is part
    of it. Action: [28], [26], [24] or [30] float32 in [-1, 1], positions of the joints. Nothing ends before
    ``Task.horizon``. ``info``: ``success`` (bool) of that very step, and ``simulator_faults``, at how many steps of
    this episode MuJoCo found an unstable state and reset itself.

    Args:
        task: a key of ``ADROIT``.
        sparse: 10 for every step at which the goal is reached and -0.1 for any other, instead of dense rewards.
        render_mode: ``"rgb_array"`` for frames [240, 240, 3] uint8; needs ``MUJOCO_GL`` set before mujoco is imported.

    Raises:
        ModuleNotFoundError: gymnasium-robotics is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}

    def __init__(self, task: str, *, sparse: bool = False, render_mode: str | None = None) -> None:
        module = _needs(f"gymnasium_robotics.envs.adroit_hand.adroit_{task}")
        make = getattr(module, f"AdroitHand{task.title()}Env")
        self.raw: Any = make(
            "sparse" if sparse else "dense", render_mode=render_mode, width=FRAME_SIZE, height=FRAME_SIZE
        )
        self.render_mode = render_mode
        self.observation_space, self.action_space = spaces(*ADROIT[task])
        self._faults = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._faults = 0
        return self.raw.reset(seed=seed)[0].astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, _, _, info = self.raw.step(_double(action))
        self._faults += _unstable(self.raw.data)
        return (
            obs.astype(np.float32),
            float(reward),
            False,
            False,
            {"success": bool(info["success"]), "simulator_faults": self._faults},
        )

    def render(self) -> np.ndarray:
        """The package's view, [240, 240, 3] uint8.

        Raises:
            RuntimeError: built without ``render_mode="rgb_array"``, or no OpenGL to draw with.
        """
        check_mode(self.render_mode)
        return frame(self.raw)

    def close(self) -> None:
        release(self.raw)
        self.raw.close()


class KitchenEnv(gym.Env[np.ndarray, np.ndarray]):
    """The Franka kitchen with some of its sub-tasks, whose ``reset(seed=...)`` decides the whole episode.

    Observation: [100] float32, alike for all sets of sub-tasks: the package's noisy measurements [59]; achieved goals
    [17] and desired goals [17] of the seven sub-tasks, 0 where one is not asked for; and [7] which sub-tasks are still
    to be done, 1 or 0, without which the rewards would depend on the past. Action: [9] float32 in [-1, 1], velocities
    of the joints. Reward: 1 for each sub-task at the step that completes it. The episode terminates when all are
    completed. ``info``: ``success`` (bool), all are completed; ``completed``, how many are; ``simulator_faults`` as in
    ``AdroitEnv``.

    Args:
        asked: sub-tasks, keys of ``GOALS``.
        render_mode: ``"rgb_array"`` for frames [240, 240, 3] uint8; needs ``MUJOCO_GL`` set before mujoco is imported.

    Raises:
        ModuleNotFoundError: gymnasium-robotics is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}

    def __init__(self, asked: Sequence[str], *, render_mode: str | None = None) -> None:
        make = _needs("gymnasium_robotics.envs.franka_kitchen").KitchenEnv
        self.raw: Any = make(list(asked), render_mode=render_mode, width=FRAME_SIZE, height=FRAME_SIZE)
        self.render_mode = render_mode
        self.observation_space, self.action_space = spaces(*_KITCHEN_SIZES)
        self._asked = len(asked)
        self._faults = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._faults = 0
        obs, info = self.raw.reset(seed=seed)
        return _kitchen(obs, info["tasks_to_complete"]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, _, info = self.raw.step(_double(action))
        self._faults += _unstable(self.raw.data)
        left = info["tasks_to_complete"]
        said = {"success": not left, "completed": self._asked - len(left), "simulator_faults": self._faults}
        return _kitchen(obs, left), reward, terminated, False, said

    def render(self) -> np.ndarray:
        """The package's view, [240, 240, 3] uint8.

        Raises:
            RuntimeError: built without ``render_mode="rgb_array"``, or no OpenGL to draw with.
        """
        check_mode(self.render_mode)
        return frame(self.raw.robot_env)

    def close(self) -> None:
        release(self.raw.robot_env)
        self.raw.close()


def spaces(observation: int, action: int) -> tuple[Box, Box]:
    """Unbounded observations and actions in [-1, 1] of so many numbers, float32."""
    return Box(-np.inf, np.inf, (observation,), np.float32), Box(-1.0, 1.0, (action,), np.float32)


def _kitchen(obs: Mapping[str, Any], left: Sequence[str]) -> np.ndarray:
    parts = [obs["observation"]]
    for kind in ("achieved_goal", "desired_goal"):
        parts += [obs[kind].get(goal, np.zeros(size)) for goal, size in GOALS.items()]
    return np.concatenate([*parts, [goal in left for goal in GOALS]]).astype(np.float32)


def _double(action: np.ndarray) -> np.ndarray:
    """The same bits whatever the caller's dtype."""
    return np.asarray(action, np.float32).astype(np.float64)


def _unstable(data: Any) -> bool:
    """Whether MuJoCo found the state unstable since the last call."""
    counts = data.warning.number[_UNSTABLE]
    found = bool(counts.any())
    counts[:] = 0
    return found


def _needs(module: str) -> Any:
    return needs(module, extra="robotics", suite="robotics")


@functools.cache
def _table() -> dict[str, Any]:
    """``robotics.json``: score scales and their sources."""
    return json.loads(resources.files("mtrl_envs").joinpath("robotics.json").read_text())


class Robotics:
    """The suite ``robotics``; see the module."""

    name = "robotics"
    groups = ("adroit", "adroit-sparse", "kitchen", "all")

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of a group or of a single name.

        Raises:
            ModuleNotFoundError: gymnasium-robotics is not installed.
            UnknownNameError: ``group`` is neither.
        """
        _needs("gymnasium_robotics")
        dense = tuple(f"adroit-{task}" for task in ADROIT)
        sparse = tuple(f"{name}-sparse" for name in dense)
        groups = {"adroit": dense, "adroit-sparse": sparse, "kitchen": tuple(KITCHEN)[: len(GOALS)]}
        groups["all"] = (*dense, *sparse, *KITCHEN)
        if group not in groups and group not in groups["all"]:
            raise UnknownNameError("task or group of suite 'robotics'", group, (*groups, *groups["all"]))
        return tuple(self._task(name) for name in groups.get(group, (group,)))

    def _task(self, name: str) -> Task:
        if name in KITCHEN:
            build, sizes, horizon = functools.partial(KitchenEnv, KITCHEN[name]), _KITCHEN_SIZES, KITCHEN_HORIZON
            kind = {"sub-tasks": ", ".join(KITCHEN[name])}
        else:
            task, sparse = name.split("-")[1], name.endswith("-sparse")
            build, sizes, horizon = functools.partial(AdroitEnv, task, sparse=sparse), ADROIT[task], ADROIT_HORIZON
            kind = {"reward": "sparse" if sparse else "dense"}
        low, high, source = _table()["scores"][name]
        return Task(
            name=f"{self.name}/{name}",
            build=build,
            horizon=horizon,
            score=(low, high),
            score_source=f"0: {_table()['random']}; 1: {_table()['sources'][source]}",
            spaces=spaces(*sizes),
            protocol={
                "gymnasium-robotics": version("gymnasium-robotics"),
                "mujoco": version("mujoco"),
                "horizon": str(horizon),
                **kind,
            },
        )
