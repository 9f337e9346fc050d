"""Which task a slot plays next, so that many tasks can share fewer slots, and time goes where something is learned.

All samplers but ``pinned`` choose among the tasks of the slot's group and team size; a share ``floor`` of the choice
stays uniform, and every task is played ``warmup`` times first. What they know of a task is its training success (its
score between 0 and 1 where it reports none); evaluation never feeds them.

- ``pinned``: every slot keeps its task; equal *steps* per task. The default.
- ``round_robin``: equal *episodes* per task. ``uniform``; ``weighted``: fixed ``weights`` by task name.
- ``success_balanced``: in proportion to 1 - p, the failures.
- ``learnability``: in proportion to p (1 - p) (Rutherford et al. 2024, https://arxiv.org/abs/2408.15099).
- ``learning_progress``: after Kanitscheider et al. 2021 (https://arxiv.org/abs/2106.14876), in the form of
  RyanNavillus/Syllabus, but a task without episodes in an interval keeps its estimate.
- ``exp3``: the adversarial bandit of Auer et al. 2002; the pay is the change of the task's score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from mtrl.registry import UnknownNameError
from mtrl.replay import rng_state, set_rng_state
from mtrl.types import Array, Assignment, Episode, Spec
from mtrl.vector import episode_seed

RATE = 0.1
"""Of the moving averages of success and score."""


class SamplerConfig(BaseModel):
    """Which sampler, and its few numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal[
        "pinned",
        "round_robin",
        "uniform",
        "weighted",
        "success_balanced",
        "learnability",
        "learning_progress",
        "exp3",
    ] = "pinned"
    floor: float = Field(default=0.25, ge=0, le=1, description="share of the choice that stays uniform")
    warmup: int = Field(default=1, ge=0, description="episodes of every task before its results decide")
    interval: PositiveInt = Field(default=50, description="episodes between estimates of learning_progress")
    weights: dict[str, PositiveFloat] = Field(default={}, description="of weighted, by task name; 1 if not named")


