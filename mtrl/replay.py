"""Replay memory for off-policy agents: one ring buffer per task, drawn from in equal shares.

Equal shares per task (not per transition) keep a task with long episodes, many copies or a big team from crowding
the others out of the batch. Rewards are stored raw: an agent that rescales them does so when a batch is drawn, so
that old transitions follow the current scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import psutil
from gymnasium.spaces import Discrete

from mtrl.frames import Frames, frame_bytes
from mtrl.types import Array, Group, Spec, Step


class Batch(NamedTuple):
    """n transitions of one group, equal numbers of each of its tasks, sorted by task.

    ``task`` [n] int64; ``obs`` and ``next`` {leaf: [n, ...]} in the leaves' dtypes; ``action`` [n, a] float32 (Box) or
    [n] int64 (Discrete); ``reward`` [n] float32, raw; ``terminated`` [n] bool. A truncated transition is not
    terminated: its target bootstraps from ``next``, which is the true successor.
    """

    task: Array
    obs: dict[str, Array]
    action: Array
    reward: Array
    terminated: Array
    next: dict[str, Array]


class Replay:
    """Ring buffers of all tasks of a spec.

    Memory is reserved, not filled, by ``reserve`` or the first ``add``: pages come into being when transitions are
    written, so a large capacity costs nothing until it is used, and nothing at all where an agent only acts. Where a
    leaf is a stack of frames (``Group.frames``), each frame is stored once, as long as a transition needs it.

    Args:
        spec: tasks and groups.
        capacity: transitions kept per task.
        seed: of the buffer's own generator, which draws the batches.

    Attributes:
        nbytes: memory that the buffer takes once every task has filled its share. (Of stacks: one frame per transition
            and an eighth, since an episode's start adds one. If episodes are shorter than 8 steps it takes more.)
    """

    def __init__(self, spec: Spec, capacity: int, *, seed: int) -> None:
        if capacity < 1:
            raise ValueError(f"replay capacity must be at least 1 transition per task, got {capacity}")
        self.spec = spec
        self.capacity = capacity
        self._rng = np.random.default_rng(seed)
        self._rings: dict[str, _Ring] = {}
        self.nbytes = 0
        for group in spec.groups:
            fields = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in _fields(group).values())
            frames = sum(frame_bytes(group.leaves[leaf], k) for leaf, k in group.frames.items())
            self.nbytes += capacity * len(group.tasks) * fields + _frames_kept(group, capacity) * frames

    def reserve(self) -> None:
        """Take the memory, unless that was done before.

        Raises:
            MemoryError: a full buffer would not fit into this machine's memory.
        """
        if self._rings:
            return
        memory = psutil.virtual_memory().total
        if self.nbytes > memory:
            raise MemoryError(
                f"a full replay of {self.capacity:,} transitions for each of {len(self.spec.tasks)} tasks takes "
                f"{self.nbytes / 2**30:.1f} GiB and this machine has {memory / 2**30:.1f} GiB: "
                f"lower the capacity to {int(self.capacity * 0.8 * memory / self.nbytes):,} or less"
            )
        self._rings = {group.name: _Ring(group, self.capacity) for group in self.spec.groups}

    @property
    def sizes(self) -> Array:
        """[T] int64: transitions held of each task."""
        sizes = np.zeros(len(self.spec.tasks), np.int64)
        for ring in self._rings.values():
            sizes[ring.tasks] = ring.sizes
        return sizes

    def add(self, step: Step) -> None:
        """Store the transitions of all rows that are active and, in a team, alive. MemoryError as from ``reserve``."""
        self.reserve()
        step, start = as_kept(step, self.spec), 0
        for group in self.spec.groups:
            if group.name in step.obs.leaves:
                count = len(step.decision.action[group.name])
                self._rings[group.name].add(step, slice(start, start + count))
                start += count

    def sample(self, per_task: int) -> dict[str, Batch]:
        """Draw ``per_task`` transitions with replacement from every task that holds any; {group name: batch}.

        The arrays are reused: they are valid until the next call.
        """
        return {name: ring.sample(per_task, self._rng) for name, ring in self._rings.items() if ring.sizes.any()}

    def state_dict(self) -> dict[str, Any]:
        """The filled part of every ring. Like torch's, it holds references: write it away before the next ``add``."""
        self.reserve()
        return {
            "rng": rng_state(self._rng),
            "rings": {name: ring.state_dict() for name, ring in self._rings.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the saved buffer would have; ValueError if its capacity was another."""
        self.reserve()
        set_rng_state(self._rng, state["rng"])
        for name, ring in self._rings.items():
            ring.load_state_dict(state["rings"][name])


def as_kept(step: Step, spec: Spec) -> Step:
    """The step as ``Replay`` keeps it: the dead are inactive, and death ends a row, unless rewards are shared."""
    if not any("alive" in group.leaves for group in spec.groups):
        return step
    shared = np.array([task.shared_reward for task in spec.tasks])
    active, died, start = step.active.copy(), np.zeros_like(step.active), 0
    for group in spec.groups:
        if group.name in step.obs.leaves:
            rows = slice(start, start + len(step.decision.action[group.name]))
            start = rows.stop
            if "alive" in group.leaves:
                alive = step.obs.leaves[group.name]["alive"]
                active[rows] &= alive
                died[rows] = alive & ~step.next.leaves[group.name]["alive"] & ~shared[step.obs.task[rows]]
    return step._replace(active=active, terminated=step.terminated | died, truncated=step.truncated & ~died)


class _Ring:
    """One group's transitions, one array per field; row ``k * capacity + i`` is the i-th place of its k-th task."""

    def __init__(self, group: Group, capacity: int) -> None:
        self.name = group.name
        self.leaves = tuple(group.leaves)
        self.tasks = np.asarray(group.tasks, np.int64)
        self.capacity = capacity
        # Task ids of a group are ascending but need not be adjacent.
        self._local = np.full(int(self.tasks.max()) + 1, -1, np.int64)
        self._local[self.tasks] = np.arange(len(self.tasks))
        self._data = {
            name: np.empty((len(self.tasks) * capacity, *shape), dtype)
            for name, (shape, dtype) in _fields(group).items()
        }
        # Leaves that are stacks of frames: the data hold indices [k] into these pools. The last stack of every row,
        # [rows, k], is what the next one may continue.
        kept = _frames_kept(group, capacity)
        self._frames = {leaf: Frames(group.leaves[leaf], k, kept) for leaf, k in group.frames.items()}
        self._last: dict[str, Array] = {}
        self._head = np.zeros(len(self.tasks), np.int64)
        self.sizes = np.zeros(len(self.tasks), np.int64)
        self._drawn: dict[str, Array] = {}

    def add(self, step: Step, rows: slice) -> None:
        leaves = step.obs.leaves[self.name]
        keep = np.flatnonzero(step.active[rows])
        local = self._local[step.obs.task[rows][keep]]
        # Rows of one task take consecutive places, in row order: place = head + rank among the task's rows.
        order = np.argsort(local, kind="stable")
        keep, local = keep[order], local[order]
        counts = np.bincount(local, minlength=len(self.tasks))
        rank = np.arange(len(local)) - (np.cumsum(counts) - counts)[local]
        fits = rank >= counts[local] - self.capacity
        keep, local, rank = keep[fits], local[fits], rank[fits]
        column = (self._head[local] + rank) % self.capacity
        place = local * self.capacity + column
        for leaf in self.leaves:
            before, after = leaves[leaf], step.next.leaves[self.name][leaf]
            if leaf in self._frames:
                replaced = place[column < self.sizes[local]]
                self._store(leaf, before, after, keep, place, replaced)
            else:
                self._data[f"obs.{leaf}"][place] = before[keep]
                self._data[f"next.{leaf}"][place] = after[keep]
        self._data["action"][place] = step.decision.action[self.name][keep]
        self._data["reward"][place] = step.reward[rows][keep]
        self._data["terminated"][place] = step.terminated[rows][keep]
        self._head = (self._head + counts) % self.capacity
        self.sizes = np.minimum(self.sizes + counts, self.capacity)

    def _store(self, leaf: str, before: Array, after: Array, rows: Array, place: Array, replaced: Array) -> None:
        """Put the stacks of ``rows`` in their places; the frames of the transitions ``replaced`` are given up."""
        frames, obs, succ = self._frames[leaf], self._data[f"obs.{leaf}"], self._data[f"next.{leaf}"]
        if leaf not in self._last or len(self._last[leaf]) != len(before):
            self._last[leaf] = np.zeros((len(before), frames.k), np.int32)
        stacks = frames.put(before[rows], self._last[leaf][rows], 0)
        successors = frames.put(after[rows], stacks, 1)
        frames.drop(np.concatenate((obs[replaced], succ[replaced])))
        obs[place], succ[place], self._last[leaf][rows] = stacks, successors, successors

    def sample(self, per_task: int, rng: np.random.Generator) -> Batch:
        filled = np.flatnonzero(self.sizes)
        index = rng.integers(0, self.sizes[filled, None], (len(filled), per_task))
        index = (index + filled[:, None] * self.capacity).reshape(-1)
        drawn = {}
        for name, data in self._data.items():
            frames = self._frames.get(name.partition(".")[2])
            if name not in self._drawn or len(self._drawn[name]) != len(index):
                shape, dtype = (data.shape[1:], data.dtype) if frames is None else (frames.shape, frames.dtype)
                self._drawn[name] = np.empty((len(index), *shape), dtype)
            if frames is not None:
                drawn[name] = frames.get(data[index], out=self._drawn[name])
                continue
            # mode="clip" because numpy buffers the output in the default mode; the indices are in range.
            drawn[name] = np.take(data, index, axis=0, out=self._drawn[name], mode="clip")
        return Batch(
            np.repeat(self.tasks[filled], per_task),
            {leaf: drawn[f"obs.{leaf}"] for leaf in self.leaves},
            drawn["action"],
            drawn["reward"],
            drawn["terminated"],
            {leaf: drawn[f"next.{leaf}"] for leaf in self.leaves},
        )

    def state_dict(self) -> dict[str, Any]:
        data = [
            {name: array[k * self.capacity : k * self.capacity + size] for name, array in self._data.items()}
            for k, size in enumerate(self.sizes.tolist())
        ]
        return {
            "capacity": self.capacity,
            "head": self._head.tolist(),
            "data": data,
            "frames": {leaf: frames.state_dict() for leaf, frames in self._frames.items()},
            "last": {leaf: last.copy() for leaf, last in self._last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["capacity"] != self.capacity:
            raise ValueError(f"group {self.name!r}: saved with capacity {state['capacity']:,}, not {self.capacity:,}")
        sizes = [len(fields["reward"]) for fields in state["data"]]
        for k, (size, fields) in enumerate(zip(sizes, state["data"], strict=True)):
            for name, array in self._data.items():
                array[k * self.capacity : k * self.capacity + size] = fields[name]
        self._head[:] = state["head"]
        self.sizes[:] = sizes
        for leaf, frames in self._frames.items():
            held = [fields[f"{part}.{leaf}"] for fields in state["data"] for part in ("obs", "next")]
            frames.load_state_dict(state["frames"][leaf], *held)
        self._last = {leaf: np.array(last) for leaf, last in state["last"].items()}


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """The generator's state; PCG64's 128-bit integers become text, which survives any checkpoint format."""
    state = rng.bit_generator.state
    return {**state, "state": {key: str(value) for key, value in state["state"].items()}}


def set_rng_state(rng: np.random.Generator, state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` returned."""
    inner = {key: int(value) for key, value in state["state"].items()}
    rng.bit_generator.state = {**state, "state": inner}


def _fields(group: Group) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of everything that one transition of the group stores; of a stack, its frames' indices."""
    fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for part in ("obs", "next"):
        for leaf, box in group.leaves.items():
            indices = ((group.frames.get(leaf, 0),), np.dtype(np.int32))
            fields[f"{part}.{leaf}"] = indices if leaf in group.frames else (tuple(box.shape), np.dtype(box.dtype))
    action = group.action
    fields["action"] = (
        ((), np.dtype(np.int64)) if isinstance(action, Discrete) else (action.shape, np.dtype(np.float32))
    )
    fields["reward"] = ((), np.dtype(np.float32))
    fields["terminated"] = ((), np.dtype(np.bool_))
    return fields


def _frames_kept(group: Group, capacity: int) -> int:
    """Frames to reserve for the transitions of a group: one each, and an eighth for episodes' starts."""
    n = capacity * len(group.tasks)
    return n + n // 8 + 1
