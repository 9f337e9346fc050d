"""A homogeneous view of any vector, for libraries that know one observation space and one action space.

Inside mtrl nothing is padded: rows that share spaces form groups. Off-the-shelf libraries want all rows alike, so
``Padding`` lays the groups side by side with zeros to fill up, and ``PaddedVectorEnv`` is a vector in that form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mtrl import registry
from mtrl.types import Array, Group, Obs, Spec
from mtrl.vector.env import MultiTaskVectorEnv

Illegal = Literal["error", "first"]
Padded = dict[str, Array]
"""Observations of all rows, alike: the keys and shapes of ``Padding.observation_space``, with a leading axis N."""

_PERCEPTION = ("vector", "image", "tokens", "state")  # the order in which leaves are laid side by side


class Padding:
    """Between ragged groups and one homogeneous space.

    Observations become a dictionary:

    * ``observation`` [D] float32: the leaves ``vector``, ``image``, ``tokens``, ``state`` that a group has, flattened
      and joined in this order, unscaled, with zeros up to the widest group. With ``flatten=False`` instead each leaf
      under its own name, in its own shape and dtype;
    * ``task``: the task id;
    * ``action_mask`` [A] int8 (Discrete actions only): 1 for actions that the row has and that are legal. A row in
      which nothing is legal (its episode is over) shows action 0, so that a masked distribution stays defined;
    * ``alive`` [1] int8 (only if some task is a team): 0 for members that are dead.

    Actions of Discrete groups become ``Discrete(max n)``, those of Box groups ``Box(-1, 1, [max a])``, scaled affinely
    to each group's bounds; a row ignores the dimensions that it does not have.

    Args:
        spec: tasks and groups.
        flatten: see above; ``False`` needs groups whose leaves have the same names and shapes.
        illegal: what becomes of an illegal Discrete action: ``"error"`` raises, ``"first"`` plays the row's first legal
            one, for libraries that know no masks.

    Raises:
        ValueError: Discrete and Box groups in one spec; ``flatten=False`` with groups that differ.
    """

    def __init__(self, spec: Spec, *, flatten: bool = True, illegal: Illegal = "error") -> None:
        if illegal not in get_args(Illegal):
            raise ValueError(f"illegal={illegal!r}: choose one of {', '.join(map(repr, get_args(Illegal)))}")
        self.spec, self.flatten, self.illegal = spec, flatten, illegal
        self.action_space = _common_action(spec.groups)
        self._action_shape: tuple[int, ...] = self.action_space.shape or ()
        fields = _side_by_side(spec.groups) if flatten else _shared(spec.groups)
        entries: dict[str, spaces.Space[Any]] = {**fields, "task": Discrete(len(spec.tasks))}
        if isinstance(self.action_space, Discrete):
            entries["action_mask"] = Box(0, 1, (int(self.action_space.n),), np.int8)
        if any("alive" in group.leaves for group in spec.groups):
            entries["alive"] = Box(0, 1, (1,), np.int8)
        self.observation_space = spaces.Dict(entries)
        self._fields = fields
        index = {group.name: i for i, group in enumerate(spec.groups)}
        self._home = np.array([index[task.group] for task in spec.tasks])
        # Per group: (field, where in the field, leaf) of everything it perceives.
        self._plan = [
            [("observation", part, leaf) for leaf, part in _parts(group)]
            if flatten
            else [(leaf, slice(None), leaf) for leaf in fields]
            for group in spec.groups
        ]

    def pad(self, obs: Obs) -> Padded:
        """Observations of N rows in the common form; fresh arrays."""
        n = len(obs.task)
        padded: Padded = {
            name: np.zeros((n, *(space.shape or ())), space.dtype) for name, space in self.observation_space.items()
        }
        padded["task"][...] = obs.task
        if "alive" in padded:
            padded["alive"][...] = 1
        for group, plan, rows in self._rows(obs.task):
            leaves = obs.leaves[group.name]
            for field, part, leaf in plan:
                values = leaves[leaf]
                padded[field][rows, part] = values.reshape(len(rows), -1) if self.flatten else values
            if isinstance(group.action, Discrete):
                size = int(group.action.n)
                padded["action_mask"][rows, :size] = leaves.get("legal", 1)
            if "alive" in leaves:
                padded["alive"][rows, 0] = leaves["alive"]
        if "action_mask" in padded:
            mask = padded["action_mask"]
            mask[~mask.any(axis=1), 0] = 1
        return padded

    def unpad(self, padded: Mapping[str, Array], first: Array) -> Obs:
        """The ragged observations that ``pad`` was given, up to the leaf ``legal`` of rows where nothing is legal.

        Args:
            padded: as from ``pad``.
            first: [N] bool, see ``Obs``.

        Raises:
            KeyError: a key is missing, for instance ``action_mask`` after ``flat`` and ``unflat``.
        """
        task = np.asarray(padded["task"], np.int64).reshape(-1)
        ragged: dict[str, dict[str, Array]] = {}
        for group, plan, rows in self._rows(task):
            leaves: dict[str, Array] = {}
            for field, part, leaf in plan:
                box = group.leaves[leaf]
                leaves[leaf] = padded[field][rows, part].reshape(len(rows), *box.shape).astype(box.dtype)
            if "legal" in group.leaves:
                leaves["legal"] = padded["action_mask"][rows, : group.leaves["legal"].shape[0]].astype(bool)
            if "alive" in group.leaves:
                leaves["alive"] = padded["alive"][rows, 0].astype(bool)
            ragged[group.name] = leaves
        return Obs(ragged, task, np.asarray(first, bool))

    def pad_action(self, actions: Mapping[str, Array], task: Array) -> Array:
        """Actions of the groups in the common form: [N] int64 or [N, max a] float32, zeros where a row has none."""
        common = np.zeros((len(task), *self._action_shape), self.action_space.dtype)
        for group, _, rows in self._rows(task):
            if isinstance(group.action, Discrete):
                common[rows] = actions[group.name]
            else:
                center, half = _scale(group.action)
                ratio = (actions[group.name] - center) / np.where(half > 0, half, 1)
                common[rows, : len(half)] = np.clip(ratio, -1, 1)
        return common

    def unpad_action(self, actions: Array, padded: Mapping[str, Array]) -> dict[str, Array]:
        """Actions in the common form, decided at the observations ``padded``, as the groups want them.

        Raises:
            ValueError: naming the row and its task: an action outside the common space, or an illegal one while
                ``illegal="error"``.
        """
        actions, task = np.asarray(actions), padded["task"]
        if actions.shape != (len(task), *self._action_shape):
            raise ValueError(
                f"actions have the shape {actions.shape}, this view wants {(len(task), *self._action_shape)}"
            )
        if isinstance(self.action_space, Discrete):
            actions = self._legal(actions, padded["action_mask"], task)
        found: dict[str, Array] = {}
        for group, _, rows in self._rows(task):
            if isinstance(group.action, Discrete):
                found[group.name] = actions[rows]
            else:
                center, half = _scale(group.action)
                scaled = center + half * actions[rows, : len(half)].astype(np.float32)
                # Rounding must not push an action out of its bounds. NaN stays NaN, for the vector to complain of.
                found[group.name] = np.clip(scaled, group.action.low, group.action.high).astype(np.float32)
        return found

    @property
    def flat_space(self) -> Box:
        """Space of ``flat``: the observation and the task as a one-hot.

        Raises:
            ValueError: this padding keeps leaves apart (``flatten=False``).
        """
        if not self.flatten:
            raise ValueError("a flat observation needs Padding(flatten=True)")
        box, tasks = self._fields["observation"], len(self.spec.tasks)
        low, high = np.zeros(tasks, np.float32), np.ones(tasks, np.float32)
        return Box(np.concatenate([box.low, low]), np.concatenate([box.high, high]), dtype=np.float32)

    def flat(self, padded: Mapping[str, Array]) -> Array:
        """``observation`` and the task as a one-hot, joined: [N, D + T] float32."""
        one_hot = np.eye(len(self.spec.tasks), dtype=np.float32)[padded["task"]]
        return np.concatenate([padded["observation"], one_hot], axis=-1)

    def unflat(self, flat: Array) -> Padded:
        """``observation`` and ``task`` out of what ``flat`` joined; masks are not in there."""
        width = self._fields["observation"].shape[0]
        return {"observation": flat[..., :width], "task": flat[..., width:].argmax(axis=-1)}

    def _rows(self, task: Array) -> list[tuple[Group, list[tuple[str, slice, str]], Array]]:
        """(group, plan, its row numbers) of every group that has rows; rows of a group keep their order."""
        home = self._home[task]
        every = [(group, self._plan[i], np.flatnonzero(home == i)) for i, group in enumerate(self.spec.groups)]
        return [item for item in every if len(item[2])]

    def _legal(self, actions: Array, mask: Array, task: Array) -> Array:
        if not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(f"Discrete actions must be integers, got {actions.dtype}")
        count = mask.shape[1]
        outside = (actions < 0) | (actions >= count)
        chosen = np.where(outside, 0, actions).astype(np.int64)
        wrong = ~mask[np.arange(len(mask)), chosen].astype(bool)
        refused = outside if self.illegal == "first" else outside | wrong
        if refused.any():
            row = int(np.flatnonzero(refused)[0])
            raise ValueError(
                f"row {row}, task {self.spec.tasks[int(task[row])].name!r}: action {int(actions[row])} is "
                + (f"outside [0, {count})" if outside[row] else f"illegal, legal are {_indices(mask[row])}")
                + "; obey the observation's 'action_mask', or build the view with illegal='first'"
            )
        return np.where(wrong, mask.argmax(axis=1), chosen)


class PaddedVectorEnv(VectorEnv):
    """``MultiTaskVectorEnv`` with one observation space and one action space for all rows; see ``Padding``.

    Everything else is as there: one row per decision-maker, SAME_STEP autoreset, ``info`` with ``task``, ``success``,
    ``active`` and, where episodes ended, ``final_obs`` (a row's padded observation) and ``final_info["episode"]``.

    Args:
        envs: what to view. It belongs to the view from now on, which closes it.
        flatten, illegal: see ``Padding``.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, envs: MultiTaskVectorEnv, *, flatten: bool = True, illegal: Illegal = "error") -> None:
        if not isinstance(envs, MultiTaskVectorEnv):
            raise TypeError(f"envs={envs!r}: give a MultiTaskVectorEnv(mtrl.tasks('minigrid/mt3'), copies=2)")
        self.envs = envs
        self.padding = Padding(envs.spec, flatten=flatten, illegal=illegal)
        self.num_envs = envs.num_envs
        self.single_observation_space = self.padding.observation_space
        self.single_action_space = self.padding.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Padded, dict[str, Any]]:
        """Begin every row's first episode; ``seed`` is a new run seed, None keeps the present one."""
        super().reset(seed=seed)
        _, info = self.envs.reset(seed=seed, options=options)
        self._padded = self.padding.pad(self.envs.obs)
        return self._observation(), info

    def step(self, actions: Array) -> tuple[Padded, Array, Array, Array, dict[str, Any]]:
        """Step every row with ``actions`` [N] integers or [N, a] floats.

        Returns:
            ``(observation, reward [N] float64, terminated [N], truncated [N], info)``.

        Raises:
            ValueError: an action that its row cannot play.
        """
        *_, reward, terminated, truncated, info = self.envs.step(self.padding.unpad_action(actions, self._padded))
        if "final_obs" in info:
            for row in np.flatnonzero(info["_final_obs"]):
                info["final_obs"][row] = self._final(info["final_obs"][row], info["task"][row])
        self._padded = self.padding.pad(self.envs.obs)
        return self._observation(), reward, terminated, truncated, info

    def action_masks(self) -> Array:
        """[N, A] bool: what each row may play now. The name is the one that sb3-contrib's MaskablePPO asks for.

        Raises:
            KeyError: actions are not Discrete.
        """
        return self._padded["action_mask"].astype(bool)

    def render(self) -> None:
        """Nothing; ``mtrl.vector.replay`` renders any episode afterwards."""

    def close_extras(self, **kwargs: Any) -> None:
        """Close the vector and its environments."""
        self.envs.close(**kwargs)

    def _observation(self) -> Padded:
        """The present observation; copied, since callers may write to what they are given."""
        return {name: array.copy() for name, array in self._padded.items()}

    def _final(self, leaves: Mapping[str, Array], task: int) -> dict[str, Any]:
        group = self.envs.spec.tasks[task].group
        one = Obs({group: {name: leaf[None] for name, leaf in leaves.items()}}, np.array([task]), np.array([False]))
        return {name: array[0] for name, array in self.padding.pad(one).items()}


