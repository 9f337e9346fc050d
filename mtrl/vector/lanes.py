"""Slots whose tasks know how to step many episodes at once (``Task.batch``), behind the same buffers as ``Slot``.

The vector cannot tell the difference: same observations, rewards, autoreset, truncation, journals and faults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mtrl.types import Array
from mtrl.vector.slots import PARKED, Buffers, EnvironmentFailedError, Program, Running, blank, told, unfit


class Lanes:
    """All slots of one process that one ``Batch`` steps; lane i is the i-th of them.

    Args:
        slots: which ones; their places name the same ``batched`` tasks.
        program: what the vector plays.
        buffers: where actions come from and everything else goes.
    """

    def __init__(self, slots: Sequence[int], program: Program, buffers: Buffers) -> None:
        places = [program.places[slot] for slot in slots]
        self.slots = tuple(slots)
        self._tasks = places[0].batched
        self._program, self._buffers, self._agents = program, buffers, places[0].agents
        self._group = places[0].group
        self._index = np.array(slots)
        self._rows = np.array([np.arange(place.rows.start, place.rows.stop) for place in places])  # [lanes, agents]
        self._local = np.array([np.arange(place.local.start, place.local.stop) for place in places])
        self._task, self._length = np.full(len(slots), PARKED), np.zeros(len(slots), np.int64)
        tasks = [program.tasks[task] for task in self._tasks]
        self._horizon = np.array([task.horizon for task in tasks])
        make = tasks[0].batch
        assert make is not None
        try:
            self._batch = make(tasks, len(slots))
        except Exception as error:
            raise self._failed(f"cannot be made: {error!r}") from error

    def restore(self, episodes: Sequence[Running]) -> None:
        """Begin episodes, play their actions and write the observations reached; the other lanes stay as they are.

        Raises:
            EnvironmentFailedError: a replay went elsewhere, so its task is not determined by the seed.
        """
        lane = {slot: i for i, slot in enumerate(self.slots)}
        mine = np.array([lane[episode.slot] for episode in episodes])
        chosen = np.zeros(len(self.slots), bool)
        chosen[mine] = True
        task, seed, length = (np.zeros(len(self.slots), np.int64) for _ in range(3))
        task[mine], seed[mine] = [episode.task for episode in episodes], [episode.seed for episode in episodes]
        length[mine] = [len(episode.actions) for episode in episodes]
        self._start(chosen, task, seed)
        actions, ret = self._actions().copy(), np.zeros(len(self.slots))
        for step in range(int(length.max())):
            playing = length > step
            for i, episode in zip(mine, episodes, strict=True):
                if playing[i]:
                    actions[i] = episode.actions[step].reshape(actions.shape[1:])
            terminated, truncated = self._advance(actions, playing)
            if (over := terminated | truncated).any():
                what = "ended while its journal was replayed; reset(seed) must decide all"
                raise self._failed_lane(int(over.argmax()), what)
            ret[playing] += self._team_reward()[playing]
        for i, episode in zip(mine, episodes, strict=True):
            if ret[i] != episode.ret:
                what = f"replaying its journal gave the return {float(ret[i])!r} instead of {episode.ret!r}"
                raise self._failed_lane(int(i), f"{what}; reset(seed) must determine the episode")
        self._write(self._buffers.obs[self._group], chosen & (self._task != PARKED))

    def step(self) -> None:
        """Play the actions in the buffers; truncate at horizons; begin the next episodes where some ended."""
        buffers = self._buffers
        playing = self._task != PARKED
        terminated, truncated = self._advance(self._actions(), playing)
        buffers.terminated[self._index], buffers.truncated[self._index] = terminated, truncated
        ended = terminated | truncated
        if ended.any():
            final = buffers.final[self._group]
            for i in np.flatnonzero(terminated):  # as a team of which nobody is left
                if "alive" in final:
                    blank(final, slice(self._local[i, 0], self._local[i, -1] + 1))
            self._write(final, ended, terminated)
            self._start(ended, buffers.next_task[self._index], buffers.next_seed[self._index])
        self._write(buffers.obs[self._group], self._task != PARKED)

    def close(self) -> None:
        """Give up what the batch holds."""
        self._batch.close()

    def _start(self, chosen: Array, task: Array, seed: Array) -> None:
        """Begin episodes (task, seed) in the ``chosen`` lanes; ``PARKED`` clears their rows instead."""
        buffers, index = self._buffers, self._index[chosen]
        self._task[chosen], self._length[chosen] = task[chosen], 0
        buffers.task[index], buffers.seed[index], buffers.length[index] = task[chosen], seed[chosen], 0
        for i in np.flatnonzero(chosen & (self._task == PARKED)):
            blank(buffers.obs[self._group], slice(self._local[i, 0], self._local[i, -1] + 1))
        begun = chosen & (self._task != PARKED)
        try:
            self._batch.reset(begun, np.where(begun, seed, 0), self._choice())
        except Exception as error:
            raise self._failed(f"reset {told(error)}") from error

    def _advance(self, actions: Array, playing: Array) -> tuple[Array, Array]:
        """Step the lanes ``playing`` with actions [lanes, agents, ...]; returns terminated and truncated [lanes]."""
        buffers = self._buffers
        self._length[playing] += 1
        buffers.length[self._index] = self._length
        try:
            outcome = self._batch.step(actions, playing)
        except Exception as error:
            raise self._failed(told(error)) from error
        reward = outcome.reward if outcome.reward.ndim == 2 else outcome.reward[:, None]
        if (bad := playing & ~np.isfinite(reward).all(axis=1)).any():
            raise self._failed_lane(int(bad.argmax()), f"returned the reward {reward[bad.argmax()]}")
        buffers.reward[self._rows] = np.where(playing[:, None], reward, 0.0)
        buffers.success[self._rows] = (playing & outcome.success)[:, None]
        buffers.reported[self._index[playing]] = True
        terminated = playing & outcome.terminated
        late = self._length >= self._horizon[self._choice()]
        return terminated, playing & ~terminated & (outcome.truncated | late)

    def _write(self, leaves: Mapping[str, Array], chosen: Array, over: Array | None = None) -> None:
        """Write the lanes' present observations; of those that are ``over``, only the state of a team."""
        living = chosen if over is None or "alive" not in leaves else chosen & ~over
        if "alive" in leaves:
            leaves["alive"][self._local[living]] = True
        for name, array in self._batch.leaves().items():
            which = chosen if name == "state" else living
            leaves[name][self._local[which]] = array[which]
            if array.dtype.kind == "f" and not (fine := np.isfinite(array)).all():
                bad = which & ~fine.reshape(len(array), -1).all(1)
                if bad.any():
                    lane = int(bad.argmax())
                    raise self._failed_lane(lane, unfit(name, array[lane]))

    def _actions(self) -> Array:
        return self._buffers.action[self._group][self._local]

    def _choice(self) -> Array:
        """Which of the batch's tasks each lane plays; 0 for parked ones."""
        return np.maximum(np.searchsorted(self._tasks, self._task), 0)

    def _team_reward(self) -> Array:
        # The same sums as over a whole vector's rows, so that returns agree bit for bit.
        rewards = self._buffers.reward[self._rows].ravel()
        return np.add.reduceat(rewards, np.arange(0, rewards.size, self._agents)) / self._agents

    def _failed_lane(self, lane: int, what: str) -> EnvironmentFailedError:
        slot = self.slots[lane]
        return EnvironmentFailedError(f"{self._buffers.where(self._program, slot)}: {what}", slot)

    def _failed(self, what: str) -> EnvironmentFailedError:
        names = ", ".join(self._program.tasks[task].name for task in self._tasks)
        return EnvironmentFailedError(f"the batch of {names} (slots {', '.join(map(str, self.slots))}): {what}")
