"""Networks of on-policy agents: rows of all groups, over time, to action distributions and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.heads import ActionHead, ActionValueHead, Distribution, Shared, ValueHead, orthogonal_
from mtrl.nn.linear import roomy
from mtrl.nn.patches import folding
from mtrl.nn.perception import Perception, PerceptionConfig, to_tensors
from mtrl.nn.trunk import Memory, TrunkConfig, make_trunk
from mtrl.nn.trunk.paco import start_alike_
from mtrl.types import Array, Spec

FEW = 128
"""Fewer rows than this are not searched for repetitions."""

SMALL = 1024
"""Nor are rows of more numbers than this: pictures hardly ever repeat."""

MOST = 0.75
"""Rows are not folded unless this share of them, or less, is left."""


class Rows(NamedTuple):
    """Observations of t steps x n rows: ``leaves[g][leaf]`` [t, n_g, ...]; ``task``, ``first`` [t, n]. The groups' rows
    follow one another in the order of ``leaves``. ``same``: what ``label`` said of them, None if it was not asked."""

    leaves: Mapping[str, Mapping[str, Tensor]]
    task: Tensor
    first: Tensor
    same: Mapping[str, Tensor] | None = None

    def spans(self) -> dict[str, slice]:
        """Each group's columns in ``task`` and ``first``."""
        found, start = {}, 0
        for group, leaves in self.leaves.items():
            found[group] = slice(start, start + next(iter(leaves.values())).shape[1])
            start = found[group].stop
        return found


def to_rows(leaves: Mapping[str, Mapping[str, Array]], task: Array, first: Array, device: torch.device | str) -> Rows:
    """Arrays [t, n, ...] as tensors (no copy on the CPU)."""
    tensors = {group: to_tensors(own, device) for group, own in leaves.items()}
    return Rows(tensors, torch.as_tensor(task, device=device), torch.as_tensor(first, device=device))


Lookup = Callable[[Rows, Callable[[Rows], Tensor]], Tensor]
"""Features of rows, by looking them up or by the function given: see ``mtrl.nn.recall``."""


class Folded(NamedTuple):
    """Rows without repetitions, as one step of u rows sorted by task within each group, and the place [t, n] of every
    original row among them. Each task's may end in a few spare ones, which are nobody's place: see ``roomy``."""

    rows: Rows
    place: Tensor


def label(rows: Rows) -> dict[str, Tensor]:
    """A number per row, [t, n_g] int64: rows of a group with the same one agree in task and in every leaf.

    Groups where looking for repetitions does not pay are left out.
    """
    found: dict[str, Tensor] = {}
    for group, span in rows.spans().items():
        task = rows.task[:, span]
        number = _label({leaf: x.flatten(0, 1) for leaf, x in rows.leaves[group].items()}, task.flatten())
        if number is not None:
            found[group] = number.view(task.shape)
    return found


def fold(rows: Rows) -> Folded | None:
    """Rows that agree in task and in every leaf, once each; None if no group has repetitions worth looking for.

    A grid world shows the same few views again and again: of the 750 rows in a minibatch of PPO on minigrid/mt3 about
    300 differ. What has no memory need not compute the others.
    """
    if not folding():
        return None
    same = label(rows) if rows.same is None else rows.same
    leaves: dict[str, dict[str, Tensor]] = {}
    tasks: list[Tensor] = []
    places: list[Tensor] = []
    total, folded = 0, False
    for group, span in rows.spans().items():
        task = rows.task[:, span]
        flat = {leaf: x.flatten(0, 1) for leaf, x in rows.leaves[group].items()}
        found = _distinct(same[group].flatten(), task.flatten()) if group in same else None
        folded |= found is not None
        picked, place = found or (slice(None), torch.arange(task.numel(), device=task.device))
        leaves[group] = {leaf: x[picked][None] for leaf, x in flat.items()}
        tasks.append(task.flatten()[picked])
        places.append((place + total).view(task.shape))
        total += len(tasks[-1])
    if not folded:
        return None
    task = torch.cat(tasks)[None]
    return Folded(Rows(leaves, task, torch.zeros_like(task, dtype=torch.bool)), torch.cat(places, 1))


