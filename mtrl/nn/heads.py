"""Heads: layers with one set of weights per task, action distributions and action values per group, values per task."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from torch import Tensor, nn

from mtrl.nn.experts import ExpertConv, ExpertLinear
from mtrl.nn.perception import ACTIVATIONS
from mtrl.types import Group


class TaskRows(NamedTuple):
    """Rows brought together by task: ``order`` sorts them, ``back`` undoes it (both None if they were sorted already);
    ``counts[t]`` rows belong to task t."""

    order: Tensor | None
    back: Tensor | None
    counts: tuple[int, ...]

    @classmethod
    def of(cls, task: Tensor, num_tasks: int) -> TaskRows:
        """Sort ``task`` [n] int64 (ids below ``num_tasks``), stably."""
        if task.device.type == "cpu":
            return cls._sort(task, num_tasks)
        # Reading a GPU's tensor waits for all that the GPU was asked to do: once per tensor, however many layers ask.
        seen = (task._version, num_tasks)
        known, rows = getattr(task, "_task_rows", (None, None))
        if rows is None or known != seen:
            order, back, counts = cls._sort(task.cpu(), num_tasks)
            if order is not None and back is not None:
                order, back = order.to(task.device), back.to(task.device)
            rows = cls(order, back, counts)
            task._task_rows = seen, rows  # type: ignore[attr-defined] # lives as long as the tensor
        return rows

    def sort(self, x: Tensor) -> Tensor:
        """x [n, ...] in this order."""
        return x if self.order is None else x[self.order]

    @classmethod
    def _sort(cls, task: Tensor, num_tasks: int) -> TaskRows:
        counts = tuple(torch.bincount(task, minlength=num_tasks).tolist())
        if len(counts) > num_tasks:
            raise IndexError(f"task id {len(counts) - 1} is out of range: the layer has {num_tasks} tasks")
        if bool((task[1:] >= task[:-1]).all()):
            return cls(None, None, counts)
        order = torch.argsort(task, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return cls(order, back, counts)


def look_up(table: Tensor, task: Tensor, rows: slice = slice(None)) -> Tensor:
    """``table[task[rows]]``; on a GPU the same tensor again while ``task`` does not change: ``TaskRows`` knows it."""
    if task.device.type == "cpu":
        return table[task[rows]]
    found = getattr(task, "_looked_up", {})
    place = id(table), rows.start, rows.stop
    known, version, result = found.get(place, (None, None, None))
    if known is not table or version != task._version:
        result = table[task[rows]]
        task._looked_up = {**found, place: (table, task._version, result)}  # type: ignore[attr-defined]
    return result


class Shared(NamedTuple):
    """Rows [n, W + H] that begin alike: row i is ``start[place[i]]`` [W], then ``rest[i]`` [H]; ``task`` [u] of each
    start. What a layer says of a start is computed once, and rows are never written out."""

    start: Tensor
    task: Tensor
    place: Tensor
    rest: Tensor

    def renamed(self, ids: Tensor) -> Shared:
        """The same rows where task t is called ``ids[t]``."""
        return self._replace(task=ids[self.task])

    def beside(self, place: Tensor, more: Tensor) -> Shared:
        """Rows ``place`` [m] of these, and ``more`` [m, a] behind them."""
        return self._replace(place=self.place[place], rest=torch.cat((self.rest[place], more), 1))


class TaskLinear(nn.Module):
    """One linear layer per task: weight [T, in, out], bias [T, out].

    Rows of a task are multiplied with its matrix as one contiguous slice; a row never gathers weights of its own.
    """

    def __init__(self, num_tasks: int, inner: int, outer: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        bound = 1 / math.sqrt(inner)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(num_tasks, inner, outer).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_tasks, outer).uniform_(-bound, bound))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """Rows x [n, in] of tasks [n] int64 -> [n, out]."""
        rows = TaskRows.of(task, self.num_tasks)
        out = self.sorted(rows.sort(x), rows.counts)
        return out if rows.back is None else out[rows.back]

    def sorted(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        """As ``forward`` for rows that are sorted by task, ``counts[t]`` of task t."""
        return task_linear(x, self.weight, self.bias, counts)

    def shared(self, x: Shared, rows: TaskRows) -> Tensor:
        """What it says of x, sorted as ``rows`` are."""
        start, rest = self.weight.split((x.start.shape[1], x.rest.shape[1]), 1)
        own = TaskRows.of(x.task, self.num_tasks)
        begun = task_linear(own.sort(x.start), start, self.bias, own.counts)
        place = x.place if own.back is None else own.back[x.place]
        none = torch.zeros_like(self.bias)
        return F.embedding(rows.sort(place), begun) + task_linear(rows.sort(x.rest), rest, none, rows.counts)


def task_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Rows x [n, in] sorted by task, ``counts[t]`` of task t, times weight [T, in, out] plus bias [T, out]."""
    if len(set(counts)) == 1:  # equal shares: one batched product
        batch = x.view(len(weight), counts[0], x.shape[1])
        return torch.baddbmm(bias[:, None], batch, weight).flatten(0, 1)
    # unbind: its backward is one stack, where indexing weight[t] would write a full-size gradient per task.
    parts = zip(x.split(counts), weight.unbind(0), bias.unbind(0), strict=True)
    return torch.cat([torch.addmm(b, part, w) for part, w, b in parts if len(part)])


