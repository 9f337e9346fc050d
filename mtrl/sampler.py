"""Which task a slot plays next, so that many tasks can share fewer slots, and time goes where something is learned.

All samplers but ``pinned`` choose among the tasks of the slot's group and team size; a share ``floor`` of the choice
stays uniform, and every task is played ``warmup`` times first. What they know of a task is its training success (its
score between 0 and 1 where it reports none); evaluation never feeds them.

- ``pinned``: every slot keeps its task; equal *steps* per task. The default.
- ``round_robin``: equal *episodes* per task. ``uniform``; ``weighted``: the fixed ``weights`` alone.
- ``success_balanced``: in proportion to 1 - p, the failures.
- ``learnability``: in proportion to p (1 - p) (Rutherford et al. 2024, https://arxiv.org/abs/2408.15099).
- ``learning_progress``: after Kanitscheider et al. 2021 (https://arxiv.org/abs/2106.14876), in the form of
  RyanNavillus/Syllabus, but a task without episodes in an interval keeps its estimate.
- ``exp3``: the adversarial bandit of Auer et al. 2002; the pay is the change of the task's score.
- ``alp``: in proportion to absolute learning progress, |score - the task's previous score| averaged (Portelas et al.
  2019, https://arxiv.org/abs/1910.07224). There it feeds a Gaussian mixture over *continuous* task parameters
  (ALP-GMM); in a list of tasks the nearest earlier task is the task itself, each is a component of its own, and this
  remains.
  Single episodes are noisy: where scores are 0 or 1 and the policy stands still, its mean is 2 p (1 - p), that is
  ``learnability``. ``learning_progress`` compares averages instead.
- ``plr``: prioritised replay of levels, that is of (task, seed); see ``mtrl.levels``. The share ``floor`` plays new
  seeds. Needs an agent that tells its value errors (``ppo``).

``weights`` multiply what all of these but ``round_robin`` find, before ``floor``; and with ``slots`` they decide how
many slots each kind of task gets, since tasks of different kinds (group, team size) never share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from mtrl.levels import Levels
from mtrl.registry import UnknownNameError
from mtrl.replay import rng_state, set_rng_state
from mtrl.types import Agent, Array, Assignment, Episode, Spec
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
        "alp",
        "plr",
    ] = "pinned"
    floor: float = Field(default=0.25, ge=0, le=1, description="share of the choice that stays uniform")
    warmup: int = Field(default=1, ge=0, description="episodes of every task before its results decide")
    interval: PositiveInt = Field(default=50, description="episodes between estimates of learning_progress")
    levels: PositiveInt = Field(default=100, description="seeds of each task that plr keeps")
    weights: dict[str, PositiveFloat] = Field(
        default={},
        description="by task, part of the suite ('minigrid/mt3') or pattern of tasks ('minigrid/*'); 1 if not named",
    )

    @model_validator(mode="after")
    def _weights_count(self) -> SamplerConfig:
        if self.weights and self.kind in ("pinned", "round_robin"):
            hint = "set sampler.kind to one that draws, or ask for copies in the suite, as in 'minigrid/mt3*4'"
            raise ValueError(f"weights do not count for {self.kind}: {hint}")
        return self


class Sampled:
    """A ``Schedule`` that draws each slot's next task; seeds are those of the default schedule.

    Args:
        config: of any kind but ``pinned``.
        spec: all tasks.
        slot_tasks: what each slot would play if it were pinned; its task's group and team size bind the choice.
        seed: the run seed.
        parts: [T], the part of the mix that each task is from, for ``weights``.

    Raises:
        ValueError: ``pinned``, which is no choice.
        UnknownNameError: ``weights`` names no task.
    """

    def __init__(
        self, config: SamplerConfig, spec: Spec, slot_tasks: Sequence[int], seed: int, parts: Sequence[str] = ()
    ) -> None:
        if config.kind == "pinned":
            raise ValueError("pinned slots need no sampler: leave the vector's schedule out")
        self.config, self._spec, self._seed = config, spec, seed
        kinds = [(task.group, task.agents) for task in spec.tasks]
        self._rivals = np.array([[one == other for one in kinds] for other in kinds])  # [T, T]: may share a slot
        self._home = tuple(slot_tasks)
        self._rng = np.random.default_rng(np.random.SeedSequence((seed, 0x5A3)))
        self._fixed = task_weights(config.weights, spec, parts)
        tasks = len(spec.tasks)
        self.drawn = np.zeros(tasks, np.int64)
        """Episodes of each task that were scheduled so far."""
        self._last = np.zeros(tasks, np.int64)  # when each task was drawn last, for ties of round_robin
        self._played = np.zeros(tasks, np.int64)
        self._success, self._score = np.zeros(tasks), np.zeros(tasks)  # moving averages
        self._told = np.zeros(tasks, bool)  # whether a task ever gave a success signal; some do with success only
        self._progress = Progress(tasks)
        self._interval = np.zeros((2, tasks))  # successes and episodes since the last estimate
        self._gain = np.zeros(tasks)  # exp3's log weights
        # exp3: the probability with which each task was last drawn
        self._odds = 1 / self._rivals.sum(axis=1)
        self._latest, self._change = np.zeros(tasks), np.zeros(tasks)  # alp: the last score, and the mean change
        self._levels: Levels | None = None
        if config.kind == "plr":
            agents = np.array([spec.tasks[task].agents for task in slot_tasks])
            rows = [slice(stop - n, stop) for n, stop in zip(agents, agents.cumsum(), strict=True)]
            widths = np.array([abs(task.score[1] - task.score[0]) for task in spec.tasks])
            self._levels = Levels(widths, rows, config.levels)

    def assign(self, slot: int, index: int) -> Assignment:
        """Draw the slot's ``index``-th episode."""
        allowed = self._rivals[self._home[slot]]
        probs = self.probs(allowed)
        unseen, again = allowed & (self.drawn < self.config.warmup), None
        if self.config.kind == "round_robin" or unseen.any():
            rank = np.where(unseen if unseen.any() else allowed, self.drawn, np.iinfo(np.int64).max)
            task = int(np.lexsort((self._last, rank))[0])
        else:
            task = int(self._rng.choice(len(probs), p=probs))
            again = self._again(task, allowed, probs)
        self.drawn[task] += 1
        self._last[task] = self.drawn.sum()
        self._odds[task] = probs[task]
        return Assignment(task, episode_seed(self._seed, slot, index) if again is None else again)

    def probs(self, allowed: Array | None = None) -> Array:
        """Probabilities [T], summing to 1 over the tasks ``allowed`` [T] bool (default: all)."""
        allowed = np.ones(len(self.drawn), bool) if allowed is None else allowed
        weights = np.where(allowed, self._fixed * self._weights(allowed), 0.0)
        even = allowed / allowed.sum()
        if not weights.sum() > 0:
            return even
        return (1 - self.config.floor) * weights / weights.sum() + self.config.floor * even

    def update(self, episode: Episode) -> None:
        """Learn from a finished training episode."""
        task, info = episode.task, self._spec.tasks[episode.task]
        low, high = info.score
        score = min(max((episode.ret - low) / (high - low), 0.0), 1.0)
        self._told[task] |= episode.success is not None
        success = float(bool(episode.success)) if self._told[task] else score
        rate = max(RATE, 1 / (1 + self._played[task]))  # a plain mean at first
        before = self._score[task]
        if self._played[task]:
            change = abs(score - self._latest[task])
            self._change[task] += max(RATE, 1 / self._played[task]) * (change - self._change[task])
        self._latest[task] = score
        if self._levels is not None:
            self._levels.finished(episode)
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

    def learned(self, agent: Agent) -> None:
        """After an update that learned: take in the agent's value errors, if the sampler asks for them."""
        if self._levels is not None:
            self._levels.learned(vars(agent)["errors"])

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
            "levels": None if self._levels is None else self._levels.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        set_rng_state(self._rng, state["rng"])
        for name, array in self._arrays().items():
            array[...] = state["arrays"].get(name, array)  # checkpoints of before know no ``told``
        if self._levels is not None:
            self._levels.load_state_dict(state["levels"])

    def _arrays(self) -> dict[str, Array]:
        own = (
            "drawn",
            "_told",
            "_last",
            "_played",
            "_success",
            "_score",
            "_interval",
            "_gain",
            "_odds",
            "_latest",
            "_change",
        )
        found = {name.strip("_"): getattr(self, name) for name in own}
        return found | {f"progress_{name}": getattr(self._progress, name) for name in Progress.ARRAYS}

    def _again(self, task: int, allowed: Array, probs: Array) -> int | None:
        """plr: the seed to replay on ``task``, which was drawn with ``probs`` [T]; None for a new one."""
        if self._levels is None:
            return None
        self._levels.clock += 1
        own = self._levels.probs(allowed)[task]
        fresh = self.config.floor / allowed.sum()
        if not own.any() or self._rng.random() * probs[task] < fresh:
            return None
        return self._levels.draw(task, own, self._rng)

    def _weights(self, allowed: Array) -> Array:
        kind, p = self.config.kind, self._success
        if kind == "success_balanced":
            return 1 - p
        if kind == "learnability":
            return p * (1 - p)
        if kind == "learning_progress":
            return self._progress.weights(allowed)
        if kind == "exp3":
            return np.exp(self._gain - self._gain[allowed].max())
        if kind == "alp":
            return self._change
        if self._levels is not None:
            return self._levels.probs(allowed).sum(axis=1)
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


