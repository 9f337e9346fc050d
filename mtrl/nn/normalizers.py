"""Running statistics that bring tasks to one scale, in plain numpy float64: they are read a few times per update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtrl.types import Array, Step


class TaskMoments:
    """Running mean and deviation per task, of value targets for instance.

    MAPPO's value normalisation (https://arxiv.org/abs/2103.01955; marlbenchmark/on-policy, ``ValueNorm``) with one set
    of statistics per task: exponential averages of x and x^2, debiased, the variance floored. A task without data has
    mean 0 and deviation 1.

    Args:
        num_tasks: T.
        decay: weight that the past keeps at each update.
        floor: least variance.
    """

    def __init__(self, num_tasks: int, *, decay: float = 0.99, floor: float = 1e-2) -> None:
        self.decay, self.floor = decay, floor
        self._first = np.zeros(num_tasks)
        self._second = np.zeros(num_tasks)
        self._weight = np.zeros(num_tasks)

    @property
    def mean(self) -> Array:
        """[T] float64."""
        return self._first / np.where(self._weight > 0, self._weight, 1.0)

    @property
    def std(self) -> Array:
        """[T] float64, positive."""
        seen = self._weight > 0
        variance = self._second / np.where(seen, self._weight, 1.0) - self.mean**2
        return np.where(seen, np.sqrt(np.maximum(variance, self.floor)), 1.0)

    def update(self, x: Array, task: Array) -> None:
        """Take in x [n] of tasks [n]; every task that occurs moves by one step, however many rows it has."""
        count = np.bincount(task, minlength=len(self._weight))
        seen = count > 0
        share = np.maximum(count, 1)
        keep = np.where(seen, self.decay, 1.0)
        self._first = keep * self._first + (1 - keep) * np.bincount(task, x, len(count)) / share
        self._second = keep * self._second + (1 - keep) * np.bincount(task, x**2, len(count)) / share
        self._weight = keep * self._weight + (1 - keep)

    def normalize(self, x: Array, task: Array) -> Array:
        """(x - mean) / deviation of each entry's task."""
        return (x - self.mean[task]) / self.std[task]

    def denormalize(self, x: Array, task: Array) -> Array:
        """The inverse of ``normalize``."""
        return x * self.std[task] + self.mean[task]

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first.copy(), "second": self._second.copy(), "weight": self._weight.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first, self._second, self._weight = (np.array(state[key]) for key in ("first", "second", "weight"))