class TaskMLP(nn.Module):
    """An MLP per task; rows are sorted once for all layers. The last layer is linear.

    The result is at least float32, also where autocast multiplies in bfloat16: it is summed, exponentiated and stored.
    """

    def __init__(self, num_tasks: int, sizes: tuple[int, ...], activation: str = "tanh") -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.layers = nn.ModuleList(TaskLinear(num_tasks, a, b) for a, b in itertools.pairwise(sizes))
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor | Shared, task: Tensor) -> Tensor:
        """Rows x [n, sizes[0]] of tasks [n] int64 -> [n, sizes[-1]]."""
        rows = TaskRows.of(task, self.num_tasks)
        first, *others = cast(Iterable[TaskLinear], self.layers)
        x = first.shared(x, rows) if isinstance(x, Shared) else first.sorted(rows.sort(x), rows.counts)
        for layer in others:
            x = layer.sorted(self.activation(x), rows.counts)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x if rows.back is None else x[rows.back]


class Distribution(Protocol):
    """A batch of n action distributions."""

    def sample(self, generator: torch.Generator) -> Tensor: ...
    def mode(self) -> Tensor: ...
    def log_prob(self, action: Tensor) -> Tensor: ...
    def entropy(self) -> Tensor: ...
    def take(self, rows: Tensor) -> Distribution: ...


class Categorical:
    """Discrete actions [n] int64 from logits [n, A]; where ``legal`` [n, A] is false the probability is exactly 0.

    A row without any legal action (a dead one) is treated as if all were legal: its result is masked elsewhere.
    """

    def __init__(self, logits: Tensor, legal: Tensor | None = None) -> None:
        if legal is not None:
            legal = legal | ~legal.any(1, keepdim=True)
            logits = logits.masked_fill(~legal, -torch.inf)
        self.log_probs = torch.log_softmax(logits, 1)
        self.legal = legal

    def sample(self, generator: torch.Generator) -> Tensor:
        # Gumbel-max in exponential form; an illegal action has probability 0 and never wins.
        noise = torch.empty_like(self.log_probs).exponential_(generator=generator)
        return (self.log_probs.exp() / noise.clamp_(min=torch.finfo(noise.dtype).tiny)).argmax(1)

    def mode(self) -> Tensor:
        return self.log_probs.argmax(1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.log_probs.gather(1, action[:, None])[:, 0]

    def entropy(self) -> Tensor:
        # Illegal entries become 0 * 0: both the value and the gradient stay finite.
        safe = self.log_probs if self.legal is None else self.log_probs.masked_fill(~self.legal, 0.0)
        prob = safe.exp() if self.legal is None else safe.exp() * self.legal
        return -(prob * safe).sum(1)

    def take(self, rows: Tensor) -> Categorical:
        """The distributions of these rows [m]; a row may come more than once."""
        taken = copy.copy(self)
        taken.log_probs = self.log_probs[rows]
        taken.legal = None if self.legal is None else self.legal[rows]
        return taken


class Gaussian:
    """Independent normals [n, a] with mean and log standard deviation [n, a]."""

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean, self.log_std = mean, log_std

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.mean + self.log_std.exp() * torch.empty_like(self.mean).normal_(generator=generator)

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * (1 + math.log(2 * math.pi))).sum(1)

    def take(self, rows: Tensor) -> Gaussian:
        """The distributions of these rows [m]; a row may come more than once."""
        return Gaussian(self.mean[rows], self.log_std[rows])


