"""Gymnasium spaces to leaves, tasks to groups to a ``Spec``.

A *leaf* is one named array of an observation (see ``mtrl.types.LEAF_NAMES``). A ``Codec`` knows how one task's
raw observation is laid into leaves:

* ``Box`` of rank <= 1 and other numbers go into ``vector`` (float32); ``Discrete``, ``MultiDiscrete`` and
  ``MultiBinary`` go there as one-hots or bits;
* ``Box`` of rank 3 is the ``image``, stored channels first as uint8 (channels are moved to the front when the
  last axis is the smallest); a rank 2 ``Box`` of uint8 is a one-channel image;
* a ``Dict`` is taken apart key by key in its own order; the keys ``state``, ``tokens``, ``legal`` (or PettingZoo's
  ``action_mask``) are those leaves, whatever their rank;
* legal actions may also arrive as ``info["action_mask"]``, Gymnasium's habit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete

from mtrl.registry import MissingPackageError, UnknownNameError, raised
from mtrl.types import Group, Spec, Task, TaskInfo

_MASKS = ("legal", "action_mask")
NO_INFO = "reset() does not return (observation, info)"
RETURN_INFO = "reset must return (observation, info), as in `return observation, {}`"
_DTYPES = {"vector": np.float32, "state": np.float32, "image": np.uint8, "tokens": np.int32, "legal": np.bool_}


class SpaceError(TypeError):
    """A space that the contract has no leaf or action for; the message names the task and the place.

    Attributes:
        what: is wrong.
        fix: how to mend it, where that is known; the message holds both.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}; {fix}" if fix else what)
        self.what, self.fix = what, fix