def _label(leaves: Mapping[str, Tensor], task: Tensor) -> Tensor | None:
    """A number [n] per row of leaves [n, ...] and task [n]; the same one only for equal rows.

    None where it does not pay: for few rows, pictures or few repetitions, and on a GPU (where the gradient of a gather
    is not deterministic either). Rows are told apart by random fingerprints of their bits, which are then checked.
    """
    n = len(task)
    if n < FEW or task.device.type != "cpu" or sum(x[0].numel() for x in leaves.values()) > SMALL:
        return None
    bits = [x.view(torch.int32) if x.is_floating_point() else x for x in leaves.values()]  # vectors are float32
    flat = torch.cat([task[:, None], *(x.reshape(n, -1).long() for x in bits)], 1)
    weights = torch.empty(flat.shape[1], dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
    number = (flat * weights).sum(1).unique(return_inverse=True)[1]
    first = _first(number)
    return number if len(first) <= MOST * n and torch.equal(flat[first][number], flat) else None


def _distinct(number: Tensor, task: Tensor) -> tuple[Tensor, Tensor] | None:
    """One index [u] per distinct number [n], by task [n], and every row's place [n] among them; None if few repeat.

    Each task's are made ``roomy`` by repeating its last one.
    """
    if len(number) < FEW:
        return None
    place = number.unique(return_inverse=True)[1]
    first = _first(place)
    if len(first) > MOST * len(number):
        return None
    counts = torch.bincount(task[first])
    spare = torch.tensor([roomy(count) - count for count in counts.tolist()])
    last = first[task[first].argsort(stable=True)[counts.cumsum(0) - 1]]
    index = torch.cat((first, last.repeat_interleave(spare)))
    by_task = task[index].argsort(stable=True)
    return index[by_task], torch.empty_like(by_task).scatter_(0, by_task, torch.arange(len(by_task)))[place]


def _first(place: Tensor) -> Tensor:
    """Where each of the numbers 0 to u - 1 in ``place`` [n], n > 0, can be found, [u]."""
    return torch.empty(int(place.max()) + 1, dtype=torch.int64).scatter_(0, place, torch.arange(len(place)))


Features = Tensor | Shared
"""What a body says of t x n rows: [t, n, out], or shared by rows that agree (``place`` [t, n], ``rest`` [t, n, H])."""


def flat(features: Features, span: slice = slice(None)) -> Features:
    """The features of a group's rows, [t * n_g, out]."""
    if isinstance(features, Tensor):
        return features[:, span].flatten(0, 1)
    place = features.place[:, span].flatten()
    # The starts of a group lie together, and each is some row's.
    low, high = (int(place.min()), int(place.max()) + 1) if len(place) else (0, 0)
    own, rest = slice(low, high), features.rest[:, span].flatten(0, 1)
    return Shared(features.start[own], features.task[own], place - low, rest)


class Body(nn.Module):
    """Perception -> trunk -> a memory of width ``memory`` (0: none). ``state``: also read a team's global state.

    What the trunk says goes around the memory, too, and comes first: what can be done without memory is then learned as
    fast as without one.
    """

    def __init__(
        self, spec: Spec, perception: PerceptionConfig, trunk: TrunkConfig, memory: int = 0, *, state: bool = False
    ) -> None:
        super().__init__()
        self.perception = Perception(spec, perception, state=state)
        self.trunk = make_trunk(trunk, self.perception.width, len(spec.tasks), self.perception.view)
        width = int(self.trunk.out)  # type: ignore[arg-type]
        learned = next(chain(self.perception.parameters(), self.trunk.parameters()), None) is not None
        self.memory = Memory(width, memory, learned=learned) if memory else None
        self.out: int = memory + width
        self.per_task = bool(self.trunk.per_task)
        self.whole = bool(getattr(self.trunk, "whole", False))  # its loss counts every row: none may be left out

    def forward(
        self, rows: Rows, state: Tensor | None = None, recall: Lookup | None = None
    ) -> tuple[Features, Tensor | None]:
        """Rows and the memory [n, H] before them -> features [t, n, out] and the memory after them.

        ``recall``: where to look up what the trunk says about rows that came before; without memory, rows are taken as
        they are otherwise (``evaluate`` folds them).
        """
        found = fold(rows) if self.memory is not None and recall is None else None
        unique = rows if found is None else found.rows
        features = self._features(unique) if recall is None else recall(rows, self._features)
        if self.memory is None or state is None:
            return features, None
        features = self.memory.norm(features)
        read = self.memory.read(features)
        if found is not None:
            read = F.embedding(found.place, read[0])  # its gradient costs less than that of indexing
        remembered, state = self.memory(read, rows.first, state)
        remembered = remembered * self.memory.loudness
        if found is None:
            return torch.cat((features, remembered), 2), state
        return Shared(features[0], found.rows.task[0], found.place, remembered), state

    def _features(self, rows: Rows) -> Tensor:
        """What the trunk says about each row by itself, [t, n, D]."""
        t, n = rows.task.shape
        latents = []
        for group, leaves in rows.leaves.items():
            flat = self.perception({leaf: x.flatten(0, 1) for leaf, x in leaves.items()}, group)
            latents.append(flat.view(t, len(flat) // t, self.perception.width))
        joined = latents[0] if len(latents) == 1 else torch.cat(latents, 1)
        return self.trunk(joined.flatten(0, 1), rows.task.flatten()).unflatten(0, (t, n))


class PolicyNet(nn.Module):
    """A body and one action head per group (of every task, if the trunk asks for it).

    ``action_values``: also heads that tell what actions are worth, for ``appraise`` alone; nothing is decided by them.
    """

    def __init__(
        self, spec: Spec, body: Body, hidden: tuple[int, ...], activation: str, *, action_values: bool = False
    ) -> None:
        super().__init__()
        self.body = body
        common: dict[str, Any] = {"per_task": body.per_task, "activation": activation}
        self.heads = nn.ModuleDict({g.name: ActionHead(g, body.out, hidden, **common) for g in spec.groups})
        self.action_values = nn.ModuleDict()
        if action_values:
            self.action_values.update({g.name: ActionValueHead(g, body.out, hidden, **common) for g in spec.groups})
        orthogonal_(self, 2**0.5)
        for head in (*self.heads.values(), *self.action_values.values()):
            orthogonal_(cast(ActionHead, head).net.layers[-1], 0.01)  # a nearly uniform policy at the start
            start_alike_(body.trunk, cast(ActionHead, head).net)

    def forward(
        self, rows: Rows, state: Tensor | None, recall: Lookup | None = None
    ) -> tuple[dict[str, Distribution], tuple[Features, Tensor | None]]:
        """Per group the distributions of its t * n_g actions; then what the body returned."""
        features, state = self.body(rows, state, recall)
        found: dict[str, Distribution] = {}
        for group, span in rows.spans().items():
            leaves = rows.leaves[group]
            legal = leaves["legal"].flatten(0, 1) if "legal" in leaves else None
            found[group] = self.heads[group](flat(features, span), rows.task[:, span].flatten(), legal)
        return found, (features, state)

    def to_env(self, group: str, action: Tensor) -> Tensor:
        """A sample of the group's distribution as its environments want it."""
        return cast(ActionHead, self.heads[group]).to_env(action)


class ValueNet(nn.Module):
    """A value head over features of ``like``; ``body`` is the critic's own body, or None if it uses the policy's.

    Raises:
        ValueError: ``popart`` rescales the last layer of one task at a time, and the trunk has one head for all.
    """

    def __init__(
        self, spec: Spec, body: Body | None, like: Body, hidden: tuple[int, ...], activation: str, popart: bool = False
    ) -> None:
        super().__init__()
        if popart and not like.per_task:
            raise ValueError("popart=true needs a trunk with a head per task, such as multi_head or moore")
        self.body = body
        self.head = ValueHead(len(spec.tasks), like.out, hidden, per_task=like.per_task, activation=activation)
        orthogonal_(self, 2**0.5)
        orthogonal_(self.head.net.layers[-1], 0.01)  # the first advantages come from rewards, not from noise
        start_alike_(like.trunk, self.head.net)

    def forward(self, features: Features, rows: Rows) -> Tensor:
        """Features [t, n, D] -> values [t, n]."""
        return self.head(flat(features), rows.task.flatten()).view(rows.task.shape)


class Scene(NamedTuple):
    """Rows to decide about and to judge, what networks remember before them ("actor", "critic": [n, H]; empty for those
    without memory), and the rows without repetitions, if there are enough: each is then computed once."""

    rows: Rows
    memory: Mapping[str, Tensor]
    folded: Folded | None

    @classmethod
    def of(cls, rows: Rows, memory: Mapping[str, Tensor]) -> Scene:
        return cls(rows, memory, None if memory else fold(rows))

    @property
    def unique(self) -> Rows:
        """What networks compute."""
        return self.rows if self.folded is None else self.folded.rows


def decide(policy: PolicyNet, scene: Scene) -> tuple[dict[str, Distribution], Features]:
    """Per group the distributions of its t * n_g actions; and the features of ``scene.unique``."""
    policies, (features, _) = policy(scene.unique, scene.memory.get("actor"))
    if scene.folded is not None:
        places = scene.unique.spans()
        for group, span in scene.rows.spans().items():
            policies[group] = policies[group].take(scene.folded.place[:, span].flatten() - places[group].start)
    return policies, features


def judge(critic: ValueNet, scene: Scene, features: Features | None = None) -> Tensor:
    """Values [t, n]. ``features``: from ``decide``, for a critic without a body of its own."""
    if critic.body is not None:
        features, _ = critic.body(scene.unique, scene.memory.get("critic"))
    assert features is not None, "a critic without a body needs the policy's features"
    value = critic(features, scene.unique)
    return value if scene.folded is None else value[0][scene.folded.place]


def appraise(policy: PolicyNet, scene: Scene, features: Features, action: Mapping[str, Tensor]) -> Tensor:
    """What the policy's action values say of ``action[g]`` [t, n_g] or [t, n_g, a], [t, n]; ``features``: from
    ``decide``."""
    places = scene.unique.spans()
    found: list[Tensor] = []
    for group, span in scene.rows.spans().items():
        own, taken = places[group], action[group].flatten(0, 1)
        if scene.folded is None:
            place = torch.arange(len(taken), device=taken.device)
        else:
            place = scene.folded.place[:, span].flatten() - own.start
        task = scene.unique.task[:, own].flatten()
        values = policy.action_values[group](flat(features, own), task, place, taken)
        found.append(values.view(action[group].shape[:2]))
    return torch.cat(found, 1)


def evaluate(
    policy: PolicyNet, critic: ValueNet, rows: Rows, memory: Mapping[str, Tensor]
) -> tuple[dict[str, Distribution], Tensor]:
    """``decide`` and ``judge`` at once: per group the distributions of its actions, and all values [t, n]."""
    scene = Scene.of(rows, memory)
    policies, features = decide(policy, scene)
    return policies, judge(critic, scene, features)
