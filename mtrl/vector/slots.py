"""Slots: one environment instance each, with autoreset, truncation, teams and errors that name the place.

A slot reads actions from, and writes everything it learns into, the arrays of a ``Buffers``; where that memory
lives is the backend's business. So the very same code runs in the training process and in workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mtrl import opengl
from mtrl.registry import raised_at
from mtrl.spaces import Codec
from mtrl.types import Array, Group, Journal, Task

PARKED = -1
_ALIGN = 64  # bytes; arrays start on cache lines of their own


class EnvironmentFailedError(RuntimeError):
    """An environment raised, or the worker that held it died; the message names task, slot, seed and step.

    ``slot`` is where, ``journal`` the episode up to and including the action that did it; None if unknown. ``trace``:
    the traceback in a worker process.
    """

    def __init__(self, message: str, slot: int | None = None, trace: str = "") -> None:
        super().__init__(message)
        self.slot, self.trace = slot, trace
        self.journal: Journal | None = None


class RenderError(RuntimeError):
    """An environment that cannot draw itself; the message names the task and the reason."""


class Running(NamedTuple):
    """A running episode: begin (task, seed) in this slot, play ``actions`` [t, ...] and check the return so far."""

    slot: int
    task: int
    seed: int
    actions: Array
    ret: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a slot's rows lie: ``rows`` in the vector, ``local`` inside the arrays of its group. ``batched``: the tasks
    that are stepped together with its own; empty if it is stepped by itself."""

    slot: int
    group: str
    agents: int
    rows: slice
    local: slice
    batched: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """All that a process needs to run slots: tasks and codecs by task id, places by slot, the groups in use."""

    tasks: Mapping[int, Task]
    codecs: Mapping[int, Codec]
    places: tuple[Place, ...]
    groups: tuple[Group, ...]

    def group_rows(self, group: str) -> int:
        return sum(place.agents for place in self.places if place.group == group)


def action_array(group: Group) -> tuple[tuple[int, ...], type[np.generic]]:
    """(shape without the row axis, dtype) of a group's action array."""
    return (group.action.shape, np.float32) if group.action.shape else ((), np.int64)


