"""DeepMind Control (Tassa et al. 2018, https://arxiv.org/abs/1801.00690, https://github.com/google-deepmind/dm_control):
continuous control of simulated bodies, from a pendulum to a dog.

Groups are ``18`` (the tasks of ScaleZero, arXiv:2509.07945, in its order), ``benchmark`` (the 28 that the package tags
so) and ``all`` (these and its further tasks, 48). Single tasks are named by domain and task: ``dmc/walker-walk``,
``dmc/ball_in_cup-catch``. Three of the package's tasks are missing: the two of ``lqr`` draw another body for each
instance, have no time limit and practically unbounded actions; ``quadruped-escape`` needs OpenGL at every reset.

Rewards lie in 0..1 per control step and episodes last 1000 of those, so a return divided by 1000 is the score. There is
no success signal. An action is held for ``frame_skip`` control steps: as in ScaleZero for its 18 tasks (4; pendulum 8),
2 for the others, as in TD-MPC2 (arXiv:2310.16828). A variant is an instance of the suite in a module of yours::

    every_step = DMC(frame_skip=1, name="dmc-1")  # mtrl train --suite my_suites:every_step/18
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mtrl.registry import UnknownNameError
from mtrl.types import Task
from mtrl_envs.extras import needs
from mtrl_envs.mujoco_frames import FRAME_SIZE, check_mode, opengl

CONTROL_STEPS = 1000
"""Control steps per episode, in every task."""

SCALEZERO = (
    "acrobot-swingup", "cartpole-balance", "cartpole-balance_sparse", "cartpole-swingup", "cartpole-swingup_sparse",
    "cheetah-run", "ball_in_cup-catch", "finger-spin", "finger-turn_easy", "finger-turn_hard", "hopper-hop",
    "hopper-stand", "pendulum-swingup", "reacher-easy", "reacher-hard", "walker-run", "walker-stand", "walker-walk",
)  # fmt: skip

_LEFT_OUT = ("lqr-lqr_2_1", "lqr-lqr_6_2", "quadruped-escape")


class DMCEnv(gym.Env[np.ndarray, np.ndarray]):
    """One task of DeepMind Control whose ``reset(seed=...)`` decides the whole episode.

    Observation: [d] float32, the package's observations joined in their order, unbounded as there. Action: [a] float32
    within the package's bounds (nearly always -1..1), held for ``frame_skip`` control steps. Reward: their sum. An
    episode is truncated after 1000 control steps, the last action being held shorter if need be; it is terminated where
    the package gives the discount 0, which of the tasks offered here none does.

    It is also terminated where MuJoCo finds the simulation unstable, with the last observation before (the package
    raises an error): ``info["simulator_faults"]`` is then 1, and 0 at every other step.

    Args:
        task: domain and task, such as ``"walker-walk"``.
        frame_skip: control steps per action.
        render_mode: ``"rgb_array"`` for frames [240, 240, 3] uint8; needs ``MUJOCO_GL`` set before mujoco is imported.

    Raises:
        ModuleNotFoundError: dm_control is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(self, task: str, *, frame_skip: int = 1, render_mode: str | None = None) -> None:
        domain, _, name = task.partition("-")
        self.raw: Any = _package().load(domain, name)
        self.frame_skip, self.render_mode = frame_skip, render_mode
        if domain == "quadruped":
            _name_sensors(self.raw.physics)
        self._errors = needs("dm_control.rl.control", extra="dmc", suite="dmc").PhysicsError
        self._renderer: Any = None
        self._obs = np.zeros(0, np.float32)
        size = sum(int(np.prod(part.shape)) for part in self.raw.observation_spec().values())
        action = self.raw.action_spec()
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = Box(action.minimum.astype(np.float32), action.maximum.astype(np.float32), dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        # All that the package draws comes from here. It wants the old interface, which any bit generator can have.
        self.raw.task._random = np.random.RandomState(self.np_random.bit_generator)
        self._obs = _flat(self.raw.reset().observation)
        return self._obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        # The same bits whatever the caller's dtype.
        action, reward = np.asarray(action, np.float32).astype(np.float64), 0.0
        now: Any = None
        for _ in range(self.frame_skip):
            try:
                now = self.raw.step(action)
            except self._errors:
                return self._obs, reward, True, False, {"simulator_faults": 1}
            reward += float(now.reward)
            if now.last():
                break
        self._obs = _flat(now.observation)
        terminated = now.last() and now.discount == 0.0
        return self._obs, reward, terminated, now.last() and not terminated, {"simulator_faults": 0}

    def render(self) -> np.ndarray:
        """The task's first camera, [240, 240, 3] uint8.

        Raises:
            RuntimeError: built without ``render_mode="rgb_array"``, or no OpenGL to draw with.
        """
        check_mode(self.render_mode)
        physics = self.raw.physics
        if self._renderer is None:
            with opengl():
                # Not the package's: it does not notice when another library has made its own OpenGL context current.
                import mujoco

                self._renderer = mujoco.Renderer(physics.model.ptr, FRAME_SIZE, FRAME_SIZE)
        self._renderer.update_scene(physics.data.ptr, camera=0)
        return self._renderer.render()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self.raw.close()


def _flat(observation: Any) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)