class Codec:
    """Writes one task's raw observations into leaf arrays.

    Attributes:
        leaves: shape and bounds of every leaf of one row, without the leading row axis.
        action: the row's action space.
        floats: leaves that an environment can put a number into which is not finite.
    """

    def __init__(
        self,
        observation: gym.Space[Any],
        action: gym.Space[Any],
        *,
        task: str = "task",
        state: Box | None = None,
        team: bool = False,
        mask_in_info: bool = False,
    ) -> None:
        self._recipe = (observation, action, task, state, team, mask_in_info)
        self.task = task
        self.action = _action(action, task)
        self.mask_in_info = mask_in_info
        # (path into the observation, leaf, slice of a vector leaf or None, how to turn the raw part into numbers)
        self._plan: list[tuple[tuple[str, ...], str, slice | None, Callable[[Any], Any]]] = []
        bounds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.floats: set[str] = set() if state is None else {"state"}
        self._walk(observation, (), None, bounds)
        if state is not None:
            bounds["state"] = [(_flat(state.low), _flat(state.high))]
        if mask_in_info:
            self._mask_leaf(bounds, "info['action_mask']")
        if team:
            bounds["alive"] = [(np.zeros((), bool), np.ones((), bool))]
        self.leaves: dict[str, Box] = {}
        for name, parts in bounds.items():
            low = np.concatenate([p[0] for p in parts]) if name == "vector" else parts[0][0]
            high = np.concatenate([p[1] for p in parts]) if name == "vector" else parts[0][1]
            self.leaves[name] = _box(low, high, name)
        if not self.leaves:
            raise SpaceError(f"{task}: the observation space {observation} holds nothing to observe")
        # The plain case (one flat Box) is worth a fast path: it is every MetaWorld step.
        self._plain = len(self._plan) == 1 and self._plan[0][:2] == ((), "vector") and isinstance(observation, Box)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, self._recipe  # the plan holds closures; worker processes make it again

    def write(self, obs: Any, info: Mapping[str, Any], out: Mapping[str, np.ndarray], row: int) -> None:
        """Lay one raw observation into ``out[leaf][row]`` (arrays [rows, ...] of the leaves' dtypes).

        Raises:
            SpaceError: it does not fit the observation space; names task and space.
        """
        try:
            if self._plain:
                if obs.size != out["vector"].shape[1]:  # numpy would repeat a single number
                    raise ValueError(f"its shape is {obs.shape}")
                out["vector"][row] = obs if obs.ndim == 1 else obs.reshape(-1)
            else:
                for path, leaf, part, read in self._plan:
                    raw = obs
                    for key in path:
                        raw = raw[key]
                    if part is None:
                        out[leaf][row] = read(raw)
                    else:
                        out[leaf][row, part] = read(raw)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"does not fit its space {self._recipe[0]} ({type(error).__name__}: {error})"
            raise SpaceError(f"{self.task}: the observation {reason}") from error
        if self.mask_in_info:
            if "action_mask" not in info:
                raise KeyError(f"{self.task}: info['action_mask'] was there at the first reset and is missing now")
            out["legal"][row] = np.asarray(info["action_mask"], bool)

    def _walk(
        self,
        space: gym.Space[Any],
        path: tuple[str, ...],
        leaf: str | None,
        bounds: dict[str, list[tuple[np.ndarray, np.ndarray]]],
    ) -> None:
        where = f"{self.task}: observation{''.join(f'[{key!r}]' for key in path)}"
        if isinstance(space, spaces.Dict):
            for key, inner in space.spaces.items():
                name = "legal" if key in _MASKS else key if key in ("state", "tokens") else leaf
                self._walk(inner, (*path, key), name, bounds)
            return
        if leaf == "legal":
            self._mask_leaf(bounds, where)
            self._plan.append((path, "legal", None, lambda raw: np.asarray(raw, bool)))
            return
        if leaf in ("state", "tokens"):
            if not isinstance(space, Box):
                raise SpaceError(f"{where} must be a Box to be the leaf {leaf!r}, got {space}")
            self._add(bounds, where, leaf, space.low.reshape(-1), space.high.reshape(-1))
            self._plan.append((path, leaf, None, np.ravel))
            if leaf == "state":
                self.floats.add(leaf)
            return
        if isinstance(space, Box) and (len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8)):
            move = _channels_first(space.shape)
            if space.dtype != np.uint8:
                raise SpaceError(f"{where}: an image must be uint8, got {space.dtype}")
            self._add(bounds, where, "image", move(space.low), move(space.high))
            self._plan.append((path, "image", None, move))
            return
        low, high, read = _numbers(space, where)
        if isinstance(space, Box) and space.dtype.kind == "f":
            self.floats.add("vector")
        start = sum(len(p[0]) for p in bounds.get("vector", ()))
        bounds.setdefault("vector", []).append((low, high))
        self._plan.append((path, "vector", slice(start, start + len(low)), read))

    def _add(self, bounds: dict[str, Any], where: str, leaf: str, low: np.ndarray, high: np.ndarray) -> None:
        if leaf in bounds:
            raise SpaceError(f"{where} is a second {leaf!r}; an observation holds at most one")
        bounds[leaf] = [(low, high)]

    def _mask_leaf(self, bounds: dict[str, Any], where: str) -> None:
        if not isinstance(self.action, Discrete):
            raise SpaceError(f"{where}: legal actions need a Discrete action space, got {self.action}")
        n = int(self.action.n)
        self._add(bounds, where, "legal", np.zeros(n, bool), np.ones(n, bool))


def _remake(observation: Any, action: Any, task: str, state: Box | None, team: bool, mask_in_info: bool) -> Codec:
    return Codec(observation, action, task=task, state=state, team=team, mask_in_info=mask_in_info)


def codec(task: Task) -> Codec:
    """The codec of a task, from its declared spaces or from one environment built (and closed) for the purpose."""
    if task.spaces is not None and task.agents == 1:
        return Codec(*task.spaces, task=task.name)
    try:
        env = task.build()
    except (MissingPackageError, UnknownNameError):
        raise
    except Exception as error:
        raise SpaceError(f"{task.name}: building its environment raised {raised(error)}") from error
    try:
        if hasattr(env, "possible_agents"):
            return team_codec(task, env)
        if task.agents != 1:
            raise SpaceError(f"{task.name}: says agents={task.agents} but builds a single-agent environment")
        info = _first_info(task, env)
        return Codec(*declared(task, env), task=task.name, mask_in_info="action_mask" in info)
    finally:
        env.close()


def declared(task: Task, env: Any) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """The observation and action space of a single-agent environment.

    Raises:
        SpaceError: one of them is missing.
    """
    for name in ("observation_space", "action_space"):
        found = getattr(env, name, None)
        if not isinstance(found, gym.Space):
            wrong = f"{name} {found!r}, which is no gymnasium space" if hasattr(env, name) else f"no {name}"
            fix = f"set self.{name} to a gymnasium space, such as Box or Discrete, in __init__"
            raise SpaceError(f"{task.name}: the environment {type(env).__name__} has {wrong}", fix)
    return env.observation_space, env.action_space


