"""The slots of one process: single ones and those that a ``Batch`` steps together."""

from __future__ import annotations

import time
from collections.abc import Iterable

from mtrl.vector.lanes import Lanes
from mtrl.vector.slots import Buffers, Program, Running, Slot

COST_STEPS = 500  # that the moving average of step times spans, so that a reset now and then does not upset it


class Runner:
    """Steps slots one after the other, and batched ones together; ``number`` is the worker's, 0 in process."""

    def __init__(self, program: Program, buffers: Buffers, number: int = 0) -> None:
        self._program, self._buffers, self._number = program, buffers, number
        self._slots: dict[int, Slot] = {}
        self._lanes: dict[tuple[int, ...], Lanes] = {}

    def restore(self, episodes: Iterable[Running]) -> None:
        """Bring slots to where their episodes lead. The first call decides which batched slots belong together."""
        batched: dict[tuple[int, ...], list[Running]] = {}
        for episode in episodes:
            index = episode.slot
            place = self._program.places[index]
            if place.batched:
                batched.setdefault(place.batched, []).append(episode)
                continue
            self._buffers.busy[self._number] = index
            if index not in self._slots:
                self._slots[index] = Slot(place, self._program, self._buffers)
            self._slots[index].restore(episode)
        for key, mine in batched.items():
            self._buffers.busy[self._number] = mine[0].slot
            if key not in self._lanes:
                self._lanes[key] = Lanes([episode.slot for episode in mine], self._program, self._buffers)
            self._lanes[key].restore(mine)

    def step(self) -> None:
        """Step every slot once, measuring each; a batch's time counts in equal shares."""
        cost, busy, number, clock = self._buffers.cost, self._buffers.busy, self._number, time.perf_counter
        before = clock()
        for index, slot in self._slots.items():
            busy[number] = index
            slot.step()
            after = clock()
            cost[index] += (after - before - cost[index]) / COST_STEPS
            before = after
        for lanes in self._lanes.values():
            busy[number] = lanes.slots[0]
            lanes.step()
            after = clock()
            share = (after - before) / len(lanes.slots)
            for index in lanes.slots:
                cost[index] += (share - cost[index]) / COST_STEPS
            before = after

    def drop(self, index: int) -> None:
        """Give a single slot up."""
        self._slots.pop(index).close()

    def close(self) -> None:
        """Close every environment."""
        for part in (*self._slots.values(), *self._lanes.values()):
            part.close()
        self._slots.clear()
        self._lanes.clear()
