"""Prioritised level replay: which episodes are worth playing again.

Jiang, Grefenstette and Rocktaschel 2021 (https://arxiv.org/abs/2010.03934). A level is (task, seed): all that decides
an episode but the actions. Its score is the agent's mean value error over its last episode: where the critic is wrong,
there is something to learn. Levels are unlimited here, so the best ``capacity`` of each task are kept, as in the
authors' follow-up on unlimited levels (Jiang et al. 2021, https://arxiv.org/abs/2110.02439).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtrl.types import Array, Episode

TEMPERATURE, STALENESS = 0.1, 0.1
"""Of the ranks, and the share of staleness; both as published for Procgen."""


class Levels:
    """Scores of levels, and how likely each is to be replayed.

    Args:
        widths: [T], what each task's errors are divided by: its return at score 1 minus that at score 0.
        rows: [S] slices, the rows of each slot.
        capacity: K, levels kept per task; a new one takes the place of the lowest if it scores higher.

    Attributes:
        seed, score, drawn: [T, K]: a level's seed, its score (-1: none there), and when it was last drawn.
        clock: [1] int64, draws so far.
    """

    ARRAYS = ("seed", "score", "drawn", "clock", "total", "count", "before")

    def __init__(self, widths: Array, rows: Sequence[slice], capacity: int) -> None:
        self._widths, self._rows = widths, tuple(rows)
        shape = (len(widths), capacity)
        self.seed, self.drawn = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.score, self.clock = np.full(shape, -1.0), np.zeros(1, np.int64)
        # Of each slot's running episode, up to the last update: sum and number of errors, and steps.
        self.total, self.count, self.before = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows), np.int64)
        self._ended: list[tuple[int, int, int, int]] = []  # slot, task, seed, length; since the last update

    def probs(self, allowed: Array) -> Array:
        """[T, K], summing to 1 over the levels of the tasks ``allowed`` [T] bool; zeros if there are none."""
        held = allowed[:, None] & (self.score >= 0)
        found = np.zeros_like(self.score)
        if held.any():
            rank = np.empty(held.sum())
            rank[np.argsort(-self.score[held], kind="stable")] = np.arange(1, len(rank) + 1)
            best = rank ** (-1 / TEMPERATURE)
            stale = (self.clock[0] - self.drawn[held]).astype(float)
            stale = stale / stale.sum() if stale.any() else np.full(len(stale), 1 / len(stale))
            found[held] = (1 - STALENESS) * best / best.sum() + STALENESS * stale
        return found

    def draw(self, task: int, probs: Array, rng: np.random.Generator) -> int:
        """A seed of ``task``, in proportion to ``probs`` [K]."""
        place = int(rng.choice(len(probs), p=probs / probs.sum()))
        self.drawn[task, place] = self.clock[0]
        return int(self.seed[task, place])

    def finished(self, episode: Episode) -> None:
        """An episode ended; it is scored at the next update."""
        self._ended.append((episode.slot, episode.task, episode.seed, episode.length))

    def learned(self, errors: Array) -> None:
        """Score the levels whose episodes ended; those that still run carry their errors over to the next update.

        Args:
            errors: [t, N], value errors of all steps since the last update; NaN where a row did not count.

        Raises:
            ValueError: more steps were played than ``errors`` holds.
        """
        at = np.zeros(len(self._rows), np.int64)
        for slot, task, seed, length in self._ended:
            self._collect(slot, errors, int(at[slot]), int(at[slot] + length - self.before[slot]))
            at[slot] += length - self.before[slot]
            if self.count[slot]:
                self._enter(task, seed, self.total[slot] / self.count[slot] / self._widths[task])
            self.total[slot] = self.count[slot] = self.before[slot] = 0
        self._ended.clear()
        for slot in range(len(self._rows)):
            self._collect(slot, errors, int(at[slot]), len(errors))
        self.before += len(errors) - at

    def state_dict(self) -> dict[str, Any]:
        ended = np.array(self._ended, np.int64).reshape(-1, 4)
        return {"ended": ended, **{name: getattr(self, name).copy() for name in self.ARRAYS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.ARRAYS:
            getattr(self, name)[...] = state[name]
        self._ended = [(int(a), int(b), int(c), int(d)) for a, b, c, d in np.asarray(state["ended"])]

    def _collect(self, slot: int, errors: Array, start: int, stop: int) -> None:
        if stop > len(errors):
            raise ValueError(f"slot {slot} played {stop} steps since the last update, which learned from {len(errors)}")
        part = errors[start:stop, self._rows[slot]]
        self.total[slot] += np.nansum(part)
        self.count[slot] += np.isfinite(part).sum()

    def _enter(self, task: int, seed: int, score: float) -> None:
        held = np.flatnonzero((self.seed[task] == seed) & (self.score[task] >= 0))
        place = int(held[0] if len(held) else self.score[task].argmin())
        if not len(held):
            if self.score[task, place] >= score:
                return
            self.seed[task, place], self.drawn[task, place] = seed, self.clock[0]
        self.score[task, place] = score
