"""On-policy memory: the last steps of every row, generalised advantage estimation, and minibatches to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtrl.frames import DrawnStacks, Stacks
from mtrl.nn.actor_critic import SMALL, Rows, Scene, label, to_rows
from mtrl.nn.losses import task_weights
from mtrl.types import Array, Spec, Step


def gae(
    reward: Array,
    value: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: float,
    lam: float,
) -> Array:
    """Generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438), [t, n] float64.

    ``delta = r + gamma * V(s') * (not terminated) - V(s)``, summed with weights ``(gamma * lam)^k`` up to the episode's
    end. A truncated episode bootstraps from its true successor; a terminated one does not; neither lets the next
    episode leak in.

    Args:
        reward, value: [t, n], of the transition and of its observation.
        next_value: [t, n], of the transition's true successor (ignored where terminated).
        terminated, truncated: [t, n] bool.
    """
    delta = reward.astype(np.float64) + gamma * np.where(terminated, 0.0, next_value) - value
    carry = gamma * lam * ~(terminated | truncated)
    advantage = np.empty_like(delta)
    running = np.zeros(delta.shape[1])
    for t in range(len(delta) - 1, -1, -1):
        running = delta[t] + carry[t] * running
        advantage[t] = running
    return advantage


def not_finite(values: Array, roll: Rollout, names: Sequence[str]) -> str:
    """The tasks with an entry of ``values`` [t, n] that counts and is not finite; empty: all are."""
    return ", ".join(names[int(task)] for task in np.unique(roll.task[roll.valid & ~np.isfinite(values)]))


def explained_variance(returns: Array, value: Array, roll: Rollout, names: Sequence[str]) -> dict[str, float]:
    """Share of the returns' variance [t, n] that ``value`` explains, as metrics per task and their mean."""
    found: dict[str, float] = {}
    for index, name in enumerate(names):
        own = roll.valid & (roll.task == index)
        variance = returns[own].var() if own.any() else 0.0
        if variance > 0:
            found[f"losses/explained_variance/{name}"] = float(1 - (returns - value)[own].var() / variance)
    return {**found, "losses/explained_variance": float(np.mean(list(found.values())))} if found else {}


def chunk_length(rollout: int, wanted: int | None) -> int:
    """Consecutive steps of a row that are learned from together: ``wanted``, or the largest divisor up to 32.

    Raises:
        ValueError: ``wanted`` does not divide ``rollout``.
    """
    chunk = wanted or max(d for d in range(1, 33) if rollout % d == 0)
    if rollout % chunk:
        raise ValueError(f"chunk={chunk} must divide rollout={rollout}")
    return chunk


class Successors(NamedTuple):
    """The observations whose value cannot be read off the following step: transition (t[i], row[i]) led there.

    ``leaves[g]`` holds those of group g; ``t`` and ``row`` [m] int64 follow the order of the groups' rows.
    """

    t: Array
    row: Array
    leaves: dict[str, dict[str, Array]]


class Rollout:
    """``length`` consecutive steps of every row, as arrays [length, n, ...].

    Args:
        spec: names the groups; the number of rows is learned from the first step.
        length: steps per row.

    Attributes:
        rows: {group: its rows}, in row order; empty until the first step.
        size: steps stored so far.
        leaves: {group: {leaf: [length, n_g, ...]}}, the observations: arrays, or ``Stacks`` (which, indexed, give
            arrays) where the group declares ``frames``.
        extras: {name: [length, n, ...]}, what the actor left with its decisions.
        action: {group: [length, n_g, ...]}, what was sent to the environment.
        reward, terminated, truncated, task, first, valid: [length, n]. ``valid`` is false where a row was inactive or
            dead: learn nothing from it; its death inside a living team counts as termination of that row. Where a team
            shares its reward, the dead stay valid instead, and their returns go on.
    """

    def __init__(self, spec: Spec, length: int) -> None:
        self.spec, self.length = spec, length
        self._shared = np.array([task.shared_reward for task in spec.tasks])
        self.size = 0
        self.rows: dict[str, slice] = {}
        self.leaves: dict[str, dict[str, Any]] = {}
        self.extras: dict[str, Array] = {}
        self.action: dict[str, Array] = {}
        self._ends: list[tuple[int, dict[str, Array], dict[str, dict[str, Array]]]] = []

    @property
    def full(self) -> bool:
        """Whether it is time to learn."""
        return self.size == self.length

    @property
    def living(self) -> Array:
        """[length, n] float32, factors of a policy's terms: 0 for the dead, who choose nothing, and for the living of
        the same task so much more that means over the valid rows become means over the living."""
        acting = self.valid & self._alive(self.leaves, self.valid.shape)
        valid, alive = (np.bincount(self.task[x], minlength=len(self._shared)) for x in (self.valid, acting))
        return (acting * (valid / np.maximum(alive, 1))[self.task]).astype(np.float32)

    def add(self, step: Step) -> None:
        """Store one step of every row.

        Raises:
            RuntimeError: the rollout is full; ``clear`` it first.
        """
        if self.full:
            raise RuntimeError(
                f"the rollout already holds {self.length} steps: learn from it (update) before adding more"
            )
        if not self.rows:
            self._allocate(step)
        t = self.size
        alive, next_alive = (self._alive(obs.leaves, obs.task.shape) for obs in (step.obs, step.next))
        stays = self._shared[step.obs.task]
        self.valid[t] = step.active & (alive | stays)
        self.terminated[t] = step.terminated | (alive & ~next_alive & ~stays)
        self.truncated[t] = step.truncated & ~self.terminated[t]
        self.reward[t], self.task[t], self.first[t] = step.reward, step.obs.task, step.obs.first
        for group, rows in self.leaves.items():
            for leaf, array in rows.items():
                array[t] = step.obs.leaves[group][leaf]
            self.action[group][t] = step.decision.action[group]
        for name, array in self.extras.items():
            array[t] = step.decision.extras[name]
        self.size += 1
        wanted = self.valid[t] & (self.truncated[t] | (self.full & ~self.terminated[t]))
        if wanted.any():
            picked = {group: np.flatnonzero(wanted[rows]) for group, rows in self.rows.items() if wanted[rows].any()}
            found = {g: {leaf: step.next.leaves[g][leaf][at] for leaf in self.leaves[g]} for g, at in picked.items()}
            self._ends.append((t, picked, found))

    def successors(self) -> Successors:
        """Every truncated transition's true successor, and the last step's."""
        ts, rows, leaves = [], [], {}
        for group, own in self.rows.items():
            ends = [(t, picked[group], found[group]) for t, picked, found in self._ends if group in picked]
            if ends:
                ts += [np.full(len(picked), t) for t, picked, _ in ends]
                rows += [picked + own.start for _, picked, _ in ends]
                leaves[group] = {leaf: np.concatenate([f[leaf] for _, _, f in ends]) for leaf in self.leaves[group]}
        none = [np.zeros(0, np.int64)]
        return Successors(np.concatenate(ts or none), np.concatenate(rows or none), leaves)

    def clear(self) -> None:
        """Forget the steps, keep the arrays."""
        self.size = 0
        self._ends = []

    def state_dict(self) -> dict[str, Any]:
        """The stored steps as nested plain data."""
        if not self.rows:
            return {"size": 0, "rows": {}}
        n = self.size
        return {
            "size": n,
            "rows": {group: [rows.start, rows.stop] for group, rows in self.rows.items()},
            "leaves": {
                g: {leaf: x.state_dict(n) if isinstance(x, Stacks) else x[:n].copy() for leaf, x in own.items()}
                for g, own in self.leaves.items()
            },
            "action": {group: array[:n].copy() for group, array in self.action.items()},
            "extras": {name: array[:n].copy() for name, array in self.extras.items()},
            "fields": {name: getattr(self, name)[:n].copy() for name in _FIELDS},
            "ends": [{"t": t, "picked": dict(picked), "leaves": found} for t, picked, found in self._ends],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``'s answer."""
        self.__init__(self.spec, self.length)
        if not state["rows"]:
            return
        self.size = int(state["size"])
        self.rows = {group: slice(*bounds) for group, bounds in state["rows"].items()}
        self.leaves = {
            g: {leaf: self._grow_leaf(g, leaf, saved) for leaf, saved in own.items()}
            for g, own in state["leaves"].items()
        }
        self.action = {group: self._grow(array) for group, array in state["action"].items()}
        self.extras = {name: self._grow(array) for name, array in state["extras"].items()}
        for name in _FIELDS:
            setattr(self, name, self._grow(state["fields"][name]))
        self._ends = [
            (
                int(end["t"]),
                {group: np.asarray(at) for group, at in end["picked"].items()},
                {g: {leaf: np.asarray(x) for leaf, x in own.items()} for g, own in end["leaves"].items()},
            )
            for end in state["ends"]
        ]

    def _allocate(self, step: Step) -> None:
        task = step.obs.task
        found = {group.name: np.flatnonzero(np.isin(task, group.tasks)) for group in self.spec.groups}
        owned = [(name, rows) for name, rows in found.items() if len(rows)]
        self.rows = {name: slice(int(r[0]), int(r[-1]) + 1) for name, r in sorted(owned, key=lambda pair: pair[1][0])}
        self.leaves = {
            group: {leaf: self._stacks(group, leaf) or self._like(x) for leaf, x in step.obs.leaves[group].items()}
            for group in self.rows
        }
        self.action = {group: self._like(step.decision.action[group]) for group in self.rows}
        self.extras = {name: self._like(array) for name, array in step.decision.extras.items()}
        shape = (self.length, len(task))
        self.reward = np.zeros(shape)
        self.task = np.zeros(shape, np.int64)
        self.terminated, self.truncated, self.first, self.valid = (np.zeros(shape, bool) for _ in range(4))

    def _alive(self, leaves: Mapping[str, Mapping[str, Any]], shape: tuple[int, ...]) -> Array:
        """``shape`` [..., n] bool, from leaves [..., n_g, *]."""
        alive = np.ones(shape, bool)
        for group, rows in self.rows.items():
            if "alive" in leaves[group]:
                alive[..., rows] = leaves[group]["alive"]
        return alive

    def _stacks(self, group: str, leaf: str) -> Stacks | None:
        """What holds a leaf that is declared a stack of frames."""
        own, rows = self.spec.group(group), self.rows[group]
        if leaf not in own.frames:
            return None
        return Stacks(self.length, rows.stop - rows.start, own.leaves[leaf], own.frames[leaf])

    def _grow_leaf(self, group: str, leaf: str, saved: Any) -> Array | Stacks:
        stacks = self._stacks(group, leaf)
        if stacks is None:
            return self._grow(saved)
        stacks.load_state_dict(saved)
        return stacks

    def _like(self, array: Array) -> Array:
        return np.zeros((self.length, *array.shape), array.dtype)

    def _grow(self, array: Array) -> Array:
        array = np.asarray(array)
        whole = np.zeros((self.length, *array.shape[1:]), array.dtype)
        whole[: len(array)] = array
        return whole


_FIELDS = ("reward", "terminated", "truncated", "task", "first", "valid")


@dataclass(frozen=True, eq=False)
class Minibatch:
    """``leaves[g][leaf]``, ``action[g]`` and ``same[g]`` [t, m_g, ...], ``columns[name]`` [t, m], ``memory[name]``
    [m, H] before the first step. Rows are sorted by group, then task. ``same``: see ``mtrl.nn.actor_critic.label``."""

    leaves: dict[str, dict[str, Tensor]]
    action: dict[str, Tensor]
    same: dict[str, Tensor]
    columns: dict[str, Tensor]
    memory: dict[str, Tensor]
    only: int | None = None  # the task whose rows alone have weight; None: all of them

    @cached_property
    def scene(self) -> Scene:
        """The observations, as networks want them."""
        return Scene.of(Rows(self.leaves, self.columns["task"], self.columns["first"], self.same), self.memory)

    @property
    def task(self) -> Tensor:
        """[t * m] int64."""
        return self.columns["task"].flatten()

    @property
    def weight(self) -> Tensor:
        """[t * m], sums to 1: an equal share for each task that has valid rows (and is not left out)."""
        return self._weight

    @cached_property
    def _weight(self) -> Tensor:
        valid = self.columns["valid"].flatten()
        counts = valid if self.only is None else valid & (self.task == self.only)
        return task_weights(self.task, counts, int(self.task.max()) + 1)

    def parts(self) -> dict[int, Minibatch]:
        """A minibatch per task that has valid rows, of all chunks that hold one; rows of other tasks have no weight."""
        found, start = {}, 0
        for group, action in self.action.items():
            span = slice(start, start + action.shape[1])
            task, valid = (self.columns[name][:, span] for name in ("task", "valid"))
            for only in task[valid].unique().tolist():
                own = _rows(((task == only) & valid).any(0))
                leaves = {leaf: x[:, own] for leaf, x in self.leaves[group].items()}
                columns = {name: x[:, span][:, own] for name, x in self.columns.items()}
                memory = {name: x[span][own] for name, x in self.memory.items()}
                same = {name: x[:, own] for name, x in self.same.items() if name == group}
                found[only] = Minibatch({group: leaves}, {group: action[:, own]}, same, columns, memory, only)
            start = span.stop
        return found


def _rows(wanted: Tensor) -> slice | Tensor:
    """Where ``wanted`` [m] is true, as a slice if it is one, which copies nothing."""
    place = wanted.nonzero()[:, 0]
    first, last = int(place[0]), int(place[-1])
    return slice(first, last + 1) if last - first == len(place) - 1 else place


class Items:
    """A full rollout cut into items to draw from: single steps, or chunks of consecutive steps of one row.

    Item (k, row) of K chunks x n rows has the number ``k * n + row``; arrays become [K * n, steps, ...].

    Args:
        roll: a full rollout.
        steps: length of an item; divides the rollout's.
        columns: {name: [length, n]}, what to learn from; ``task``, ``first`` and ``valid`` are added.
        action: {group: [length, n_g, ...]}, as the policy's distribution knows them.
        memory: {name: [length, n, H]}, memories before each step; may be empty.
        device: where minibatches live.
        folds: whether networks may compute equal observations once.
    """

    def __init__(
        self,
        roll: Rollout,
        *,
        steps: int,
        columns: Mapping[str, Array],
        action: Mapping[str, Array],
        memory: Mapping[str, Tensor],
        device: torch.device,
        folds: bool = True,
    ) -> None:
        self.steps, self.device = steps, device
        columns = {**columns, "task": roll.task, "first": roll.first, "valid": roll.valid}
        self._columns = {name: self._cut(array) for name, array in columns.items()}
        self._leaves = {g: {leaf: self._cut_leaf(x) for leaf, x in own.items()} for g, own in roll.leaves.items()}
        self._action = {group: self._cut(array) for group, array in action.items()}
        self._same = {group: self._cut(x) for group, x in _labels(roll, device).items() if folds}
        self._memory = {name: x[::steps].flatten(0, 1) for name, x in memory.items()}
        self._rows, self._width = roll.rows, roll.task.shape[1]
        number = torch.arange(len(self._columns["task"]))
        useful, task = self._columns["valid"].any(1).cpu(), self._columns["task"][:, 0].cpu()
        self._shares = [[number[useful & (task == t)] for t in roll.spec.group(group).tasks] for group in roll.rows]

    def minibatches(self, parts: int, generator: torch.Generator) -> Iterator[Minibatch]:
        """One pass: each task's items in random order, cut into ``parts`` equal parts."""
        cuts = [
            [items[torch.randperm(len(items), generator=generator)].tensor_split(parts) for items in own]
            for own in self._shares
        ]
        for k in range(parts):
            picked = [torch.cat([cut[k] for cut in own]) for own in cuts]
            if sum(map(len, picked)):
                yield self._part(picked)

    def _part(self, picked: list[Tensor]) -> Minibatch:
        leaves, action, same = {}, {}, {}
        for items, (group, rows) in zip(picked, self._rows.items(), strict=True):
            chunk, row = items // self._width, items % self._width - rows.start
            own = (chunk * (rows.stop - rows.start) + row).to(self.device)
            leaves[group] = {leaf: x[own].transpose(0, 1) for leaf, x in self._leaves[group].items()}
            action[group] = self._action[group][own].transpose(0, 1)
            if group in self._same:
                same[group] = self._same[group][own].transpose(0, 1)
        every = torch.cat(picked).to(self.device)
        columns = {name: x[every].transpose(0, 1) for name, x in self._columns.items()}
        return Minibatch(leaves, action, same, columns, {name: x[every] for name, x in self._memory.items()})

    def _cut_leaf(self, leaf: Array | Stacks) -> Tensor | DrawnStacks:
        if isinstance(leaf, Stacks):
            return DrawnStacks(leaf.frames.tensor(self.device), self._cut(leaf.index))
        return self._cut(leaf)

    def _cut(self, array: Array | Tensor) -> Tensor:
        length, n = array.shape[:2]
        x = torch.as_tensor(array, device=self.device).view(length // self.steps, self.steps, n, *array.shape[2:])
        return x.transpose(1, 2).reshape(-1, self.steps, *array.shape[2:])


def _labels(roll: Rollout, device: torch.device) -> dict[str, Tensor]:
    """Numbers [length, n_g] that equal observations share, of the groups where it pays: looked for once, since every
    minibatch of every epoch asks."""
    found: dict[str, Tensor] = {}
    for group, rows in roll.rows.items() if device.type == "cpu" else ():
        leaves = roll.leaves[group]
        if sum(int(np.prod(x.shape[2:])) for x in leaves.values()) <= SMALL:
            own = {group: {leaf: x[:] for leaf, x in leaves.items()}}
            found |= label(to_rows(own, roll.task[:, rows], roll.first[:, rows], device))
    return found
