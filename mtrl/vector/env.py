"""``MultiTaskVectorEnv``: any mix of tasks as one vectorized Gymnasium environment.

Two faces over the same slots. The native one, for agents: ``reset``, then ``obs``, ``step_async``, ``step_wait`` and
``episodes``. The Gymnasium one, for everybody else: ``reset`` and ``step`` with ``info``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import Space, spaces
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mtrl.spaces import Codec, codec, make_spec
from mtrl.types import Array, Assignment, Decision, Episode, Group, Journal, Layout, Obs, Schedule, Spec, Step, Task
from mtrl.vector.runner import Runner
from mtrl.vector.schedule import Pinned
from mtrl.vector.slots import (
    PARKED,
    Buffers,
    EnvironmentFailedError,
    Place,
    Program,
    RenderError,
    Running,
    Slot,
    action_array,
)
from mtrl.vector.workers import Workers


class Backend(Protocol):
    """Where slots are stepped."""

    buffers: Buffers
    faults: list[str]
    resumes: bool  # whether ``wait`` goes on where a signal handler interrupted it

    def restore(self, episodes: Sequence[Running]) -> None:
        """Bring all slots to where their episodes lead."""
        ...

    def send(self) -> None:
        """Begin to step every slot with ``buffers.action``."""
        ...

    def wait(self, running: Callable[[int], Running]) -> None:
        """Return when every slot has been stepped; ``running(slot)`` is what it played until this step began."""
        ...

    def rebalance(self, movable: Sequence[int], running: Callable[[int], Running]) -> None:
        """Offer slots that have just begun an episode and may so change processes."""
        ...

    def close(self) -> None: ...


class InProcess:
    """Steps slots in this process, at ``wait``."""

    resumes = False

    def __init__(self, program: Program) -> None:
        self.buffers = Buffers(program)
        self.faults: list[str] = []
        self._runner = Runner(program, self.buffers)

    def restore(self, episodes: Sequence[Running]) -> None:
        self._runner.restore(episodes)

    def send(self) -> None:
        """Nothing to do before ``wait``."""

    def wait(self, running: Callable[[int], Running]) -> None:
        self._runner.step()

    def rebalance(self, movable: Sequence[int], running: Callable[[int], Running]) -> None:
        """One process: nowhere to move."""

    def close(self) -> None:
        self._runner.close()


class History:
    """One group's action arrays, one per vector step, kept as long as a running episode needs them."""

    def __init__(self) -> None:
        self._arrays: list[Array] = []
        self._first = 0  # the step that _arrays[0] belongs to

    def __len__(self) -> int:
        return len(self._arrays)

    def append(self, actions: Array) -> None:
        self._arrays.append(actions)

    def since(self, step: int, local: slice, squeeze: bool) -> Array:
        """Actions of the rows ``local`` from ``step`` on: [t, rows, ...], or [t, ...] if ``squeeze``."""
        index: Any = local.start if squeeze else local
        return np.array([actions[index] for actions in self._arrays[step - self._first :]])

    def forget(self, step: int) -> None:
        """Drop what lies before ``step``; in large bites, so that the cost per step stays constant."""
        surplus = step - self._first
        if surplus > len(self._arrays) // 2:
            del self._arrays[:surplus]
            self._first = step