def _first_info(task: Task, env: Any) -> Mapping[str, Any]:
    try:
        first = env.reset(seed=0)
    except Exception as error:
        raise SpaceError(f"{task.name}: reset(seed=0) raised {raised(error)}") from error
    if not (isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], Mapping)):
        raise SpaceError(f"{task.name}: {NO_INFO}", RETURN_INFO)
    return first[1]


def team_codec(task: Task, env: Any) -> Codec:
    """The codec of one row of a PettingZoo ``ParallelEnv``; all its agents must share their spaces."""
    agents = list(env.possible_agents)
    if len(agents) != task.agents:
        raise SpaceError(f"{task.name}: says agents={task.agents} but its environment has {len(agents)}")
    pairs = [(env.observation_space(agent), env.action_space(agent)) for agent in agents]
    for agent, pair in zip(agents[1:], pairs[1:], strict=True):
        if pair != pairs[0]:
            raise SpaceError(f"{task.name}: agents {agents[0]!r} and {agent!r} differ in spaces; a team shares them")
    infos = _first_info(task, env)
    state = getattr(env, "state_space", None)
    if state is not None and not isinstance(state, Box):
        raise SpaceError(f"{task.name}: state_space must be a Box, got {state}")
    masked = all("action_mask" in infos.get(agent, {}) for agent in agents)
    return Codec(*pairs[0], task=task.name, state=state, team=True, mask_in_info=masked)


PARTS = ("perception", "trunk", "memory", "heads", "head")
"""Of networks. Parameters are told apart by these names, beside which those of groups stand: no group has one."""