class MaxReturnScale:
    """Divides each task's rewards so that its returns fit into [-v_max, v_max].

    The scale of BRC (Nauman et al. 2025, https://github.com/naumix/BiggerRegularizedCategorical): with m the largest
    absolute discounted return-to-go seen in any finished episode of the task, rewards are divided by
    d = (m + alpha * |target entropy| / (2 * (1 - gamma))) / v_max; the alpha term leaves room for the entropy bonus.
    The return is bootstrapped with 0 after a termination and with mean reward / (1 - gamma) after a truncation.
    d is 1 until the first episode with a non-zero reward has ended, and its m never falls.
    """

    def __init__(self, num_tasks: int, gamma: float, v_max: float = 10.0) -> None:
        self.gamma, self.v_max = gamma, v_max
        self.largest = np.zeros(num_tasks)
        self._running: list[list[float]] = []

    def observe(self, step: Step) -> None:
        """Take in one transition of every row; always the rows of one and the same vector."""
        self._running = self._running or [[] for _ in step.reward]
        ended = step.terminated | step.truncated
        rewards = step.reward.tolist()
        for row in np.flatnonzero(step.active).tolist():
            self._running[row].append(rewards[row])
        for row in np.flatnonzero(ended & step.active).tolist():
            episode, self._running[row] = self._running[row], []
            value = 0.0 if step.terminated[row] else sum(episode) / len(episode) / (1 - self.gamma)
            largest = 0.0
            for reward in reversed(episode):
                value = reward + self.gamma * value
                largest = max(largest, abs(value))
            task = int(step.obs.task[row])
            self.largest[task] = max(self.largest[task], largest)

    def divisors(self, alpha: Array, target_entropy: Array) -> Array:
        """d [T] for temperatures [T] and target entropies [T]."""
        room = alpha * np.abs(target_entropy) / (2 * (1 - self.gamma))
        return np.where(self.largest > 0, (self.largest + room) / self.v_max, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self.largest.copy(), "running": [np.asarray(row) for row in self._running]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.largest = np.array(state["largest"])
        self._running = [np.asarray(row).tolist() for row in state["running"]]


class MeanRewardScale:
    """Multiplies each task's rewards so that their mean size is that of the most rewarding task.

    The scale of ARS (Cho et al., ICML 2025): c_k = max_j m_j / m_k, with m the mean absolute reward so far (the paper's
    mean reward, made safe for signs), at most ``largest``; tasks without any reward keep c = 1. It is recomputed only
    now and then, so that targets stand still in between; the paper recomputes when it resets its networks.

    Args:
        num_tasks: T.
        every: vector steps between recomputations.
        largest: bound of c.
    """

    def __init__(self, num_tasks: int, *, every: int = 10_000, largest: float = 1e3) -> None:
        self.every, self.largest = every, largest
        self.total, self.count = np.zeros(num_tasks), np.zeros(num_tasks)
        self.steps = 0
        self._divisors = np.ones(num_tasks)

    def observe(self, step: Step) -> None:
        """Take in one transition of every row."""
        task, active = step.obs.task, step.active
        self.total += np.bincount(task[active], np.abs(step.reward[active]), len(self.total))
        self.count += np.bincount(task[active], minlength=len(self.count))
        self.steps += 1
        if self.steps % self.every == 0:
            self.refresh()

    def refresh(self) -> None:
        """Compute the scale anew from all rewards so far."""
        mean = self.total / np.maximum(self.count, 1)
        seen = mean > 0
        largest = mean.max(initial=0.0)
        ratio = np.where(seen, mean, largest) / (largest or 1.0)
        self._divisors = np.where(seen, np.maximum(ratio, 1 / self.largest), 1.0)

    def divisors(self, alpha: Array, target_entropy: Array) -> Array:
        """1 / c [T]; takes what ``MaxReturnScale.divisors`` takes and needs none of it."""
        return self._divisors

    def state_dict(self) -> dict[str, Any]:
        arrays = {"total": self.total.copy(), "count": self.count.copy(), "divisors": self._divisors.copy()}
        return {**arrays, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.count, self._divisors = (np.array(state[key]) for key in ("total", "count", "divisors"))
        self.steps = int(state["steps"])


@torch.no_grad()
def preserve_outputs_(layer: nn.Module, before: tuple[Array, Array], after: tuple[Array, Array]) -> None:
    """PopArt: change each task's last layer so that its denormalised values stay what they were.

    Van Hasselt et al. 2016 (https://arxiv.org/abs/1602.07714), per task as in Hessel et al. 2019
    (https://arxiv.org/abs/1809.04474): with the value sigma (w f + c) + mu, w <- w sigma / sigma' and
    c <- (sigma c + mu - mu') / sigma'.

    Args:
        layer: a ``TaskLinear`` with weight [T, D, 1] and bias [T, 1].
        before: mean and deviation [T] with which the layer's outputs were denormalised so far.
        after: those from now on.

    Raises:
        ValueError: the tasks share the layer.
    """
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    (mean, std), (new_mean, new_std) = before, after
    if len(weight) != len(mean):
        raise ValueError("PopArt rescales each task's own last layer: choose a trunk with a head per task (multi_head)")

    def column(x: Array) -> Tensor:
        return torch.as_tensor(x, dtype=weight.dtype, device=weight.device)[:, None]

    weight *= column(std / new_std)[:, None]
    bias.mul_(column(std / new_std)).add_(column((mean - new_mean) / new_std))
