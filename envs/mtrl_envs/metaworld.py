"""MetaWorld (Yu et al., CoRL 2019; McLean et al., 2025; https://metaworld.farama.org): 50 manipulation tasks of one
simulated arm as a suite, with the defects of the package mended.

Groups are the package's own sets (``mt10``, ``mt25``, ``mt50`` and the splits ``ml10-train``, ``ml10-test``,
``ml45-train``, ``ml45-test``) and two small ones, ``mt3`` and ``mt5``. Single tasks are asked for by name
(``reach-v3`` or ``reach``). Goals are always visible, also in the splits, which serve as sets of tasks here.

What differs from the package: ``reset(seed=...)`` decides the whole episode (the package ignores it), the goal is
observed and lies inside the declared space, a task has the same goals in every mix, and the reward version is named.

A variant is an instance of the suite that a module of your own holds, named as ``"module:Attr"``::

    # my_suites.py
    from mtrl_envs.metaworld import MetaWorld
    short = MetaWorld(horizon=150, goals="free")          # mtrl train --suite my_suites:short/mt10
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mtrl.opengl import release
from mtrl.registry import UnknownNameError
from mtrl.types import Task
from mtrl_envs.mujoco_frames import FRAME_SIZE, check_mode, frame

log = logging.getLogger(__name__)

KNOWN_VERSION = "3.1.1"
"""The metaworld version that ``metaworld.json`` and ``metaworld_fast`` were made for."""

NUM_GOALS = 50
"""Goals per task in the MT protocol."""


class MetaWorldEnv(gym.Env[np.ndarray, np.ndarray]):
    """One MetaWorld task whose ``reset(seed=...)`` decides the whole episode.

    Observation: [39] float32 = hand and objects now [18], the same one step ago [18], goal position [3], in metres.
    Action: [4] float32 in [-1, 1]: change of the hand's position [3] and gripper effort. Rewards are the package's.
    Nothing terminates; the episode is truncated at ``horizon``. ``info`` is the package's at every step, with
    ``success`` (float) of that very step, plus ``simulator_faults``, the number of steps of this episode at which
    MuJoCo found an unstable state and reset itself.

    Args:
        task: a name of the package, such as ``"reach-v3"``.
        horizon: steps until truncation.
        reward_version: ``"v2"`` (0..10 per step) or ``"v1"`` (the scale differs between tasks).
        goals: ``"fifty"`` draws one of the task's 50 fixed goals per episode, ``"free"`` a new one each time.
        goal_seed: which 50 goals; the same as those of ``metaworld.MT1(task, seed=goal_seed)``.
        fast: step by ``mtrl_envs.metaworld_fast``, bit for bit the same; switched off for other metaworld versions.
        render_mode: ``"rgb_array"`` for frames [240, 240, 3] uint8; needs ``MUJOCO_GL`` set before mujoco is imported.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(
        self,
        task: str,
        *,
        horizon: int = 500,
        reward_version: Literal["v1", "v2"] = "v2",
        goals: Literal["fifty", "free"] = "fifty",
        goal_seed: int = 0,
        fast: bool = True,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        if fast and version("metaworld") != KNOWN_VERSION:
            log.warning(
                "metaworld %s: stepping as the package does; the fast path is for %s",
                version("metaworld"),
                KNOWN_VERSION,
            )
            fast = False
        self.raw = make_raw(task, reward_version=reward_version, fast=fast, render_mode=render_mode)
        self.raw.max_path_length = horizon
        self.goals = draw_goals(self.raw, goal_seed) if goals == "fifty" else None
        bounds: Box = self.raw.sawyer_observation_space
        self._low, self._high = bounds.low, bounds.high
        self.observation_space = Box(bounds.low.astype(np.float32), bounds.high.astype(np.float32), dtype=np.float32)
        self.action_space = action_space()
        # A view of MuJoCo's counters of bad positions, velocities, accelerations and controls.
        self._warnings = self.raw.data.warning.number[4:]
        self._calm = bytes(self._warnings.nbytes)
        self._faults = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._faults = 0
        if self.goals is None:
            self.raw._freeze_rand_vec = False
            self.raw.seeded_rand_vec = True  # else the package draws from the global np.random
            self.raw.np_random = self.np_random
        else:
            self.raw._freeze_rand_vec = True
            self.raw._last_rand_vec = self.goals[self.np_random.integers(NUM_GOALS)].copy()
        obs, _ = self.raw.reset()
        # The package clips observations at steps only.
        return np.clip(obs, self._low, self._high).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step of 1/80 s.

        Raises:
            ValueError: the episode is over (the package's own check).
        """
        # Rewards depend on the action's precision: float32 gives the same bits whatever the caller's dtype.
        obs, reward, _, truncated, info = self.raw.step(np.asarray(action, np.float32))
        if self._warnings.tobytes() != self._calm:  # ten times as fast as ``any()``
            self._warnings[:] = 0
            self._faults += 1
        info["simulator_faults"] = self._faults
        return obs.astype(np.float32), float(reward), False, truncated, info

    def render(self) -> np.ndarray:
        """The camera ``corner2``, upright, [240, 240, 3] uint8.

        Raises:
            RuntimeError: built without ``render_mode="rgb_array"``, or no OpenGL to draw with.
        """
        check_mode(self.render_mode)
        # The package's camera hangs upside down.
        return np.ascontiguousarray(frame(self.raw)[::-1, ::-1])

    def close(self) -> None:
        release(self.raw)
        self.raw.close()


def make_raw(task: str, *, reward_version: str = "v2", fast: bool = False, render_mode: str | None = None) -> Any:
    """The package's own environment of ``task`` with its goal visible, ready to be reset."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    cls: Any = ALL_V3_ENVIRONMENTS[task]
    if fast:
        from mtrl_envs.metaworld_fast import fast_class

        cls = fast_class(cls, draws=render_mode is not None)
    raw: Any = cls(
        reward_function_version=reward_version,
        render_mode=render_mode,
        camera_name="corner2",
        width=FRAME_SIZE,
        height=FRAME_SIZE,
    )
    raw._partially_observable = False
    del raw.sawyer_observation_space  # cached while the goal was hidden, with goal bounds of 0..0
    raw._set_task_called = True
    return raw


def draw_goals(raw: Any, seed: int) -> np.ndarray:
    """The 50 goal vectors of ``metaworld.MT1(task, seed=seed)``, [50, 3 or 6] float64, drawn with a fresh ``raw``.

    The package draws them from the global ``np.random``, two per reset of which the second counts, with 0.6-0.9 s of
    hand motion per task. The draws do not depend on the motion: without it the same ones take about 30 ms.
    """
    raw._freeze_rand_vec, raw.seeded_rand_vec = False, True
    raw.np_random = np.random.RandomState(seed)  # the stream behind np.random.seed
    raw._reset_hand = functools.partial(raw._reset_hand, steps=0)
    goals = []
    for _ in range(NUM_GOALS):
        raw.reset_model()
        raw.reset_model()
        goals.append(raw._last_rand_vec)
    del raw._reset_hand
    return np.array(goals)


def action_space() -> Box:
    """The action space of every task: [4] float32 in [-1, 1]."""
    return Box(-1.0, 1.0, (4,), np.float32)


@functools.cache
def _table() -> dict[str, Any]:
    """``metaworld.json``: names of the tasks of every group; goal bounds and score scale of every task."""
    return json.loads(resources.files("mtrl_envs").joinpath("metaworld.json").read_text())


def _spaces(task: str) -> tuple[gym.Space[Any], gym.Space[Any]]:
    row = _table()["tasks"][task]
    # SawyerXYZEnv.sawyer_observation_space: hand position, gripper opening, objects; twice; goal.
    low = [-0.525, 0.348, -0.0525, -1.0, *[-np.inf] * 14]
    high = [0.525, 1.025, 0.7, 1.0, *[np.inf] * 14]
    return Box(
        np.array([*low, *low, *row["goal_low"]], np.float32),
        np.array([*high, *high, *row["goal_high"]], np.float32),
        dtype=np.float32,
    ), action_space()


@dataclass(frozen=True)
class MetaWorld:
    """The suite ``metaworld``; see the module. The fields are those of ``MetaWorldEnv``; ``name`` starts task names."""

    reward_version: Literal["v1", "v2"] = "v2"
    horizon: int = 500
    goals: Literal["fifty", "free"] = "fifty"
    goal_seed: int = 0
    fast: bool = True
    name: str = "metaworld"

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("reward_version", self.reward_version, ("v1", "v2")),
            ("goals", self.goals, ("fifty", "free")),
        ):
            if value not in choices:
                raise UnknownNameError(f"{field} of suite 'metaworld'", value, choices)

    @property
    def groups(self) -> Sequence[str]:
        return tuple(_table()["groups"])

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of a group or of a single name, with or without ``-v3``.

        Raises:
            UnknownNameError: ``group`` is neither.
        """
        groups = _table()["groups"]
        names = groups["mt50"]
        if group in groups:
            return tuple(self._task(name) for name in groups[group])
        name = f"{group.removesuffix('-v3')}-v3"
        if name not in names:
            raise UnknownNameError("task or group of suite 'metaworld'", group, (*groups, *names))
        return (self._task(name),)

    @staticmethod
    def expert(task: str) -> Callable[[np.ndarray], np.ndarray]:
        """The package's scripted policy of a task: observation [39] to action [4] float32, clipped to [-1, 1].

        It reads the goal from the observation. It solves nearly all goals of most tasks, but not every one: filter
        demonstrations by success.
        """
        from metaworld.policies import ENV_POLICY_MAP

        name = f"{task.rpartition('/')[2].removesuffix('-v3')}-v3"
        if name not in ENV_POLICY_MAP:
            raise UnknownNameError("task of suite 'metaworld'", task, ENV_POLICY_MAP)
        policy = ENV_POLICY_MAP[name]()

        def act(obs: np.ndarray) -> np.ndarray:
            with warnings.catch_warnings():  # it warns that its actions need clipping, which happens here
                warnings.filterwarnings("ignore", "Constant", UserWarning)
                action = policy.get_action(np.asarray(obs, np.float64))
            return np.clip(action, -1.0, 1.0).astype(np.float32)

        return act

    def _task(self, name: str) -> Task:
        installed = version("metaworld")
        table = _table()
        scores = table["tasks"][name]["score"] if self.reward_version == "v2" else {}
        if str(self.horizon) in scores:
            score, source = tuple(scores[str(self.horizon)]), table["score_source"]
        else:
            score = (0.0, 1.0)
            source = f"none (raw returns): not measured for reward {self.reward_version} and horizon {self.horizon}"
        return Task(
            name=f"{self.name}/{name}",
            build=functools.partial(
                MetaWorldEnv,
                name,
                horizon=self.horizon,
                reward_version=self.reward_version,
                goals=self.goals,
                goal_seed=self.goal_seed,
                fast=self.fast,
            ),
            horizon=self.horizon,
            score=score,
            score_source=source,
            # An unknown version may have other goal bounds: let the vector build one environment and look.
            spaces=_spaces(name) if installed == KNOWN_VERSION else None,
            protocol={
                "metaworld": installed,
                "mujoco": version("mujoco"),
                "reward": self.reward_version,
                "goals": self.goals if self.goals == "free" else f"fifty, seed {self.goal_seed}",
                "horizon": str(self.horizon),
            },
        )