def make_spec(tasks: Sequence[Task], codecs: Sequence[Codec] | None = None) -> Spec:
    """Group tasks of one suite that share leaf shapes, frames and action space; groups are named after their suite,
    with a number where that is taken (or one of ``PARTS``, or what torch's ``ModuleDict`` has of its own: "train").

    Args:
        tasks: in the order that task ids follow.
        codecs: one per task, if already made.

    Raises:
        SpaceError: a task's ``frames`` do not fit its leaves.
        UnknownNameError: they name a leaf that is not there.
    """
    from torch.nn import ModuleDict  # here: workers need no torch

    if not tasks:
        raise ValueError("no tasks: a spec needs at least one")
    made = [codec(task) for task in tasks] if codecs is None else codecs
    members: dict[tuple[Any, ...], list[int]] = {}
    for index, (task, one) in enumerate(zip(tasks, made, strict=True)):
        check_frames(task, one.leaves)
        leaves = tuple(sorted((name, box.shape, str(box.dtype)) for name, box in one.leaves.items()))
        frames = tuple(sorted(task.frames.items()))
        members.setdefault((task.name.partition("/")[0], leaves, frames, _action_key(one.action)), []).append(index)
    groups: list[Group] = []
    taken = {*PARTS, *dir(ModuleDict())}
    home = [""] * len(tasks)
    for (suite, *_), indices in members.items():
        # Names become keys of modules and files: dots and colons are left out.
        stem = suite.replace(":", "_").replace(".", "_")
        names = (stem, *(f"{stem}-{number}" for number in range(2, len(members) + 2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        boxes = [made[i].leaves for i in indices]
        leaves = {
            leaf: _box(
                np.minimum.reduce([b[leaf].low for b in boxes]), np.maximum.reduce([b[leaf].high for b in boxes]), leaf
            )
            for leaf in boxes[0]
        }
        groups.append(Group(name, leaves, made[indices[0]].action, tuple(indices), tasks[indices[0]].frames))
        for i in indices:
            home[i] = name
    infos = tuple(
        TaskInfo(task.name, group, task.horizon, task.score, task.agents, task.shared_reward)
        for task, group in zip(tasks, home, strict=True)
    )
    return Spec(infos, tuple(groups))


def check_frames(task: Task, leaves: Mapping[str, Box]) -> None:
    """Refuse ``task.frames`` that do not fit its leaves.

    Raises:
        SpaceError: a leaf that cannot be cut into so many frames.
        UnknownNameError: a leaf that is not there.
    """
    for leaf, k in task.frames.items():
        if leaf not in leaves:
            raise UnknownNameError(f"leaf in Task.frames of {task.name!r}", leaf, tuple(leaves))
        shape = leaves[leaf].shape
        if k < 2 or not shape or shape[0] % k:
            raise SpaceError(
                f"{task.name}: Task.frames says that the leaf {leaf!r} is a stack of {k} frames, but its shape is "
                f"{shape}: give a number from 2 on that divides the first axis"
            )


def _action(space: gym.Space[Any], task: str) -> Discrete | Box:
    if isinstance(space, Discrete):
        if space.start != 0:
            fix = f"subtract the start in the suite: declare Discrete({space.n}), and add {space.start} again in step()"
            raise SpaceError(f"{task}: Discrete actions must start at 0, got start={space.start}", fix)
        return space
    if isinstance(space, Box):
        if len(space.shape) != 1:
            flat = f"({math.prod(space.shape)},)"
            fix = f"flatten it in the suite: declare shape {flat}, reshape actions to {space.shape} in step()"
            raise SpaceError(f"{task}: Box actions must have rank 1, got shape {space.shape}", fix)
        if not np.issubdtype(space.dtype, np.floating):
            n = math.prod((space.high.astype(int) - space.low.astype(int) + 1).tolist())
            fix = f"enumerate it as Discrete({n}) in the suite, or declare float32 and round in step()"
            raise SpaceError(f"{task}: Box actions must be floating-point numbers, got {space}", fix)
        if not space.is_bounded():
            fix = f"give it bounds in the suite, as in Box(-1.0, 1.0, {space.shape}), and scale actions in step()"
            raise SpaceError(f"{task}: Box actions must be bounded, got {space}", fix)
        return space
    fix = "turn it into one Discrete or one bounded Box of rank 1 in the suite"
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        many = isinstance(space, spaces.MultiDiscrete)
        n = math.prod(np.ravel(space.nvec).tolist()) if many else 2 ** math.prod(space.shape)
        fix = f"enumerate it as Discrete({n}) in the suite, and take actions apart again in step()"
    raise SpaceError(f"{task}: actions must be Discrete or Box, got {space}", fix)


def _action_key(space: Discrete | Box) -> tuple[Any, ...]:
    if isinstance(space, Discrete):
        return ("discrete", int(space.n))
    return ("box", space.low.tobytes(), space.high.tobytes())


def _numbers(space: gym.Space[Any], where: str) -> tuple[np.ndarray, np.ndarray, Callable[[Any], Any]]:
    if isinstance(space, Box):
        return _flat(space.low), _flat(space.high), np.ravel
    if isinstance(space, Discrete):
        eye = np.eye(int(space.n), dtype=np.float32)
        start = int(space.start)
        return np.zeros(len(eye), np.float32), np.ones(len(eye), np.float32), lambda raw: eye[_index(raw, start)]
    if isinstance(space, spaces.MultiDiscrete):
        sizes = np.ravel(space.nvec)
        eyes = [np.eye(int(n), dtype=np.float32) for n in sizes]
        starts = np.ravel(space.start)
        total = int(sizes.sum())
        return (
            np.zeros(total, np.float32),
            np.ones(total, np.float32),
            lambda raw: np.concatenate([eye[_index(v)] for eye, v in zip(eyes, np.ravel(raw) - starts, strict=True)]),
        )
    if isinstance(space, spaces.MultiBinary):
        total = int(np.prod(space.shape))
        return np.zeros(total, np.float32), np.ones(total, np.float32), np.ravel
    raise SpaceError(f"{where}: {space} has no leaf; turn it into numbers in the suite (text: token ids in 'tokens')")


def _index(raw: Any, start: int = 0) -> int:
    index = int(raw) - start
    if index < 0:  # which numpy would count from the end
        raise ValueError(f"{raw} is below {start}")
    return index


def _channels_first(shape: tuple[int, ...]) -> Callable[[Any], np.ndarray]:
    if len(shape) == 2:
        return lambda raw: np.asarray(raw)[None]
    if shape[2] < shape[0]:
        return lambda raw: np.moveaxis(np.asarray(raw), -1, 0)
    return np.asarray


def _flat(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(-1)


def _box(low: np.ndarray, high: np.ndarray, leaf: str) -> Box:
    dtype = np.dtype(np.bool_ if leaf == "alive" else _DTYPES[leaf])
    if dtype == np.bool_:
        return Box(0, 1, np.shape(low), dtype=np.bool_)  # type: ignore[call-overload]
    return Box(np.asarray(low, dtype), np.asarray(high, dtype), dtype=dtype.type)  # type: ignore[call-overload]