def task_weights(weights: Mapping[str, float], spec: Spec, parts: Sequence[str] = ()) -> Array:
    """[T]: the weight of each task; 1 if none is given.

    Args:
        weights: by task name, by part of the mix, or by pattern of task names (``*``, ``?``, ``[...]``). A name counts
            before a part, a part before a pattern; of several patterns the last one.
        parts: [T], the part that each task is from.

    Raises:
        UnknownNameError: a key that is none of these.
    """
    names = [task.name for task in spec.tasks]
    found = np.ones(len(names))
    rank = {**dict.fromkeys(parts, 1), **dict.fromkeys(names, 2)}
    for key in sorted(weights, key=lambda key: rank.get(key, 0)):
        own = names if rank.get(key, 0) != 1 else parts
        chosen = [key == name if key in rank else fnmatchcase(name, key) for name in own]
        if not any(chosen):
            hint = "- or name a part of the suite, or a pattern such as 'minigrid/*'"
            raise UnknownNameError("task in sampler.weights", key, [*names, *parts], hint)
        found[chosen] = weights[key]
    return found


def spread(slots: int, spec: Spec, weights: Array | None = None) -> list[int]:
    """Copies [T] for ``slots`` slots: every kind of task (group and team size) gets its share by the ``weights`` [T] of
    its tasks (default: equal), at least one slot; some tasks may get none of their own.

    Raises:
        ValueError: fewer slots than kinds of tasks.
    """
    kinds: dict[tuple[str, int], list[int]] = {}
    for task, info in enumerate(spec.tasks):
        kinds.setdefault((info.group, info.agents), []).append(task)
    if slots < len(kinds):
        names = ", ".join(f"{group} with {agents} agents" for group, agents in kinds)
        raise ValueError(f"slots={slots}, but the tasks are of {len(kinds)} kinds that cannot share one: {names}")
    weights = np.ones(len(spec.tasks)) if weights is None else weights
    shares = {kind: float(slots * weights[own].sum() / weights.sum()) for kind, own in kinds.items()}
    counts = {kind: max(1, int(share)) for kind, share in shares.items()}
    while (rest := slots - sum(counts.values())) != 0:
        gaps = {kind: shares[kind] - count for kind, count in counts.items() if rest > 0 or count > 1}
        counts[max(gaps, key=gaps.__getitem__) if rest > 0 else min(gaps, key=gaps.__getitem__)] += int(np.sign(rest))
    copies = [0] * len(spec.tasks)
    for kind, own in kinds.items():
        for i, task in enumerate(own):
            copies[task] = counts[kind] // len(own) + (i < counts[kind] % len(own))
    return copies
