"""Which (task, seed) each slot plays next: the default, and fixed lists for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtrl.types import Assignment


def episode_seed(run_seed: int, slot: int, index: int) -> int:
    """The seed, in [0, 2**31), of a slot's ``index``-th episode.

    Numpy's ``SeedSequence`` mixes the three numbers, so that neighbouring slots, episodes and runs share nothing.
    31 bits, since some environments keep their seed in a signed 32-bit integer.
    """
    return int(np.random.SeedSequence((run_seed, slot, index)).generate_state(1)[0]) >> 1


class Pinned:
    """Each slot plays its own task for ever; seeds come from the run seed. The default schedule."""

    def __init__(self, slot_tasks: Sequence[int], run_seed: int) -> None:
        self._slot_tasks, self._run_seed = tuple(slot_tasks), run_seed

    def assign(self, slot: int, index: int) -> Assignment:
        return Assignment(self._slot_tasks[slot], episode_seed(self._run_seed, slot, index))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state  # a function of (run seed, slot, index): the vector saves the run seed


class EpisodeList:
    """A fixed list of episodes for every slot, for evaluation; a slot is parked when its list is done.

    Args:
        episodes: ``episodes[slot]`` are the ``(task, seed)`` pairs that this slot plays, in order.
    """

    def __init__(self, episodes: Sequence[Sequence[tuple[int, int]]]) -> None:
        self._episodes = [[Assignment(*episode) for episode in slot] for slot in episodes]

    def assign(self, slot: int, index: int) -> Assignment | None:
        episodes = self._episodes[slot]
        return episodes[index] if index < len(episodes) else None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state  # fixed lists have no state