def to_bounds(unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Numbers in [-1, 1] to [low, high], which rounding does not step over."""
    return torch.clamp(low + (unit + 1) * 0.5 * (high - low), low, high)


class ActionHead(nn.Module):
    """Action distribution of one group.

    Discrete: a (masked) categorical. Box: a diagonal Gaussian with a learned, state-independent deviation per task. It
    lives in units where the bounds are -1 and 1; ``to_env`` clips to them and rescales, and log-probabilities are those
    of the unclipped sample (as in CleanRL and Stable-Baselines3).

    Args:
        group: whose actions.
        inner: width of the features.
        hidden: layers between features and output.
        per_task: one set of weights per task of the group, or one for all.
    """

    low: Tensor
    high: Tensor
    local: Tensor

    def __init__(
        self, group: Group, inner: int, hidden: tuple[int, ...] = (), *, per_task: bool, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.discrete = isinstance(group.action, Discrete)
        out = int(group.action.n) if isinstance(group.action, Discrete) else int(np.prod(group.action.shape))
        heads = len(group.tasks) if per_task else 1
        self.net = TaskMLP(heads, (inner, *hidden, out), activation)
        self.register_buffer("local", _local(group, per_task), persistent=False)
        if not isinstance(group.action, Discrete):
            self.log_std = nn.Parameter(torch.zeros(heads, out))
            self.register_buffer("low", torch.as_tensor(group.action.low, dtype=torch.float32), persistent=False)
            self.register_buffer("high", torch.as_tensor(group.action.high, dtype=torch.float32), persistent=False)

    def forward(self, features: Tensor | Shared, task: Tensor, legal: Tensor | None = None) -> Categorical | Gaussian:
        """Features [n, inner], global task ids [n], legal actions [n, A] or None -> n distributions."""
        head = look_up(self.local, task)
        features = features.renamed(self.local) if isinstance(features, Shared) else features
        out = self.net(features, head)
        return Categorical(out, legal) if self.discrete else Gaussian(out, self.log_std[head])

    def to_env(self, action: Tensor) -> Tensor:
        """A sample as the environment wants it: ids unchanged, numbers clipped to [-1, 1] and mapped to the bounds."""
        if self.discrete:
            return action
        return to_bounds(action.clamp(-1, 1), self.low, self.high)


class ValueHead(nn.Module):
    """Values [n] of any task: one set of weights per task, or one for all."""

    def __init__(
        self, num_tasks: int, inner: int, hidden: tuple[int, ...] = (), *, per_task: bool, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.per_task = per_task
        self.net = TaskMLP(num_tasks if per_task else 1, (inner, *hidden, 1), activation)

    def forward(self, features: Tensor | Shared, task: Tensor) -> Tensor:
        """Features [n, inner], task ids [n] -> values [n]."""
        if not self.per_task:
            task = torch.zeros_like(task)
            features = features._replace(task=0 * features.task) if isinstance(features, Shared) else features
        return self.net(features, task)[:, 0]


class ActionValueHead(nn.Module):
    """What to expect after an action of one group; arguments as for ``ActionHead``.

    The features say it of all Discrete actions at once; a Box action, in units where the bounds are -1 and 1, is read
    beside them.
    """

    local: Tensor

    def __init__(
        self, group: Group, inner: int, hidden: tuple[int, ...] = (), *, per_task: bool, activation: str = "tanh"
    ) -> None:
        super().__init__()
        if isinstance(group.action, Discrete):
            self.read, out = 0, int(group.action.n)
        else:
            self.read, out = int(np.prod(group.action.shape)), 1
        self.net = TaskMLP(len(group.tasks) if per_task else 1, (inner + self.read, *hidden, out), activation)
        self.register_buffer("local", _local(group, per_task), persistent=False)

    def forward(self, features: Tensor | Shared, task: Tensor, place: Tensor, action: Tensor) -> Tensor:
        """Features [u, inner] and global task ids [u]; for n actions, [n] or [n, a], the rows [n] of features that they
        were taken at -> [n]."""
        head = self.local[task]
        features = features.renamed(self.local) if isinstance(features, Shared) else features
        if self.read:
            unit = action.clamp(-1, 1)
            shared = isinstance(features, Shared)
            x = features.beside(place, unit) if shared else torch.cat((features[place], unit), 1)
            return self.net(x, head[place])[:, 0]
        return self.net(features, head)[place, action]


def _local(group: Group, per_task: bool) -> Tensor:
    """The set of weights of every task id."""
    local = torch.zeros(max(group.tasks) + 1, dtype=torch.int64)
    if per_task:
        local[list(group.tasks)] = torch.arange(len(group.tasks))
    return local


def orthogonal_(module: nn.Module, gain: float) -> None:
    """Orthogonal weights of this gain and zero biases in every layer below ``module``, per task and per expert.

    Orthogonal initialisation is detail 2 of https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | TaskLinear | ExpertLinear | ExpertConv):
            stacked = isinstance(part, TaskLinear | ExpertLinear | ExpertConv)
            with torch.no_grad():
                for weight in part.weight if stacked else (part.weight,):
                    weight.copy_(nn.init.orthogonal_(torch.empty(weight.shape), gain))  # weights may be channels last
                if part.bias is not None:
                    part.bias.zero_()
