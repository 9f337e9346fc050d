"""Faster MetaWorld steps with the same bits in observation, reward and info.

Most of a MetaWorld step is not physics but Python: MuJoCo objects looked up by name, scipy rotations made for one
matrix, NumPy functions called on three numbers, contacts searched one by one. ``fast_class`` makes a subclass of a
task's class that does the same arithmetic, in the same order and precision, without these detours:

* the package's base class (``SawyerXYZEnv``) gets its step, observation, contact search and reset written anew here;
* the tasks' own reward functions run unchanged, but see quicker versions of ``np.linalg.norm``, ``np.clip``,
  ``Rotation`` and ``reward_utils`` under these names. The functions are copied for that; nothing of the package is
  changed, and the stock class stays usable beside the fast one;
* environments that do not render load neither textures nor visual meshes, four fifths of a model's memory;
* the physics of results that nobody reads is left out: ``mj_rnePostConstraint`` after each step, and the hand motion
  in the first of the two passes that a reset makes, which the second pass starts over.

Known to hold for metaworld 3.1.1; ``tests/envs/test_metaworld.py`` compares all 50 tasks with the package bit by bit.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils

mujoco: Any = importlib.import_module("mujoco")  # compiled: type checkers see nothing in it
Array = np.ndarray

_KEPT = ("__init__", "reset_model", "_reset_hand")
"""Functions of a task that run outside of steps and stay as they are."""


@functools.cache
def fast_class(cls: type[SawyerXYZEnv], *, draws: bool) -> type[SawyerXYZEnv]:
    """A subclass of the task's class ``cls`` whose steps and resets give the same bits in less time.

    Args:
        cls: a class of ``metaworld.env_dict.ALL_V3_ENVIRONMENTS``.
        draws: whether it can render. If not, its model leaves out what is only seen: 4 MB instead of 21 MB.
    """
    task = _names(cls)
    copies = {
        name: _copied(value, task)
        for name, value in vars(cls).items()
        if isinstance(value, types.FunctionType | staticmethod) and name not in _KEPT
    }
    unseen = {} if draws else {"_initialize_simulation": _initialize_simulation}
    fast = type(cls.__name__, (cls,), {**_BASE, **unseen, **copies, "parts": functools.cached_property(_Parts)})
    task[cls.__name__] = fast  # tasks call their static methods through their class
    return fast


class _Views(NamedTuple):
    """One named body, geom, site or joint: its id and views into the arrays of MuJoCo's data."""

    id: int
    xpos: Any
    xquat: Any
    xmat: Any
    qpos: Any