class MultiTaskVectorEnv(VectorEnv):
    """A vector of any tasks, one slot per task and copy, in this process or in workers.

    Slots are ordered by group, then task, then copy; rows follow the slots, and a team fills adjacent rows.
    Autoreset is SAME_STEP. All arrays handed out are fresh: no later call writes to them; ``Step.next`` shares
    arrays with the observation that follows where no episode ended.

    Args:
        tasks: what to play; unique names.
        copies: slots per task, one number for all or one per task; 0 for a task that only a ``schedule`` brings.
        seed: the run seed, non-negative; decides everything together with the actions.
        workers: 0 steps slots in this process; n >= 1 in n worker processes. Results are bit-identical.
        schedule: which (task, seed) each slot plays next. A schedule may send a slot any of ``tasks`` that has the
            same group and team size. By default every slot keeps its task.
        spec: share another vector's spec (task ids, groups); ``tasks`` must be among its tasks.
        patience: seconds that a worker may take for one vector step before it counts as hung.

    A worker that raises, dies or hangs is replaced, and its slots play their journals again: everything goes on bit for
    bit as if nothing had happened. ``faults`` lists what it was. Only what fails again and again raises.

    Raises:
        ValueError: no tasks, a name twice, copies below 1, a task that ``spec`` lacks, ...
        mtrl.spaces.SpaceError: a task whose spaces have no place in the contract.
        mtrl.vector.slots.EnvironmentFailedError: an environment raised, in a worker several times in a row; from then
            on every call raises it again. Its ``journal`` is the episode that did it.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}
    spec: Spec  # pyright: ignore[reportIncompatibleVariableOverride]  # Gymnasium's is the id of one environment

    def __init__(
        self,
        tasks: Sequence[Task],
        copies: int | Sequence[int] = 1,
        *,
        seed: int = 0,
        workers: int = 0,
        schedule: Schedule | None = None,
        spec: Spec | None = None,
        patience: float = 300.0,
    ) -> None:
        if not all(isinstance(task, Task) for task in tasks):
            raise TypeError(f"tasks={tasks!r}: give tasks, as in mtrl.tasks('minigrid/mt3')")
        counts = _copies(tasks, copies, least=1 if schedule is None else 0)
        if workers < 0:
            raise ValueError(f"workers={workers}: give 0 (this process) or the number of worker processes")
        codecs = [codec(task) for task in tasks]
        spec = make_spec(tasks, codecs) if spec is None else spec
        self.spec = spec  # pyright: ignore[reportIncompatibleVariableOverride]
        ids = _task_ids(tasks, spec)
        program = _program(tasks, codecs, counts, ids, spec)
        self._program, self._groups, self._places = program, program.groups, program.places
        of_task = dict(zip(ids, counts, strict=True))
        self.slot_tasks = tuple(
            task for group in program.groups for task in group.tasks if task in of_task for _ in range(of_task[task])
        )
        self._playable = frozenset(ids)
        self._custom_schedule = schedule
        self.num_envs = sum(place.agents for place in self._places)
        starts = np.array([place.rows.start for place in self._places])
        self._row_slot = np.repeat(np.arange(len(self._places)), [place.agents for place in self._places])
        self._starts, self._agents = starts, np.array([place.agents for place in self._places])
        rows: dict[str, slice] = {}
        for group in self._groups:
            mine = [place.rows for place in self._places if place.group == group.name]
            rows[group.name] = slice(mine[0].start, mine[-1].stop)
        self.layout = Layout(rows, self.num_envs)
        """Rows of each group that has tasks in this vector."""
        self._make_spaces()
        self._accepts = {group.name: _accepted(group, rows[group.name]) for group in self._groups}

        self.episodes: list[Episode] = []
        """Episodes that the last step finished, in slot order."""
        self._seed = seed
        self._pending = self._started = self._torn = False
        self._failure: EnvironmentFailedError | None = None
        self._backend: Backend = Workers(program, workers, patience) if workers else InProcess(program)
        self.workers: int = min(workers, len(self._places))
        """Processes that step the environments; 0: this one does."""

    # ---------------------------------------------------------------------------------------------- native face
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin every slot's episode 0.

        Args:
            seed: a new run seed; None keeps the present one.
            options: none are known.

        Returns:
            ``({group: leaves}, info)``; natively read ``obs`` instead.
        """
        self._check(pending=False, anew=True)
        if options:
            raise ValueError(f"unknown reset options {sorted(options)}: this vector takes none")
        if seed is not None:
            if self._custom_schedule is not None:
                raise ValueError("reset(seed=...) would do nothing: the schedule given decides all seeds")
            self._seed = seed
        super().reset(seed=self._seed)
        slots = range(len(self._places))
        self._schedule: Schedule = self._custom_schedule or Pinned(self.slot_tasks, self._seed)
        self._index = [0] * len(slots)
        self._current = [self._draw(slot, 0) for slot in slots]
        self._next = [self._draw(slot, 1) if self._current[slot] else None for slot in slots]
        empty = {place.slot: self._no_actions(place) for place in self._places}
        self._begin(empty, [0.0] * len(slots))
        return self.obs.leaves, self._info()

    @property
    def active(self) -> Array:
        """[N] bool: rows whose slot plays an episode now (see ``Schedule``); the others are blank."""
        return self._active.copy()

    @property
    def faults(self) -> list[str]:
        """What went wrong in workers that were replaced, oldest first."""
        return list(self._backend.faults)

    def step_async(self, actions: Mapping[str, Array]) -> None:
        """Send actions; environments of worker processes move until ``step_wait``.

        Args:
            actions: ``{group: [n_g] integers or [n_g, a] floats}``, see ``Decision.action``. Copied.

        Raises:
            ValueError: naming group, row and task of an action that is missing, of another shape or kind, not
                finite or out of bounds. (Checked here, since some simulators clamp silently, NaN included.)
        """
        self._check(pending=False, started=True)
        played = {name: self._valid(name, actions) for name in self._accepts}
        if len(actions) != len(played):
            raise ValueError(
                f"actions for unknown groups {sorted(set(actions) - set(played))}; groups: {sorted(played)}"
            )
        for name, action in played.items():
            self._buffers.action[name][...] = action
            self._history[name].append(action)
        self._pending = True
        self._guard(self._backend.send)

    def step_wait(self, decision: Decision) -> tuple[Step, Obs]:
        """Finish the step begun by ``step_async``.

        Args:
            decision: what was decided; handed through into the transition.

        Returns:
            The transition of every row and the observation that follows it (also ``obs``).
        """
        self._check(pending=True)
        self._guard(lambda: self._backend.wait(self._running), resumes=self._backend.resumes)
        self._pending = False
        self._clock += 1
        buffers, before, was_active = self._buffers, self.obs, self._active
        reward, success = buffers.reward.copy(), buffers.success.copy()
        terminated, truncated = buffers.terminated[self._row_slot], buffers.truncated[self._row_slot]
        self._ret += np.add.reduceat(reward, self._starts) / self._agents
        self._success |= np.logical_or.reduceat(success, self._starts)
        ended = np.flatnonzero(buffers.terminated | buffers.truncated).tolist()
        leaves = {name: {leaf: array.copy() for leaf, array in obs.items()} for name, obs in buffers.obs.items()}
        if not ended:
            self.episodes = []
            after = Obs(leaves, before.task, np.zeros(self.num_envs, bool))
            following = after
        else:
            successors = {name: {leaf: a.copy() for leaf, a in obs.items()} for name, obs in leaves.items()}
            for place in (self._places[slot] for slot in ended):
                for leaf, array in buffers.final[place.group].items():
                    successors[place.group][leaf][place.local] = array[place.local]
            after = Obs(successors, before.task, np.zeros(self.num_envs, bool))
            self.episodes = [self._finish(slot) for slot in ended]
            self._forget()
            self._set_next(ended)
            following = self._observe(leaves, ended)
            movable = [slot for slot in ended if self._current[slot] and not self._places[slot].batched]
            self._guard(lambda: self._backend.rebalance(movable, self._running))
        self.obs = following
        step = Step(before, decision, reward, terminated, truncated, success, after, was_active)
        return step, following

    # ------------------------------------------------------------------------------------------- Gymnasium face
    def step(self, actions: Mapping[str, Array]) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """``step_async`` and ``step_wait`` in Gymnasium's form.

        Returns:
            ``({group: leaves}, reward [N], terminated [N], truncated [N], info)``. ``info`` holds ``task`` [N] int64
            (of the transition), ``success`` [N], ``active`` [N] and, where episodes ended, ``final_obs`` [N] (objects:
            a row's leaves) and ``final_info["episode"]`` (``r``, ``l``, ``task``, ``success``, ``seed``), with masks
            ``_final_obs`` and so on.
        """
        self.step_async(actions)
        step, obs = self.step_wait(Decision(actions, {}))
        info = self._info(success=step.success, active=step.active, task=step.obs.task)
        for episode in self.episodes:
            place = self._places[episode.slot]
            numbers = {"r": episode.ret, "l": episode.length, "task": episode.task, "seed": episode.seed}
            for row in range(place.agents):
                local = place.local.start + row
                final = {leaf: array[local] for leaf, array in step.next.leaves[place.group].items()}
                ending = {"episode": {**numbers, "success": bool(episode.success)}}
                info = self._add_info(info, {"final_obs": final, "final_info": ending}, place.rows.start + row)
        return obs.leaves, step.reward, step.terminated, step.truncated, info

    def render(self) -> Any:
        """Not here: ``replay(task, journal, render=True)`` renders any episode afterwards."""
        raise NotImplementedError("render an episode afterwards with replay(task, episode.journal, render=True)")

    def close_extras(self, **kwargs: Any) -> None:
        """Close all environments and workers; never hangs."""
        self._backend.close()

    def __repr__(self) -> str:
        return f"MultiTaskVectorEnv({len(self._playable)} tasks, {len(self._places)} slots, {self.num_envs} rows)"

    # ------------------------------------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Journals of the running episodes and what is needed to go on: nested dicts and lists of plain values."""
        self._check(pending=False, started=True)
        slots = []
        for place in self._places:
            slot = place.slot
            current, following = self._current[slot], self._next[slot]
            slots.append(
                {
                    "index": self._index[slot],
                    "current": list(current) if current else None,
                    "next": list(following) if following else None,
                    "last_task": int(self.obs.task[place.rows.start]),
                    "actions": self._journal(place),
                    "ret": float(self._ret[slot]),
                    "success": bool(self._success[slot]),
                }
            )
        return {
            "seed": self._seed,
            "tasks": [self.spec.tasks[task].name for task in self.slot_tasks],
            "slots": slots,
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``, bit for bit: every slot is seeded anew and replays its journal.

        Raises:
            ValueError: the state belongs to other tasks or copies.
            EnvironmentFailedError: a replay went elsewhere, so its task is not determined by ``reset(seed)``.
        """
        self._check(pending=False, anew=True)
        mine = [self.spec.tasks[task].name for task in self.slot_tasks]
        if list(state["tasks"]) != mine:
            raise ValueError(f"the state belongs to the slots {list(state['tasks'])}, this vector has {mine}")
        self._seed = int(state["seed"])
        self._schedule = self._custom_schedule or Pinned(self.slot_tasks, self._seed)
        self._schedule.load_state_dict(state["schedule"])
        slots = state["slots"]
        self._index = [int(slot["index"]) for slot in slots]
        self._current = [_assignment(slot["current"]) for slot in slots]
        self._next = [_assignment(slot["next"]) for slot in slots]
        actions = {place.slot: np.asarray(slots[place.slot]["actions"]) for place in self._places}
        self._begin(actions, [float(slot["ret"]) for slot in slots])
        self._success = np.array([bool(slot["success"]) for slot in slots])
        tasks = np.array([int(slot["last_task"]) for slot in slots])
        self.obs = self.obs._replace(task=tasks[self._row_slot])

    # ------------------------------------------------------------------------------------------------ internals
    @property
    def _buffers(self) -> Buffers:
        return self._backend.buffers

    def _make_spaces(self) -> None:
        sizes = {name: rows.stop - rows.start for name, rows in self.layout.rows.items()}
        single: dict[str, Space[Any]] = {group.name: spaces.Dict(dict(group.leaves)) for group in self._groups}
        actions: dict[str, Space[Any]] = {group.name: group.action for group in self._groups}
        self.single_observation_space, self.single_action_space = spaces.Dict(single), spaces.Dict(actions)
        self.observation_space = spaces.Dict({name: batch_space(space, sizes[name]) for name, space in single.items()})
        self.action_space = spaces.Dict({name: batch_space(space, sizes[name]) for name, space in actions.items()})

    def _check(self, *, pending: bool, started: bool = False, anew: bool = False) -> None:
        if self._failure is not None:
            raise self._failure
        if self.closed:
            raise ClosedEnvironmentError("this vector is closed")
        if self._torn and not anew:
            raise RuntimeError("an interruption left some slots ahead of others: call reset() or load_state_dict()")
        if self._torn:
            self._pending = False
        if started and not self._started:
            raise NoAsyncCallError("call reset() first", "reset")
        if self._pending and not pending:
            raise AlreadyPendingCallError("a step is under way: call step_wait first", "step")
        if pending and not self._pending:
            raise NoAsyncCallError("no step is under way: call step_async first", "step")

    def _guard(self, call: Callable[[], Any], resumes: bool = False) -> Any:
        try:
            return call()
        except EnvironmentFailedError as error:
            if error.slot is not None and (assignment := self._current[error.slot]):
                name = self.spec.tasks[assignment.task].name
                actions = self._journal(self._places[error.slot], under_way=self._pending)
                error.journal = Journal(name, assignment.seed, actions)
            self._failure = error
            raise
        except BaseException:  # as Ctrl-C in a notebook
            self._torn |= not resumes
            raise

    def _draw(self, slot: int, index: int) -> Assignment | None:
        drawn = self._schedule.assign(slot, index)
        if drawn is None:
            return None
        task, home = int(drawn.task), self._places[slot]
        if task not in self._playable:
            raise ValueError(f"schedule: slot {slot} got task {task}, which this vector does not hold")
        info = self.spec.tasks[task]
        if (info.group, info.agents) != (home.group, home.agents):
            raise ValueError(
                f"schedule: slot {slot} of group {home.group!r} with {home.agents} agents cannot play {info.name!r} of "
                f"group {info.group!r} with {info.agents} agents"
            )
        return Assignment(task, int(drawn.seed))

    def _begin(self, actions: Mapping[int, Array], rets: Sequence[float]) -> None:
        """Bring all slots to their current episode, with ``actions`` played and ``rets`` earned."""
        lengths = [len(actions[place.slot]) for place in self._places]
        longest = max(lengths)
        # The histories are laid as if all journals ended at the same vector step.
        self._clock, self._began = longest, np.array([longest - length for length in lengths])
        self._history = {group.name: History() for group in self._groups}
        for step in range(longest):
            arrays = {name: np.zeros_like(action) for name, action in self._buffers.action.items()}
            for place, began in zip(self._places, self._began, strict=True):
                if step >= began:
                    arrays[place.group][place.local] = actions[place.slot][step - began]
            for name, array in arrays.items():
                self._history[name].append(array)
        self._ret, self._success = np.array(rets), np.zeros(len(self._places), bool)
        self._guard(lambda: self._backend.restore([self._running(place.slot) for place in self._places]))
        self._torn = False
        self._set_next(range(len(self._places)))
        self.episodes = []
        self._started = True
        leaves = {name: {leaf: a.copy() for leaf, a in obs.items()} for name, obs in self._buffers.obs.items()}
        tasks = np.array([a.task if a else home for a, home in zip(self._current, self.slot_tasks, strict=True)])
        self._active = np.array([a is not None for a in self._current])[self._row_slot]
        first = self._active & (np.array(lengths) == 0)[self._row_slot]
        self.obs = Obs(leaves, tasks[self._row_slot], first)

    def _set_next(self, slots: Iterable[int]) -> None:
        for slot in slots:
            task, seed = self._next[slot] or (PARKED, 0)
            self._buffers.next_task[slot], self._buffers.next_seed[slot] = task, seed

    def _observe(self, leaves: dict[str, dict[str, Array]], ended: Sequence[int]) -> Obs:
        """The observation after a step at which ``ended`` slots began their next episode."""
        task, first, self._active = self.obs.task.copy(), np.zeros(self.num_envs, bool), self._active.copy()
        for slot in ended:
            rows, current = self._places[slot].rows, self._current[slot]
            if current is None:
                self._active[rows] = False
            else:
                task[rows], first[rows] = current.task, True
        return Obs(leaves, task, first)

    def _finish(self, slot: int) -> Episode:
        """Close the books on the slot's episode and advance to the next one."""
        place, buffers, assignment = self._places[slot], self._buffers, self._current[slot]
        assert assignment is not None
        actions = self._journal(place)
        reported = bool(buffers.reported[slot])
        episode = Episode(
            task=assignment.task,
            slot=slot,
            index=self._index[slot],
            seed=assignment.seed,
            ret=float(self._ret[slot]),
            length=len(actions),
            success=bool(self._success[slot]) if reported else None,
            success_last=bool(buffers.success[place.rows].any()) if reported else None,
            terminated=bool(buffers.terminated[slot]),
            journal=Journal(self.spec.tasks[assignment.task].name, assignment.seed, actions),
        )
        self._index[slot] += 1
        self._current[slot] = self._next[slot]
        self._next[slot] = self._draw(slot, self._index[slot] + 1) if self._current[slot] else None
        self._ret[slot], self._success[slot] = 0.0, False
        self._began[slot] = self._clock
        return episode

    def _forget(self) -> None:
        """Drop actions that no running episode needs."""
        oldest = dict.fromkeys(self._history, self._clock)
        for place in self._places:
            if self._current[place.slot]:
                oldest[place.group] = min(oldest[place.group], int(self._began[place.slot]))
        for name, step in oldest.items():
            self._history[name].forget(step)

    def _no_actions(self, place: Place) -> Array:
        action = self._buffers.action[place.group][place.local]
        return np.zeros((0, *(action.shape if place.agents > 1 else action.shape[1:])), action.dtype)

    def _journal(self, place: Place, *, under_way: bool = False) -> Array:
        """The actions of the slot's running episode: [t, ...], a team's [t, agents, ...]; also those ``under_way``."""
        began, now = int(self._began[place.slot]), self._clock + under_way
        if self._current[place.slot] is None or began == now:
            return self._no_actions(place)
        return self._history[place.group].since(began, place.local, place.agents == 1)[: now - began]

    def _running(self, slot: int) -> Running:
        """What the slot plays, without a step that is under way."""
        task, seed = self._current[slot] or (PARKED, 0)
        return Running(slot, task, seed, self._journal(self._places[slot]), float(self._ret[slot]))

    def _valid(self, name: str, actions: Mapping[str, Array]) -> Array:
        """A fresh, checked array of the group's actions."""
        if name not in actions:
            near = difflib.get_close_matches(name, list(actions), n=1)
            raise ValueError(
                f"no actions for group {name!r}; got {sorted(actions)}" + (f" (is {near[0]!r} meant?)" if near else "")
            )
        low, high, shape, dtype, rows = self._accepts[name]
        given = np.asarray(actions[name])
        if given.shape != shape:
            raise ValueError(f"actions of group {name!r} must have shape {shape}, got {given.shape}")
        if given.dtype.kind not in ("iu" if dtype is np.int64 else "fiu"):
            raise ValueError(f"actions of group {name!r} must be {np.dtype(dtype)}, got {given.dtype}")
        action = given.astype(dtype)
        inside = (action >= low) & (action <= high)  # false for NaN
        if not inside.all():
            bad = ~inside.reshape(len(inside), -1).all(axis=1) & self._active[rows]
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                task = self.spec.tasks[int(self.obs.task[rows.start + row])].name
                raise ValueError(
                    f"group {name!r}, row {row} (row {rows.start + row} of the vector), task {task!r}: action "
                    f"{action[row]} is not within [{low}, {high}]"
                )
        return action

    def _info(self, **arrays: Array) -> dict[str, Any]:
        info: dict[str, Any] = {
            "task": self.obs.task.copy(),
            "success": np.zeros(self.num_envs, bool),
            "active": self._active.copy(),
        }
        info.update({key: array.copy() for key, array in arrays.items()})
        everywhere = np.ones(self.num_envs, bool)
        return info | {f"_{key}": everywhere.copy() for key in info}


class _Accepted(NamedTuple):
    """What actions a group takes: bounds, shape and dtype of its array; and its rows."""

    low: Any
    high: Any
    shape: tuple[int, ...]
    dtype: type[np.generic]
    rows: slice


class Replay(NamedTuple):
    """An episode played again: its return, length, whether success was seen (None: the task reports none) and, if
    asked for, ``length + 1`` frames [h, w, 3] uint8, the first one before any action."""

    ret: float
    length: int
    success: bool | None
    frames: list[Array]


class Moment(NamedTuple):
    """A picture [h, w, 3] uint8 out of an episode, after ``step`` actions; return and success so far."""

    picture: Array
    step: int
    ret: float
    success: bool | None


def replay(task: Task, journal: Journal, *, render: bool = False) -> Replay:
    """Play an episode again outside the vector; the return equals the recorded one bit for bit.

    Args:
        task: the journal's task.
        journal: from ``Episode.journal``.
        render: build the environment with ``render_mode="rgb_array"`` and collect frames.

    Raises:
        ValueError: the journal belongs to another task.
        mtrl.vector.slots.RenderError: the environment cannot draw itself.
    """
    if render:
        seen = list(moments(task, journal))
        return Replay(seen[-1].ret, len(journal.actions), seen[-1].success, [moment.picture for moment in seen])
    slot = _alone(task, journal)
    try:
        *_, (ret, success) = slot.play(journal.seed, journal.actions)
        return Replay(ret, len(journal.actions), success, [])
    finally:
        slot.close()


def moments(task: Task, journal: Journal, *, every: int = 1) -> Generator[Moment, None, None]:
    """Play an episode again and draw it: its start, every so many steps, and its end. Holds one picture at a time.

    Close the iterator if it is left early: an environment lives as long as it does.

    Args:
        task: the journal's task.
        journal: from ``Episode.journal``.
        every: steps from one picture to the next.

    Raises:
        ValueError: the journal belongs to another task.
        mtrl.vector.slots.RenderError: the environment cannot draw itself.
    """
    slot = _alone(task, journal, render_mode="rgb_array")
    try:
        for step, (ret, success) in enumerate(_drawable(slot, task, journal)):
            if step % every == 0 or step == len(journal.actions):
                yield Moment(slot.render(), step, ret, success)
    finally:
        slot.close()


def _drawable(slot: Slot, task: Task, journal: Journal) -> Iterator[tuple[float, bool | None]]:
    playing = slot.play(journal.seed, journal.actions)
    try:
        yield next(playing)
    except EnvironmentFailedError as error:
        cause = error.__cause__
        if isinstance(cause, TypeError) and any(part in str(cause) for part in ("render_mode", "takes no arguments")):
            raise RenderError(f"task {task.name!r} cannot render: its build takes no render_mode") from error
        raise
    yield from playing


def _alone(task: Task, journal: Journal, **render: Any) -> Slot:
    """The only slot of a vector for the journal's task."""
    if journal.task != task.name:
        raise ValueError(f"the journal belongs to task {journal.task!r}, not to {task.name!r}")
    one = codec(task)
    program = _program([task], [one], [1], [0], make_spec([task], [one]))
    return Slot(program.places[0], program, Buffers(program), **render)


def _copies(tasks: Sequence[Task], copies: int | Sequence[int], least: int) -> list[int]:
    counts = [copies] * len(tasks) if isinstance(copies, int) else list(copies)
    if len(counts) != len(tasks):
        raise ValueError(f"copies has {len(counts)} entries for {len(tasks)} tasks: give one number, or one per task")
    if min(counts, default=1) < least:
        raise ValueError(f"copies={copies}: every task needs at least one, unless a schedule shares slots out")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"task {name!r} is given twice: ask for more copies instead")
    return counts