def make(
    suite: str,
    num_envs: int | None = None,
    *,
    seed: int = 0,
    workers: int = 0,
    flatten: bool = True,
    illegal: Illegal = "error",
) -> PaddedVectorEnv:
    """The padded view of a mix of tasks; behind ``gymnasium.make_vec("mtrl_envs:...")``.

    Args:
        suite: as on the command line: ``"metaworld/mt10"``, ``"minigrid/mt3"``, ``"a/b+c/d*4"``.
        num_envs: rows. None and 1 (what ``make_vec`` passes by default) give each task the copies that ``suite`` says;
            otherwise a multiple of the rows that these fill.
        seed: the run seed, until ``reset(seed=...)`` gives another.
        workers: worker processes; 0 steps the environments in this one.
        flatten, illegal: see ``Padding``.

    Raises:
        ValueError: ``num_envs`` is no such multiple.
        mtrl.registry.UnknownNameError: no such suite or group.
        mtrl.registry.MixError: ``suite`` is written wrongly.
    """
    mix = registry.mix(suite)
    rows = sum(task.agents * copies for task, copies in zip(mix.tasks, mix.copies, strict=True))
    times, rest = divmod(rows if num_envs in (None, 1) else num_envs, rows)
    if rest or times < 1:
        each = "one copy of each task" if max(mix.copies) == 1 else "the copies it asks for"
        raise ValueError(
            f"num_envs={num_envs}: {suite!r} fills {rows} rows with {each}; "
            f"give a multiple of {rows}, such as {max(times, 1) * rows}"
        )
    envs = MultiTaskVectorEnv(mix.tasks, [times * copies for copies in mix.copies], seed=seed, workers=workers)
    try:
        return PaddedVectorEnv(envs, flatten=flatten, illegal=illegal)
    except ValueError:
        envs.close()
        raise