class _Data:
    """MuJoCo's data with named access looked up once. Attributes that are not named access are passed through."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.body = functools.cache(functools.partial(self._views, data.body))
        self.geom = functools.cache(functools.partial(self._views, data.geom))
        self.site = functools.cache(functools.partial(self._views, data.site))
        self.joint = functools.cache(functools.partial(self._views, data.joint))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    @staticmethod
    def _views(lookup: Callable[[str], Any], name: str) -> _Views:
        found = lookup(name)
        return _Views(found.id, *(getattr(found, part, None) for part in _Views._fields[1:]))


class _Parts:
    """What a step touches, found once per environment."""

    def __init__(self, env: Any) -> None:
        self.data: Any = env.data
        self.named = _Data(env.data)
        self.hand = self.named.body("hand").xpos
        self.claws = self.named.body("rightclaw").xpos, self.named.body("leftclaw").xpos
        self.tips = self.named.site("rightEndEffector").xpos, self.named.site("leftEndEffector").xpos
        self.pads = self.named.geom("leftpad_geom").id, self.named.geom("rightpad_geom").id
        self.mocap_pos, self.mocap_quat = env.data.mocap_pos, env.data.mocap_quat
        self.ctrl = env.data.ctrl


def _initialize_simulation(self: Any) -> tuple[Any, Any]:
    """``MujocoEnv._initialize_simulation`` without textures and meshes that only serve the eye."""
    model = copy.copy(_compiled(self.fullpath))  # of its own, since tasks write to their models
    return model, mujoco.MjData(model)


@functools.cache
def _compiled(path: str) -> Any:
    """A task's model, compiled once per process: a compilation takes as long as some thousand steps.

    MuJoCo's compiler leaves out what is only seen with the dynamics unchanged, but keeps what something refers to: a
    position sensor on each named shape keeps those that tasks look up.
    """
    spec = mujoco.MjSpec.from_file(path)
    spec.compiler.discardvisual = True
    for geom in spec.geoms:
        if geom.name:
            spec.add_sensor(type=mujoco.mjtSensor.mjSENS_FRAMEPOS, objtype=mujoco.mjtObj.mjOBJ_GEOM, objname=geom.name)
    return spec.compile()


def _step(self: Any, action: Array) -> tuple[Array, Any, bool, bool, dict[str, Any]]:
    """``SawyerXYZEnv.step``."""
    assert len(action) == 4, f"Actions should be size 4, got {len(action)}"
    if self.curr_path_length >= self.max_path_length:
        raise ValueError("You must reset the env manually once truncate==True")
    parts: _Parts = self.parts
    move = np.minimum(np.maximum(action[:3], _MINUS_ONES), _ONES) * self.action_scale
    parts.mocap_pos[0] = np.minimum(np.maximum(parts.mocap_pos[0] + move, self.mocap_low), self.mocap_high)
    parts.mocap_quat[0] = _DOWN
    grip = float(action[-1])
    parts.ctrl[0], parts.ctrl[1] = grip, -grip
    mujoco.mj_step(self.model, parts.data, nstep=self.frame_skip)
    self.curr_path_length += 1
    # The package moves the target's marker here; the next line computes its place anew in any case.
    mujoco.mj_forward(self.model, parts.data)
    obs = self._get_obs()
    space = self.sawyer_observation_space
    np.minimum(np.maximum(obs, space.low, out=obs), space.high, out=obs)
    self._last_stable_obs = obs
    reward, info = self.evaluate_state(obs, action)
    return obs, reward, False, self.curr_path_length == self.max_path_length, info


_DOWN = np.array([1.0, 0.0, 1.0, 0.0])
_ONES = np.ones(3, np.float32)
_MINUS_ONES = -_ONES


def _reset(self: Any, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
    """``SawyerXYZEnv.reset``, which makes two passes of ``reset_model``: the first decides where things stand, the
    second moves the hand among them."""
    # Resets write by name, which only MuJoCo's own accessors can.
    self.data = self.parts.data
    self.curr_path_length = 0
    mujoco.mj_resetData(self.model, self.data)
    with_motion = self._reset_hand

    def without_motion() -> None:
        mujoco.mj_forward(self.model, self.data)
        with_motion(steps=0)

    self._reset_hand = without_motion
    self.reset_model()
    del self._reset_hand
    mujoco.mj_resetData(self.model, self.data)
    obs = self.reset_model()
    if self.render_mode == "human":
        self.render()
    self._prev_obs = obs[:18].copy()
    obs[18:36] = self._prev_obs
    self.data = self.parts.named
    return obs, {}


def _do_simulation(self: Any, ctrl: Any, n_frames: int) -> None:
    """``MujocoEnv.do_simulation`` without ``mj_rnePostConstraint``, whose results MetaWorld does not read."""
    self.data.ctrl[:] = ctrl
    mujoco.mj_step(self.model, self.data, nstep=n_frames)


def _get_obs(self: Any) -> Array:
    """``SawyerXYZEnv._get_obs`` for a visible goal, [39] float64."""
    current = self._get_curr_obs_combined_no_goal()
    obs = np.empty(39)
    obs[:18] = current
    obs[18:36] = self._prev_obs
    obs[36:] = self._get_pos_goal()
    self._prev_obs = current
    return obs


def _get_curr_obs_combined_no_goal(self: Any) -> Array:
    """``SawyerXYZEnv._get_curr_obs_combined_no_goal``, [18] float64."""
    parts: _Parts = self.parts
    obs = np.zeros(18)
    obs[:3] = parts.hand
    opening = parts.claws[0] - parts.claws[1]
    obs[3] = min(max(math.sqrt(opening.dot(opening)) / 0.1, 0.0), 1.0)
    positions, quaternions = self._get_pos_objects(), self._get_quat_objects()
    obs[4:7], obs[7:11] = positions[:3], quaternions[:4]
    if len(positions) == 6:
        obs[11:14], obs[14:18] = positions[3:], quaternions[4:]
    return obs


def _tcp_center(self: Any) -> Array:
    """``SawyerMocapBase.tcp_center``."""
    right, left = self.parts.tips
    return (right + left) / 2.0


def _get_body_com(self: Any, body_name: str) -> Array:
    """``MujocoEnv.get_body_com``."""
    return self.data.body(body_name).xpos


def _touching_object(self: Any, object_geom_id: int) -> bool:
    """``SawyerXYZEnv.touching_object``: one pass over the contacts instead of two, in the same order."""
    data = self.parts.data
    if not data.ncon:
        return False
    left_pad, right_pad = self.parts.pads
    left = right = 0
    contact = data.contact
    for index, pair in enumerate(contact.geom.tolist()):
        if object_geom_id in pair:
            if left_pad in pair:
                left += data.efc_force[contact.efc_address[index]]
            if right_pad in pair:
                right += data.efc_force[contact.efc_address[index]]
    return left > 0 and right > 0


def _gripper_caging_reward(
    self: Any,
    action: Array,
    obj_pos: Array,
    obj_radius: float,
    pad_success_thresh: float,
    object_reach_radius: float,
    xz_thresh: float,
    desired_gripper_effort: float = 1.0,
    high_density: bool = False,
    medium_density: bool = False,
) -> Any:
    """``SawyerXYZEnv._gripper_caging_reward``, number by number instead of with arrays of two."""
    if high_density and medium_density:
        raise ValueError("Can only be either high_density or medium_density")
    start, tcp = self.obj_init_pos, self.tcp_center
    y, start_y = float(obj_pos[1]), float(start[1])
    sides = []
    for pad in ("leftpad", "rightpad"):
        pad_y = float(self.get_body_com(pad)[1])
        margin = abs(abs(pad_y - start_y) - pad_success_thresh)
        sides.append(_tolerance(abs(pad_y - y), (obj_radius, pad_success_thresh), margin, "long_tail"))
    caging_y = reward_utils.hamacher_product(*sides)
    margin = _norm(np.array((start[0] - self.init_tcp[0], start[2] - self.init_tcp[2]))) - xz_thresh
    distance = _norm(np.array((tcp[0] - obj_pos[0], tcp[2] - obj_pos[2])))
    caging_xz = _tolerance(distance, (0, xz_thresh), margin, "long_tail")
    closed = min(max(0, action[-1]), desired_gripper_effort) / desired_gripper_effort
    caging = reward_utils.hamacher_product(caging_y, float(caging_xz))
    reward = reward_utils.hamacher_product(caging, closed if caging > 0.97 else 0.0)
    if high_density:
        reward = (reward + caging) / 2
    if medium_density:
        margin = abs(_norm(start - self.init_tcp) - object_reach_radius)
        reach = _tolerance(_norm(obj_pos - tcp), (0, object_reach_radius), margin, "long_tail")
        reward = (reward + float(reach)) / 2
    return reward


_BASE = {
    "step": _step,
    "reset": _reset,
    "do_simulation": _do_simulation,
    "_get_obs": _get_obs,
    "_get_curr_obs_combined_no_goal": _get_curr_obs_combined_no_goal,
    "tcp_center": property(_tcp_center),
    "get_body_com": _get_body_com,
    "touching_object": _touching_object,
    "_gripper_caging_reward": _gripper_caging_reward,
}


def _norm(x: Array, ord: Any = None) -> Any:
    """``np.linalg.norm`` of one flat float64 array: the same dot product and square root."""
    if ord in (None, 2) and type(x) is np.ndarray and x.ndim == 1 and x.dtype == _DOUBLE and x.flags.c_contiguous:
        return np.float64(math.sqrt(x.dot(x)))
    return np.linalg.norm(x, ord)


_DOUBLE = np.dtype(np.float64)


def _clip(x: Any, low: Any, high: Any) -> Any:
    """``np.clip`` of one double."""
    if type(x) is np.float64 and type(low) in (int, float) and type(high) in (int, float):
        return np.float64(min(max(x, low), high))
    return np.clip(x, low, high)


def _tolerance(
    x: Any,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: Any = 0.0,
    sigmoid: Any = "gaussian",
    value_at_margin: float = 0.1,
) -> Any:
    """``reward_utils.tolerance`` for the case of almost every call: one double and a long tail."""
    if (
        sigmoid == "long_tail"
        and type(x) in _SCALARS
        and type(margin) in _SCALARS
        and margin > 0
        and value_at_margin == 0.1
        and bounds[0] <= bounds[1]
    ):
        lower, upper = bounds
        if lower <= x <= upper:
            return 1.0
        distance = float(lower - x if x < lower else x - upper) / float(margin)
        return 1 / ((distance * 3.0) ** 2 + 1)  # 3 = sqrt(1 / 0.1 - 1)
    return reward_utils.tolerance(x, bounds, margin, sigmoid, value_at_margin)


_SCALARS = (float, np.float64)


class _Quaternion(NamedTuple):
    values: list[float]

    def as_quat(self) -> Array:
        return np.array(self.values)


class _Rotation:
    """``scipy.spatial.transform.Rotation.from_matrix(m).as_quat()`` for one rotation matrix.

    Shepperd's method in scipy's order of operations, (x, y, z, w). Matrices come from MuJoCo and are orthogonal.
    """

    @staticmethod
    def from_matrix(matrix: Array) -> _Quaternion:
        m = matrix.tolist()
        trace = m[0][0] + m[1][1] + m[2][2]
        decision = (m[0][0], m[1][1], m[2][2], trace)
        choice = decision.index(max(decision))
        q = [0.0] * 4
        if choice == 3:
            q[0], q[1], q[2] = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]
            q[3] = 1 + trace
        else:
            i, j, k = choice, (choice + 1) % 3, (choice + 2) % 3
            q[i] = 1 - trace + 2 * m[i][i]
            q[j] = m[j][i] + m[i][j]
            q[k] = m[k][i] + m[i][k]
            q[3] = m[k][j] - m[j][k]
        norm = math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
        return _Quaternion([part / norm for part in q])


def _hstack(parts: Any) -> Array:
    """``np.hstack`` of doubles."""
    if all(type(part) is np.float64 for part in parts):
        return np.array(parts)
    return np.hstack(parts)


_SEEN = {
    "np": types.SimpleNamespace(
        **{**vars(np), "linalg": types.SimpleNamespace(norm=_norm), "clip": _clip, "hstack": _hstack}
    ),
    "Rotation": _Rotation,
    "tolerance": _tolerance,
    "reward_utils": types.SimpleNamespace(**{**vars(reward_utils), "tolerance": _tolerance}),
}
"""What the copied functions see under these names."""


def _names(cls: type) -> dict[str, Any]:
    """The global names of the module of ``cls``, with ``_SEEN`` in place of what it imports under these names."""
    names = vars(sys.modules[cls.__module__])
    return {**names, **{name: value for name, value in _SEEN.items() if name in names}}


def _copied(function: Any, names: dict[str, Any]) -> Any:
    """A copy of a function or static method with ``names`` as its globals."""
    if isinstance(function, staticmethod):
        return staticmethod(_copied(function.__func__, names))
    if function.__name__ == "inner":  # SawyerXYZEnv._Decorators.assert_task_is_set; mtrl sets it
        function = function.__closure__[0].cell_contents
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
