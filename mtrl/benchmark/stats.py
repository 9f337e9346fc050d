"""Statistics of few runs over many tasks: point estimates, stratified bootstrap intervals, profiles, comparisons.

After Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021
(https://arxiv.org/abs/2108.13264), whose library rliable is the tests' oracle. Scores are float arrays
[..., N runs, M tasks], normalised so that 0 is a random policy and 1 the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mtrl.types import Array

Statistic = Callable[[Array], Array]
"""Maps scores [..., N, M] to values [...]."""

DRAWS = 50_000  # bootstrap replications for intervals of point estimates and comparisons; the paper compares by 2,000
PROFILE_DRAWS = 2_000  # for curves and profiles, whose every point has an interval of its own, as in the paper
FEW_RUNS = 5  # below this an interval is too narrow to be trusted
_CHUNK = 1 << 17  # resampled scores held at once: they stay in the cache


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its 95 % percentile interval; the three are equal where there is nothing to resample."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


def iqm(scores: Array) -> Array:
    """Interquartile mean [...]: the mean of the middle half of all N x M scores, k = floor(NM / 4) cut at each end."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def mean(scores: Array) -> Array:
    """Mean over runs and tasks [...]."""
    return scores.mean((-2, -1))


def median(scores: Array) -> Array:
    """Median over tasks of the mean over runs [...]."""
    return np.median(scores.mean(-2), axis=-1)


def optimality_gap(scores: Array) -> Array:
    """How far runs fall short of the reference on average [...]: 1 - mean(min(score, 1)). Lower is better."""
    return 1.0 - np.minimum(scores, 1.0).mean((-2, -1))


STATISTICS: dict[str, Statistic] = {"IQM": iqm, "median": median, "mean": mean, "optimality gap": optimality_gap}


def bootstrap(scores: Array, statistic: Statistic, draws: int = DRAWS, seed: int = 0) -> Array:
    """Stratified bootstrap: the statistic [draws, ...] of ``draws`` resamples of the runs, for each task separately.

    Args:
        scores: [N, M].
        statistic: gets resamples [b, N, M] and returns [b, ...].
    """
    return np.concatenate([statistic(sample) for sample in _resamples(_checked(scores), draws, seed)])


def estimate(scores: Array, statistic: Statistic = iqm, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """A statistic of scores [N, M] with its 95 % interval."""
    scores = _checked(scores)
    value = float(statistic(scores))
    low, high = np.percentile(bootstrap(scores, statistic, draws, seed), [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def estimates(scores: Array, draws: int = DRAWS, seed: int = 0) -> dict[str, Estimate]:
    """All ``STATISTICS`` of scores [N, M], from the same resamples."""
    scores = _checked(scores)

    def all_of_them(sample: Array) -> Array:
        return np.stack([statistic(sample) for statistic in STATISTICS.values()], axis=-1)

    low, high = np.percentile(bootstrap(scores, all_of_them, draws, seed), [2.5, 97.5], axis=0)
    found = zip(STATISTICS, all_of_them(scores), low, high, strict=True)
    return {name: Estimate(float(value), float(a), float(b)) for name, value, a, b in found}


def profile(scores: Array, taus: Array, draws: int = PROFILE_DRAWS, seed: int = 0) -> tuple[Array, Array, Array]:
    """Performance profile: the share of the N x M scores that exceed each tau (strictly), with pointwise intervals.

    Args:
        scores: [N, M].
        taus: [T].

    Returns:
        share, lower end, upper end: [T] each.
    """
    scores = _checked(scores)
    above = (scores.T[:, :, None] > np.asarray(taus, float)).reshape(scores.size, -1).astype(np.float32)  # [M N, T]
    runs, tasks = scores.shape
    weights = _weights(runs, tasks, draws, seed).transpose(1, 0, 2).reshape(draws, -1)
    low, high = np.percentile((weights @ above).astype(float) / scores.size, [2.5, 97.5], axis=0)
    return above.mean(0, dtype=float), low, high


def improvement(ours: Array, theirs: Array, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Probability of improvement P(ours > theirs): a run of ours beats a run of theirs on a task, averaged over tasks.

    Ties count half. An improvement is claimed only when the lower end exceeds one half: by more draws than the paper's
    2,000, which leave the ends uncertain by .01.

    Args:
        ours: [N, M].
        theirs: [K, M], the same tasks.
    """
    ours, theirs = _checked(ours), _checked(theirs)
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} tasks against {theirs.shape[1]}: compare agents on the same tasks")
    wins = np.sign(ours.T[:, :, None] - theirs.T[:, None, :]) / 2 + 0.5  # [M, N, K]
    tasks, n, k = wins.shape
    left, right = _weights(n, tasks, draws, seed), _weights(k, tasks, draws, seed + 1)
    values = ((left @ wins.astype(np.float32)) * right).sum((0, 2)).astype(float) / (n * k * tasks)
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(float(wins.mean()), float(low), float(high))


def distinct_resamples(runs: int) -> int:
    """How many different resamples of one task's runs there are: few of them make an interval too narrow."""
    return math.comb(2 * runs - 1, runs)


@lru_cache(maxsize=4)  # many pairs of agents have the same shape
def _weights(runs: int, tasks: int, draws: int, seed: int) -> Array:
    """How often each run is drawn in stratified resamples [tasks, draws, runs]: all that linear statistics need.

    In float32, where sums of such counts and of halves are exact.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(runs, np.full(runs, 1 / runs), size=(tasks, draws)).astype(np.float32)
    weights.setflags(write=False)
    return weights


def _resamples(scores: Array, draws: int, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    runs, tasks = scores.shape
    flat = np.ascontiguousarray(scores).ravel()
    columns = np.arange(tasks)
    chunk = max(1, _CHUNK // scores.size)
    for start in range(0, draws, chunk):
        picks = rng.integers(runs, size=(min(chunk, draws - start), runs, tasks))
        picks *= tasks
        picks += columns
        yield flat[picks]


def _checked(scores: Array) -> Array:
    found = np.asarray(scores, float)
    if found.ndim != 2 or not found.size:
        raise ValueError(f"scores must be [runs, tasks] with at least one of each, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError("scores must be finite: leave out runs that did not finish")
    return found