def _task_ids(tasks: Sequence[Task], spec: Spec) -> list[int]:
    ids = {info.name: index for index, info in enumerate(spec.tasks)}
    for task in tasks:
        if task.name not in ids:
            raise ValueError(f"task {task.name!r} is not in the spec given, which has {sorted(ids)}")
    return [ids[task.name] for task in tasks]


def _program(
    tasks: Sequence[Task], codecs: Sequence[Codec], counts: Sequence[int], ids: Sequence[int], spec: Spec
) -> Program:
    """Lay the slots out: by group, then task, then copy."""
    given = dict(zip(ids, zip(tasks, codecs, counts, strict=True), strict=True))
    places: list[Place] = []
    groups: list[Group] = []
    row = 0
    for group in spec.groups:
        start = row
        batched = _batched([index for index in group.tasks if index in given], {i: one[0] for i, one in given.items()})
        for index in group.tasks:
            if index not in given:
                continue
            task, one, count = given[index]
            if {leaf: box.shape for leaf, box in one.leaves.items()} != {
                leaf: box.shape for leaf, box in group.leaves.items()
            }:
                raise ValueError(
                    f"task {task.name!r} has other observations than its group {group.name!r} in the spec given"
                )
            for _ in range(count):
                stop = row + task.agents
                rows, local = slice(row, stop), slice(row - start, stop - start)
                places.append(Place(len(places), group.name, task.agents, rows, local, batched.get(index, ())))
                row = stop
        if row > start:
            groups.append(group)
    by_id = {index: task for index, (task, _, _) in given.items()}
    return Program(by_id, {index: one for index, (_, one, _) in given.items()}, tuple(places), tuple(groups))


def _batched(ids: Sequence[int], tasks: Mapping[int, Task]) -> dict[int, tuple[int, ...]]:
    """The tasks of one group that are stepped together with each of ``ids``.

    A slot may be sent any task of its group and team size, so these must all agree on how they are stepped.
    """
    found: dict[int, tuple[int, ...]] = {}
    for size in {tasks[index].agents for index in ids}:
        own = tuple(sorted(index for index in ids if tasks[index].agents == size))
        batch = tasks[own[0]].batch
        if batch is not None and all(tasks[index].batch == batch for index in own):
            found |= dict.fromkeys(own, own)
    return found


def _accepted(group: Group, rows: slice) -> _Accepted:
    shape, dtype = action_array(group)
    if isinstance(group.action, spaces.Discrete):
        low, high = 0, int(group.action.n) - 1
    else:
        low, high = group.action.low.astype(dtype), group.action.high.astype(dtype)
    return _Accepted(low, high, (rows.stop - rows.start, *shape), dtype, rows)


def _assignment(saved: Sequence[int] | None) -> Assignment | None:
    return None if saved is None else Assignment(int(saved[0]), int(saved[1]))