class Buffers:
    """Named arrays over one block of memory.

    Per group: ``action`` [n_g] or [n_g, a]; ``obs`` the current leaves [n_g, ...]; ``final`` the successors of
    ended episodes, valid in rows whose slot ended at the last step. Per row: ``reward`` float64, ``success``.
    Per slot: ``terminated``, ``truncated``, ``reported`` (a success signal came in this episode), ``next_task`` and
    ``next_seed`` (what follows when the episode ends; ``PARKED`` for nothing), ``task``, ``seed`` and ``length`` (what
    is played now and how many steps were taken, with the one under way), ``cost`` (seconds per step), ``built``
    (seconds that building its last environment took). ``busy`` is each worker's present slot.

    Args:
        program: what the arrays are for.
        allocate: makes a zeroed block of so many bytes; a worker's maps the memory that its parent made.
    """

    def __init__(self, program: Program, allocate: Callable[[int], Any] = bytearray) -> None:
        fields: dict[tuple[str, ...], tuple[tuple[int, ...], Any]] = {}
        for group in program.groups:
            n = program.group_rows(group.name)
            shape, dtype = action_array(group)
            fields["action", group.name] = ((n, *shape), dtype)
            for leaf, box in group.leaves.items():
                fields["obs", group.name, leaf] = ((n, *box.shape), box.dtype)
                fields["final", group.name, leaf] = ((n, *box.shape), box.dtype)
        rows, slots = sum(place.agents for place in program.places), len(program.places)
        fields["reward",], fields["success",] = ((rows,), np.float64), ((rows,), np.bool_)
        for name in ("terminated", "truncated", "reported"):
            fields[name,] = ((slots,), np.bool_)
        for name in ("next_task", "next_seed", "task", "seed", "length", "busy"):
            fields[name,] = ((slots,), np.int64)
        fields["cost",], fields["built",] = ((slots,), np.float64), ((slots,), np.float64)

        offsets, size = [], 0
        for shape, dtype in fields.values():
            offsets.append(size)
            size += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
        block = np.frombuffer(allocate(size), np.uint8)
        arrays = {
            key: block[offset : offset + math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
            for (key, (shape, dtype)), offset in zip(fields.items(), offsets, strict=True)
        }
        self.action: dict[str, Array] = {g.name: arrays["action", g.name] for g in program.groups}
        self.obs, self.final = (
            {g.name: {leaf: arrays[kind, g.name, leaf] for leaf in g.leaves} for g in program.groups}
            for kind in ("obs", "final")
        )
        self.reward, self.success = arrays["reward",], arrays["success",]
        self.terminated, self.truncated, self.reported = (
            arrays["terminated",],
            arrays["truncated",],
            arrays["reported",],
        )
        self.next_task, self.next_seed, self.cost = arrays["next_task",], arrays["next_seed",], arrays["cost",]
        self.task, self.seed, self.length = arrays["task",], arrays["seed",], arrays["length",]
        self.busy, self.built = arrays["busy",], arrays["built",]

    def where(self, program: Program, slot: int) -> str:
        """The place that an error message names."""
        task = int(self.task[slot])
        name = "none" if task == PARKED else program.tasks[task].name
        return f"task {name!r} (slot {slot}, seed {self.seed[slot]}, step {self.length[slot]})"


class _Solo:
    """A ``gymnasium.Env`` behind the interface that ``Slot`` uses: reset, step, write."""

    def __init__(self, env: Any, codec: Codec) -> None:
        self.env, self._codec = env, codec
        self._discrete = not codec.action.shape

    def reset(self, seed: int) -> None:
        found = self.env.reset(seed=seed)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise _WrongAnswerError("returned no (observation, info)")
        self._obs, self._info = found

    def step(self, actions: Array) -> tuple[Any, bool, bool, float | None]:
        """Step with ``actions`` [1] or [1, a]; returns reward, terminated, truncated, success (None: not reported)."""
        # A fresh array for every step: environments may keep what they are given.
        action = int(actions[0]) if self._discrete else bounded(actions[0], self._codec.action)
        found = self.env.step(action)
        if len(found) != 5:
            raise _WrongAnswerError(f"returned {len(found)} values, not the five of gymnasium.Env.step")
        self._obs, reward, terminated, truncated, self._info = found
        return _number(reward), bool(terminated), bool(truncated), _success(self._info)

    def write(self, leaves: Mapping[str, Array], local: slice) -> None:
        self._codec.write(self._obs, self._info, leaves, local.start)


class _Team:
    """A PettingZoo ``ParallelEnv`` behind the same interface; row i is ``possible_agents[i]``.

    The episode ends for all rows together, when no agent is left; it counts as terminated if the last ones died, as
    truncated if some were merely stopped. The row of an agent that left has ``alive`` false and is otherwise blank (see
    ``blank``); its reward is 0 and its action is not sent. An agent that is dead but stays says so by a false
    ``info["alive"]``, and has all else.
    """

    def __init__(self, env: Any, codec: Codec) -> None:
        self.env, self._codec = env, codec
        self._agents = list(env.possible_agents)
        self._discrete = not codec.action.shape
        self._has_state = getattr(env, "state_space", None) is not None

    def reset(self, seed: int) -> None:
        self._obs, self._infos = self.env.reset(seed=seed)
        self._alive = set(self.env.agents)

    def step(self, actions: Array) -> tuple[Any, bool, bool, float | None]:
        """Step with ``actions`` [agents] or [agents, a]; the reward is an array [agents]."""
        acting = set(self.env.agents)
        sent = {
            agent: int(action) if self._discrete else bounded(action, self._codec.action)
            for agent, action in zip(self._agents, actions, strict=True)
            if agent in acting
        }
        self._obs, rewards, terminations, truncations, self._infos = self.env.step(sent)
        reward = np.array([rewards.get(agent, 0.0) if agent in acting else 0.0 for agent in self._agents])
        died = {agent for agent in acting if terminations.get(agent, False)}
        stopped = {agent for agent in acting if truncations.get(agent, False)} - died
        ended = not self.env.agents or died | stopped == acting
        if stopped and not ended:
            raise _WrongAnswerError(f"truncates {sorted(stopped)} while others go on")
        # PettingZoo empties ``agents`` at a truncation too, yet those who did not die then have a true successor.
        self._alive = acting - died if ended else set(self.env.agents)
        reported = [value for value in map(_success, self._infos.values()) if value is not None]
        return reward, ended and not self._alive, ended and bool(self._alive), max(reported) if reported else None

    def write(self, leaves: Mapping[str, Array], local: slice) -> None:
        blank(leaves, local)
        for row, agent in enumerate(self._agents, local.start):
            if agent in self._alive:
                info = self._infos.get(agent, {})
                leaves["alive"][row] = info.get("alive", True)
                self._codec.write(self._obs[agent], info, leaves, row)
        if self._has_state:
            leaves["state"][local] = np.ravel(self.env.state())


def bounded(action: Array, space: Any) -> Array:
    """A fresh float32 action in the space's dtype. Bounds of more digits may have been overstepped by rounding."""
    found = action.astype(space.dtype)
    return found if found.dtype == np.float32 else np.clip(found, space.low, space.high, out=found)


class _WrongAnswerError(Exception):
    """An environment returned what it must not; the message says what."""


def told(error: Exception) -> str:
    """What an environment raised, and where; or what it returned."""
    if isinstance(error, _WrongAnswerError):
        return f"{error} (mtrl check tells how to mend it)"
    place = raised_at(error)
    return f"raised {error!r}" + (f" at {place}" if place else "")


def _success(info: Mapping[str, Any]) -> float | None:
    try:
        value = info.get("success")
        if value is None:
            value = info.get("is_success")
    except AttributeError:
        raise _WrongAnswerError(f"returned the info {info!r}, not a dict") from None
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise _WrongAnswerError(f"reports success={value!r}, not a boolean") from None


def _number(reward: Any) -> float:
    try:
        if not isinstance(reward, str | bytes):
            return float(reward)
    except (TypeError, ValueError):
        pass
    raise _WrongAnswerError(f"returned the reward {reward!r}, not a number")


def unfit(name: str, numbers: Array) -> str:
    """What a message says of ``numbers`` in the leaf ``name``, some of which are not finite."""
    bad = numbers[~np.isfinite(numbers)]
    return f"observed {bad[0]} ({len(bad)} such number{'s' * (len(bad) > 1)}, leaf {name!r})"


def blank(leaves: Mapping[str, Array], local: slice) -> None:
    """Clear the rows of dead agents and parked slots: zeros, and action 0 as the only legal one, so that a
    masked distribution over such a row stays defined."""
    for name, leaf in leaves.items():
        leaf[local] = 0
        if name == "legal":
            leaf[local, 0] = True


class Slot:
    """One environment instance with SAME_STEP autoreset.

    Environments are built when first needed and kept per task, since a schedule may send several tasks here.
    """

    def __init__(self, place: Place, program: Program, buffers: Buffers, **render: Any) -> None:
        self.place, self._program, self._buffers, self._render = place, program, buffers, render
        self._obs, self._final = buffers.obs[place.group], buffers.final[place.group]
        self._actions = buffers.action[place.group][place.local]
        self._made: dict[int, _Solo | _Team] = {}
        self._game: _Solo | _Team | None = None
        self._task = PARKED

    def start(self, task: int, seed: int) -> None:
        """Begin the episode (task, seed) and write its first observation; ``PARKED`` clears the rows instead."""
        slot, buffers = self.place.slot, self._buffers
        self._task, self._length, self._reported = task, 0, False
        buffers.task[slot], buffers.seed[slot], buffers.length[slot] = task, seed, 0
        if task == PARKED:
            self._game = None
            blank(self._obs, self.place.local)
            return
        try:
            if task not in self._made:
                before = time.perf_counter()
                self._made[task] = self._build(task)
                buffers.built[slot] = time.perf_counter() - before
            self._game = self._made[task]
            self._game.reset(seed)
        except Exception as error:
            raise self._failed(f"reset {told(error)}") from error
        self._write(self._obs)

    def step(self) -> None:
        """Play the action in the buffers; truncate at the horizon; begin the next episode if this one ended."""
        buffers, place, slot = self._buffers, self.place, self.place.slot
        if self._game is None:
            buffers.reward[place.rows], buffers.success[place.rows] = 0.0, False
            buffers.terminated[slot] = buffers.truncated[slot] = False
            return
        terminated, truncated = self._advance(self._actions)
        buffers.terminated[slot], buffers.truncated[slot] = terminated, truncated
        if terminated or truncated:
            self._write(self._final)
            self.start(int(buffers.next_task[slot]), int(buffers.next_seed[slot]))
        else:
            self._write(self._obs)

    def restore(self, episode: Running) -> None:
        """Begin an episode, play its actions and write the observation reached.

        Raises:
            EnvironmentFailedError: the replay went elsewhere, so the task is not determined by ``reset(seed)``.
        """
        self.start(episode.task, episode.seed)
        if episode.task == PARKED:
            return
        ret = 0.0
        for played in episode.actions:
            terminated, truncated = self._advance(played.reshape(self._actions.shape))
            if terminated or truncated:
                raise self._failed("ended while its journal was replayed; reset(seed) must decide all")
            ret += self._team_reward()
        if ret != episode.ret:
            raise self._failed(
                f"replaying its journal gave the return {ret!r} instead of {episode.ret!r}; reset(seed) must determine "
                "the episode"
            )
        self._write(self._obs)

    def play(self, seed: int, actions: Array) -> Iterator[tuple[float, bool | None]]:
        """Play one whole episode of the only task: its return and success so far, at the start and after each action;
        success is None until the task reports such a thing."""
        (task,) = self._program.tasks
        self.start(task, seed)
        ret, success = 0.0, False
        yield ret, None
        for played in actions:
            self._advance(played.reshape(self._actions.shape))
            ret += self._team_reward()
            success |= bool(self._buffers.success[self.place.rows].any())
            yield ret, success if self._buffers.reported[0] else None

    def render(self) -> Array:
        """A picture of the running environment, [h, w, 3] uint8.

        Raises:
            RenderError: the environment cannot draw itself.
        """
        assert self._game is not None
        try:
            opengl.claim(self._game.env)
            picture = self._game.env.render()
        except Exception as error:
            raise RenderError(f"task {self._name()!r} cannot render: {error!r}") from error
        found = (picture.dtype.name, picture.shape[2:]) if isinstance(picture, np.ndarray) else repr(picture)[:80]
        if found != ("uint8", (3,)):
            raise RenderError(f"task {self._name()!r} cannot render: render() gave {found}, not [h, w, 3] uint8")
        return picture

    def close(self) -> None:
        """Close every environment built here."""
        for game in self._made.values():
            opengl.release(game.env)
            game.env.close()
        self._made.clear()
        self._game = None

    def _team_reward(self) -> float:
        # The same sum as over a whole vector's rows, so that returns agree bit for bit.
        rewards = self._buffers.reward[self.place.rows]
        return float(np.add.reduceat(rewards, (0,))[0] / self.place.agents)

    def _name(self) -> str:
        return self._program.tasks[self._task].name

    def _build(self, task: int) -> _Solo | _Team:
        env = self._program.tasks[task].build(**self._render)
        kind = _Team if hasattr(env, "possible_agents") else _Solo
        return kind(env, self._program.codecs[task])

    def _advance(self, actions: Array) -> tuple[bool, bool]:
        buffers, rows = self._buffers, self.place.rows
        assert self._game is not None
        self._length += 1
        buffers.length[self.place.slot] = self._length
        try:
            reward, terminated, truncated, success = self._game.step(actions)
        except Exception as error:
            raise self._failed(told(error)) from error
        buffers.reward[rows] = reward
        if not (math.isfinite(reward) if isinstance(reward, float) else np.isfinite(reward).all()):
            raise self._failed(f"returned the reward {reward}")
        self._reported |= success is not None
        buffers.reported[self.place.slot] = self._reported
        buffers.success[rows] = bool(success)
        truncated = not terminated and (truncated or self._length >= self._program.tasks[self._task].horizon)
        return terminated, truncated

    def _write(self, leaves: Mapping[str, Array]) -> None:
        assert self._game is not None
        try:
            self._game.write(leaves, self.place.local)
        except Exception as error:
            raise self._failed(f"observation does not fit its space: {error.__cause__ or error!r}") from error
        self._look(leaves)

    def _look(self, leaves: Mapping[str, Array]) -> None:
        """Raise if what was written is not finite: networks would only tell much later, and not why."""
        for name in self._program.codecs[self._task].floats:
            numbers = leaves[name][self.place.local]
            if not np.isfinite(numbers).all():
                raise self._failed(unfit(name, numbers))

    def _failed(self, what: str) -> EnvironmentFailedError:
        slot = self.place.slot
        return EnvironmentFailedError(f"{self._buffers.where(self._program, slot)}: {what}", slot)