def _name_sensors(physics: Any) -> None:
    """Fill the quadruped's cache of sensor names, since what looks them up (``np.in1d``) is gone from numpy 2.4."""
    import mujoco

    kinds, model = vars(mujoco)["mjtSensor"], physics.model
    for wanted in (("FORCE", "TORQUE"), ("GYRO", "ACCELEROMETER"), ("RANGEFINDER",)):
        key = tuple(getattr(kinds, f"mjSENS_{kind}") for kind in wanted)
        found = np.flatnonzero(np.isin(model.sensor_type, [int(kind) for kind in key]))
        physics._sensor_types_to_names[key] = [model.id2name(i, "sensor") for i in found]


def _package() -> Any:
    with warnings.catch_warnings():
        # Without a screen GLFW says so when dm_control looks for OpenGL; only frames need that, and they look again.
        warnings.filterwarnings("ignore", module="glfw")
        return needs("dm_control.suite", extra="dmc", suite="dmc")


@functools.cache
def _groups() -> dict[str, tuple[str, ...]]:
    """Names of the tasks of every group."""

    def names(pairs: Any) -> tuple[str, ...]:
        return tuple(name for name in map("-".join, pairs) if name not in _LEFT_OUT)

    return {"18": SCALEZERO, "benchmark": names(_package().BENCHMARKING), "all": names(_package().ALL_TASKS)}


@dataclass(frozen=True)
class DMC:
    """The suite ``dmc``; see the module.

    Attributes:
        frame_skip: control steps per action; None for the published ones.
        name: starts task names.
    """

    frame_skip: int | None = None
    name: str = "dmc"

    groups = ("18", "benchmark", "all")

    def __post_init__(self) -> None:
        if self.frame_skip is not None and not 1 <= self.frame_skip <= CONTROL_STEPS:
            raise ValueError(f"frame_skip of suite 'dmc' must lie in 1..{CONTROL_STEPS}, got {self.frame_skip}")

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of a group or of a single name.

        Raises:
            ModuleNotFoundError: dm_control is not installed.
            UnknownNameError: ``group`` is neither.
        """
        groups = _groups()
        if group not in groups and group not in groups["all"]:
            raise UnknownNameError("task or group of suite 'dmc'", group, (*groups, *groups["all"]))
        return tuple(self._task(name) for name in groups.get(group, (group,)))

    def _task(self, name: str) -> Task:
        published = (8 if name.startswith("pendulum-") else 4) if name in SCALEZERO else 2
        skip = self.frame_skip or published
        return Task(
            name=f"{self.name}/{name}",
            build=functools.partial(DMCEnv, name, frame_skip=skip),
            horizon=-(-CONTROL_STEPS // skip),
            score=(0.0, float(CONTROL_STEPS)),
            score_source="bounds of the return (Tassa et al. 2018), not a random policy and an expert",
            protocol={
                "dm_control": version("dm_control"),
                "mujoco": version("mujoco"),
                "frame_skip": str(skip),
                "control_steps": str(CONTROL_STEPS),
            },
        )
