"""The contract: what flows between suites, the vector of environments, agents and the training loop.

Shapes use N rows (decision-makers) in a vector, n_g rows of group g, T tasks. A single-agent task fills one
row, a team of n agents fills n rows. Rows that share spaces form a *group*; nothing is padded.

Everything here is data, how to read it, or a protocol. It imports no environment package and no agent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

Array = np.ndarray
Leaves = Mapping[str, Array]
"""One group's observation: ``vector`` [n_g, d] float32, ``image`` [n_g, c, h, w] uint8, ``tokens`` [n_g, l] int32,
``state`` [n_g, s] float32 (a team's global state), ``legal`` [n_g, A] bool (legal actions), ``alive`` [n_g] bool
(false for a team's dead; see ``Task.shared_reward``)."""

LEAF_NAMES = ("vector", "image", "tokens", "state", "legal", "alive")


class Build(Protocol):
    """Makes one fresh environment of a task.

    Training calls ``build()``. Videos call ``build(render_mode="rgb_array")``; a suite that cannot render may
    leave the argument out. The result is a ``gymnasium.Env`` or a PettingZoo ``ParallelEnv`` whose
    ``reset(seed=s)`` determines everything random about the episode. Must be picklable: a class, a module-level
    function or a ``functools.partial`` of one.
    """

    def __call__(self, *args: Any, **render: Any) -> Any: ...


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        name: unique, ``"suite/task"``, for instance ``"metaworld/reach-v3"``.
        build: makes the environment; called lazily, in the process that steps it.
        horizon: steps after which the vector truncates the episode (the environment may end it earlier).
        score: raw returns that count as normalised score 0 (a random policy) and 1 (the reference).
        score_source: where the two numbers come from.
        agents: rows that this task fills; more than one means that ``build`` makes a ``ParallelEnv``.
        shared_reward: a team's rows are paid alike to the end, the dead as well: death (``alive`` false) takes a row's
            actions but not its return. Otherwise death terminates the row.
        spaces: (observation space, action space) of one row, if the suite knows them without building an
            environment. Saves one build per task at start; ``check_suite`` compares it with the real ones.
        protocol: what a result must name to be comparable (package version, reward version, goal mode, ...).
        batch: makes a ``Batch`` that steps so many slots of the given tasks at once, with the same numbers as the
            environments of ``build``; None if there is none. Tasks whose ``batch`` is equal share one.
        frames: {leaf: k}: along its first axis the leaf holds the last k frames, oldest first. At an episode's start
            the first one is repeated. Memories then store each frame once. ``check_suite`` looks whether it is so.
    """

    name: str
    build: Build
    horizon: int
    score: tuple[float, float] = (0.0, 1.0)
    score_source: str = ""
    agents: int = 1
    shared_reward: bool = False
    spaces: tuple[gym.Space[Any], gym.Space[Any]] | None = None
    protocol: Mapping[str, str] = field(default_factory=dict)
    batch: Callable[[Sequence[Task], int], Batch] | None = None
    frames: Mapping[str, int] = field(default_factory=dict)

    def normalise(self, ret: float) -> float:
        """Map a raw episode return to the normalised score: 0 = random, 1 = reference."""
        low, high = self.score
        return (ret - low) / (high - low)


class Outcome(NamedTuple):
    """What a step of a ``Batch`` of S slots did: ``reward`` [S] (or [S, agents]), and [S] bool each of ``terminated``,
    ``truncated`` and ``success``. Entries of slots that were not stepped are not read."""

    reward: Array
    terminated: Array
    truncated: Array
    success: Array


class Batch(Protocol):
    """S episodes stepped together: the optional fast face of a suite (``Task.batch``).

    An episode must depend on (task, seed, actions) alone, not on its neighbours. ``mask`` [S] bool says which slots a
    call is about; the others stay as they are. Nothing restarts by itself.
    """

    def reset(self, mask: Array, seeds: Array, task: Array, /) -> None:
        """Begin episodes: ``seeds`` [S] int64, ``task`` [S] int64 counts the tasks that the batch was made of."""
        ...

    def step(self, actions: Array, mask: Array, /) -> Outcome:
        """Play ``actions`` [S, agents] int64 or [S, agents, a] float32."""
        ...

    def leaves(self) -> Mapping[str, Array]:
        """Present observations, [S, agents, ...] for every leaf; may be overwritten later.

        Teams may leave ``alive`` out if nobody dies before the end; otherwise rows of the dead hold zeros, and one
        legal action (0, if they have left).
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Suite(Protocol):
    """A family of tasks. ``groups`` names what can be asked for, for listings and near-miss messages."""

    name: str

    @property
    def groups(self) -> Sequence[str]: ...

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of a named group ("mt10") or of a single task ("reach-v3"), in canonical order.

        Raises:
            mtrl.registry.UnknownNameError: ``group`` is neither.
        """
        ...


@dataclass(frozen=True)
class Group:
    """What rows of one kind share. ``tasks`` are the indices into ``Spec.tasks`` that live in this group; ``frames`` is
    theirs, see ``Task``."""

    name: str
    leaves: Mapping[str, Box]
    action: Discrete | Box
    tasks: tuple[int, ...]
    frames: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskInfo:
    """What an agent and the reports may know about a task."""

    name: str
    group: str
    horizon: int
    score: tuple[float, float] = (0.0, 1.0)
    agents: int = 1
    shared_reward: bool = False


@dataclass(frozen=True)
class Spec:
    """All that flows from suites to an agent before the first observation."""

    tasks: tuple[TaskInfo, ...]
    groups: tuple[Group, ...]

    def group(self, name: str) -> Group:
        """The group called ``name``; KeyError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)


@dataclass(frozen=True)
class Layout:
    """One vector's rows: group g owns the rows ``rows[g]``. Training and evaluation vectors share a ``Spec``,
    not a ``Layout``. Inside a group, rows are ordered by slot, and a team's rows are adjacent."""

    rows: Mapping[str, slice]
    num_rows: int


class Obs(NamedTuple):
    """Observations of all rows: ``leaves[g]`` holds group g's rows, ``task`` [N] int64, ``first`` [N] bool is
    true where an episode starts with this very observation."""

    leaves: Mapping[str, Leaves]
    task: Array
    first: Array


class Decision(NamedTuple):
    """``action[g]`` is [n_g] int64 (Discrete) or [n_g, a] float32 (Box, within its bounds). ``extras`` [N, ...]
    is what the learner wants back with the transition (log_prob, value, ...)."""

    action: Mapping[str, Array]
    extras: Mapping[str, Array]


class Step(NamedTuple):
    """One transition of every row.

    ``reward`` [N] float64 is raw. ``terminated`` and ``truncated`` [N] bool are never merged and never both
    true. ``success`` [N] bool is the task's success signal at this very step. ``next`` is the true successor of
    ``obs``, before any reset; where an episode ended it differs from the observation that follows.
    ``active`` [N] bool is false for rows whose slot has no more episodes (evaluation): ignore such rows.
    """

    obs: Obs
    decision: Decision
    reward: Array
    terminated: Array
    truncated: Array
    success: Array
    next: Obs
    active: Array


@dataclass(frozen=True)
class Journal:
    """An episode is (task, seed, actions): enough to replay it bit for bit.

    ``actions`` is [t] int64 or [t, a] float32; for a team [t, agents] or [t, agents, a].
    """

    task: str
    seed: int
    actions: Array


@dataclass(frozen=True)
class Episode:
    """One finished episode of one slot. ``ret`` is the undiscounted raw return (a team's: mean over its rows);
    ``success`` is true if the success signal was seen at *any* step (MetaWorld's convention),
    ``success_last`` if it was seen at the last one; both are None without such a signal (see ``success_rate``)."""

    task: int
    slot: int
    index: int
    seed: int
    ret: float
    length: int
    success: bool | None
    success_last: bool | None
    terminated: bool
    journal: Journal


def success_rate(flags: Sequence[bool | None]) -> float | None:
    """The share of a task's episodes that were solved, from their ``success`` (or ``success_last``).

    None if none of them has the signal. Where some have it, those without count as not solved: some environments
    give the signal with success only.
    """
    return None if all(flag is None for flag in flags) else sum(map(bool, flags)) / len(flags)


class Assignment(NamedTuple):
    """What a slot plays next: the index of a task and the seed that decides the episode."""

    task: int
    seed: int


class Schedule(Protocol):
    """Decides which (task, seed) each slot plays as its ``index``-th episode, drawn one episode ahead in slot
    order by the main process; ``None`` parks the slot (its rows become inactive)."""

    def assign(self, slot: int, index: int) -> Assignment | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Actor(Protocol):
    """Turns observations into decisions. Owns its recurrent or search memory; ``obs.first`` clears a row's."""

    def __call__(self, obs: Obs) -> Decision: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Agent(Protocol):
    """Learns from steps. Built as ``cls(spec, config, seed=..., device=...)`` with ``cls.Config`` its pydantic
    schema. Owns its memory (rollout, replay) and its clock: ``update`` returns ``{}`` when it is not time.

    State dictionaries are nested dicts/lists of tensors, arrays, numbers, strings, booleans and None: no other
    objects, so that a checkpoint never needs pickle. ``state_dict()["policy"]`` is all that acting needs (no
    optimiser, no memory); ``load_policy`` takes that part alone. All randomness comes from generators that the
    agent owns and saves, never from the global ones; every actor has a generator of its own, seeded from the
    agent's seed, so that evaluating does not disturb training.

    ``recurrent`` says whether actors carry memory from step to step.

    An agent may have ``errors``, [t, N] float64: after an update that learned, the size of the value error of each step
    since the last such update, NaN for rows that did not count. The sampler ``plr`` asks for it. It may have
    ``reserve()``, called once before training begins, which takes the memory that it learns with; MemoryError if the
    machine lacks it.
    """

    recurrent: bool

    def actor(self, layout: Layout, *, explore: bool) -> Actor: ...
    def observe(self, step: Step) -> None: ...
    def update(self) -> Mapping[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def load_policy(self, state: Mapping[str, Any]) -> None: ...