def _common_action(groups: Sequence[Group]) -> Discrete | Box:
    discrete = [group.action for group in groups if isinstance(group.action, Discrete)]
    boxes = [group.action for group in groups if isinstance(group.action, Box)]
    if discrete and boxes:
        names = [[group.name for group in groups if isinstance(group.action, kind)] for kind in (Discrete, Box)]
        raise ValueError(
            f"groups {names[0]} have Discrete actions and {names[1]} have Box actions; a homogeneous view holds one "
            "kind: view them in two vectors, or use an agent that takes both, such as ppo"
        )
    if discrete:
        return Discrete(max(int(action.n) for action in discrete))
    return Box(-1.0, 1.0, (max(action.shape[0] for action in boxes),), np.float32)


def _perceived(group: Group) -> list[str]:
    return [leaf for leaf in _PERCEPTION if leaf in group.leaves]


def _parts(group: Group) -> list[tuple[str, slice]]:
    """Where each leaf lies in the group's flat observation."""
    parts, start = [], 0
    for leaf in _perceived(group):
        stop = start + int(np.prod(group.leaves[leaf].shape))
        parts.append((leaf, slice(start, stop)))
        start = stop
    return parts


def _side_by_side(groups: Sequence[Group]) -> dict[str, Box]:
    width = max(parts[-1][1].stop for parts in map(_parts, groups))
    # Zeros where a group is narrower; the bounds hold what any group may show.
    low, high = np.zeros((len(groups), width), np.float32), np.zeros((len(groups), width), np.float32)
    for i, group in enumerate(groups):
        for leaf, part in _parts(group):
            low[i, part], high[i, part] = group.leaves[leaf].low.ravel(), group.leaves[leaf].high.ravel()
    return {"observation": Box(low.min(axis=0), high.max(axis=0), dtype=np.float32)}


def _shared(groups: Sequence[Group]) -> dict[str, Box]:
    shapes = [{leaf: group.leaves[leaf].shape for leaf in _perceived(group)} for group in groups]
    for group, mine in zip(groups, shapes, strict=True):
        if mine != shapes[0]:
            raise ValueError(
                f"flatten=False: groups {groups[0].name!r} and {group.name!r} differ in their leaves "
                f"({shapes[0]} and {mine}); use flatten=True"
            )
    merged = {}
    for leaf in shapes[0]:
        boxes = [group.leaves[leaf] for group in groups]
        low = np.minimum.reduce([box.low for box in boxes])
        merged[leaf] = Box(low, np.maximum.reduce([box.high for box in boxes]), dtype=boxes[0].dtype.type)
    return merged


def _scale(action: Box) -> tuple[Array, Array]:
    """Center and half width [a] of the bounds, float32. For bounds -1, 1 scaling is then exact."""
    low, high = action.low.astype(np.float32), action.high.astype(np.float32)
    return (high + low) / 2, (high - low) / 2


def _indices(mask: Array) -> list[int]:
    return np.flatnonzero(mask).tolist()