class Sampled:
    """A ``Schedule`` that draws each slot's next task; seeds are those of the default schedule.

    Args:
        config: of any kind but ``pinned``.
        spec: all tasks.
        slot_tasks: what each slot would play if it were pinned; its task's group and team size bind the choice.
        seed: the run seed.

    Raises:
        ValueError: ``pinned``, which is no choice.
        UnknownNameError: ``weights`` names no task.
    """

    def __init__(self, config: SamplerConfig, spec: Spec, slot_tasks: Sequence[int], seed: int) -> None:
        if config.kind == "pinned":
            raise ValueError("pinned slots need no sampler: leave the vector's schedule out")
        names = [task.name for task in spec.tasks]
        for name in config.weights:
            if name not in names:
                raise UnknownNameError("task in sampler.weights", name, names)
        self.config, self._spec, self._seed = config, spec, seed
        kinds = [(task.group, task.agents) for task in spec.tasks]
        self._rivals = np.array([[one == other for one in kinds] for other in kinds])  # [T, T]: may share a slot
        self._home = tuple(slot_tasks)
        self._rng = np.random.default_rng(np.random.SeedSequence((seed, 0x5A3)))
        self._fixed = np.array([config.weights.get(name, 1.0) for name in names])
        tasks = len(names)
        self.drawn = np.zeros(tasks, np.int64)
        """Episodes of each task that were scheduled so far."""
        self._last = np.zeros(tasks, np.int64)  # when each task was drawn last, for ties of round_robin
        self._played = np.zeros(tasks, np.int64)
        self._success, self._score = np.zeros(tasks), np.zeros(tasks)  # moving averages
        self._progress = Progress(tasks)
        self._interval = np.zeros((2, tasks))  # successes and episodes since the last estimate
        self._gain = np.zeros(tasks)  # exp3's log weights
        # exp3: the probability with which each task was last drawn
        self._odds = 1 / self._rivals.sum(axis=1)

    def assign(self, slot: int, index: int) -> Assignment:
        """Draw the slot's ``index``-th episode."""
        allowed = self._rivals[self._home[slot]]
        probs = self.probs(allowed)
        unseen = allowed & (self.drawn < self.config.warmup)
        if self.config.kind == "round_robin" or unseen.any():
            rank = np.where(unseen if unseen.any() else allowed, self.drawn, np.iinfo(np.int64).max)
            task = int(np.lexsort((self._last, rank))[0])
        else:
            task = int(self._rng.choice(len(probs), p=probs))
        self.drawn[task] += 1
        self._last[task] = self.drawn.sum()
        self._odds[task] = probs[task]
        return Assignment(task, episode_seed(self._seed, slot, index))

    def probs(self, allowed: Array | None = None) -> Array:
        """Probabilities [T], summing to 1 over the tasks ``allowed`` [T] bool (default: all)."""
        allowed = np.ones(len(self.drawn), bool) if allowed is None else allowed
        weights = np.where(allowed, self._weights(allowed), 0.0)
        even = allowed / allowed.sum()
        if not weights.sum() > 0:
            return even
        return (1 - self.config.floor) * weights / weights.sum() + self.config.floor * even

    def update(self, episode: Episode) -> None:
        """Learn from a finished training episode."""
        task, info = episode.task, self._spec.tasks[episode.task]
        low, high = info.score
        score = min(max((episode.ret - low) / (high - low), 0.0), 1.0)
        success = score if episode.success is None else float(episode.success)
        rate = max(RATE, 1 / (1 + self._played[task]))  # a plain mean at first
        before = self._score[task]
        self._played[task] += 1
        self._success[task] += rate * (success - self._success[task])
        self._score[task] += rate * (score - before)
        if self.config.kind == "exp3" and self._played[task] > 1:
            tasks = int(self._rivals[task].sum())
            self._gain[task] += self.config.floor * abs(self._score[task] - before) / self._odds[task] / tasks
        self._interval[:, task] += success, 1
        if self._interval[1].sum() >= self.config.interval:
            self._progress.update(*self._interval)
            self._interval[:] = 0

    def metrics(self) -> dict[str, float]:
        """Each task's present probability among those it competes with, and the episodes scheduled so far."""
        found: dict[str, float] = {}
        for task, info in enumerate(self._spec.tasks):
            found[f"sampler/{info.name}_prob"] = float(self.probs(self._rivals[task])[task])
            found[f"sampler/{info.name}_episodes"] = float(self.drawn[task])
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "rng": rng_state(self._rng),
            "arrays": {name: array.copy() for name, array in self._arrays().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        set_rng_state(self._rng, state["rng"])
        for name, array in self._arrays().items():
            array[...] = state["arrays"][name]

    def _arrays(self) -> dict[str, Array]:
        own = ("drawn", "_last", "_played", "_success", "_score", "_interval", "_gain", "_odds")
        found = {name.strip("_"): getattr(self, name) for name in own}
        return found | {f"progress_{name}": getattr(self._progress, name) for name in Progress.ARRAYS}

    def _weights(self, allowed: Array) -> Array:
        kind, p = self.config.kind, self._success
        if kind == "weighted":
            return self._fixed
        if kind == "success_balanced":
            return 1 - p
        if kind == "learnability":
            return p * (1 - p)
        if kind == "learning_progress":
            return self._progress.weights(allowed)
        if kind == "exp3":
            return np.exp(self._gain - self._gain[allowed].max())
        return np.ones_like(p)


class Progress:
    """Learning progress: how far a fast and a slow average of a task's success lie apart.

    Success is measured from what the task gave at first (a random policy's, at most .75), and low rates are stretched,
    so that the step from 0 to .1 counts as much as that from .1 to 1.
    """

    ARRAYS = ("seen", "base", "fast", "slow", "raw")

    def __init__(self, tasks: int) -> None:
        self.seen = np.zeros(tasks, bool)
        self.base, self.fast, self.slow, self.raw = (np.zeros(tasks) for _ in range(4))

    def update(self, successes: Array, episodes: Array) -> None:
        """Take in an interval: sums [T] of success and numbers [T] of episodes; tasks without any stay as they are."""
        had = episodes > 0
        p = np.divide(successes, episodes, out=np.zeros_like(self.raw), where=had)
        new = had & ~self.seen
        self.base[new] = np.minimum(p[new], 0.75)
        above = np.maximum(p - self.base, 0) / (1 - self.base)
        self.fast[new] = self.slow[new] = above[new]
        old = had & self.seen
        self.fast[old] += RATE * (above - self.fast)[old]
        self.slow[old] += RATE * (self.fast - self.slow)[old]
        self.raw[had] += np.where(self.seen, RATE, 1.0)[had] * (p - self.raw)[had]
        self.seen |= had

    def value(self) -> Array:
        """Learning progress [T]."""
        return np.abs(stretch(self.fast) - stretch(self.slow))

    def weights(self, allowed: Array) -> Array:
        """Weights [T]: a sigmoid of the standardised progress of all tasks that ever succeed; 0 if there is none."""
        progress = self.value()
        live = allowed & ((progress > 0) | (self.raw > 0))
        found = np.zeros_like(progress)
        if live.any():
            spread = progress[live].std()
            found[live] = 1 / (1 + np.exp(-(progress[live] - progress[live].mean()) / (spread if spread > 0 else 1.0)))
        return found


def stretch(p: Array, theta: float = 0.1) -> Array:
    """p (1 - theta) / (p + theta (1 - 2 p)): 0 -> 0, theta -> 1/2, 1 -> 1."""
    return p * (1 - theta) / (p + theta * (1 - 2 * p))


def spread(slots: int, spec: Spec) -> list[int]:
    """Copies [T] for ``slots`` slots: every kind of task (group and team size) gets its share by number of tasks, at
    least one slot; some tasks may get none of their own.

    Raises:
        ValueError: fewer slots than kinds of tasks.
    """
    kinds: dict[tuple[str, int], list[int]] = {}
    for task, info in enumerate(spec.tasks):
        kinds.setdefault((info.group, info.agents), []).append(task)
    if slots < len(kinds):
        names = ", ".join(f"{group} with {agents} agents" for group, agents in kinds)
        raise ValueError(f"slots={slots}, but the tasks are of {len(kinds)} kinds that cannot share one: {names}")
    shares = {kind: slots * len(own) / len(spec.tasks) for kind, own in kinds.items()}
    counts = {kind: max(1, int(share)) for kind, share in shares.items()}
    while (rest := slots - sum(counts.values())) != 0:
        gaps = {kind: shares[kind] - count for kind, count in counts.items() if rest > 0 or count > 1}
        counts[max(gaps, key=gaps.__getitem__) if rest > 0 else min(gaps, key=gaps.__getitem__)] += int(np.sign(rest))
    copies = [0] * len(spec.tasks)
    for kind, own in kinds.items():
        for i, task in enumerate(own):
            copies[task] = counts[kind] // len(own) + (i < counts[kind] % len(own))
    return copies
