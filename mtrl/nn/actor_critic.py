"""Networks of on-policy agents: rows of all groups, over time, to action distributions and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mtrl.nn.heads import ActionHead, Distribution, ValueHead, orthogonal_
from mtrl.nn.perception import Perception, PerceptionConfig
from mtrl.nn.trunk import Memory, TrunkConfig, make_trunk
from mtrl.types import Spec


class Rows(NamedTuple):
    """Observations of t steps x n rows: ``leaves[g][leaf]`` [t, n_g, ...]; ``task``, ``first`` [t, n]. The groups' rows
    follow one another in the order of ``leaves``."""

    leaves: Mapping[str, Mapping[str, Tensor]]
    task: Tensor
    first: Tensor


class Body(nn.Module):
    """Perception -> trunk -> a GRU of width ``memory`` (0: none). ``state``: also read a team's global state."""

    def __init__(
        self, spec: Spec, perception: PerceptionConfig, trunk: TrunkConfig, memory: int = 0, *, state: bool = False
    ) -> None:
        super().__init__()
        self.perception = Perception(spec, perception, state=state)
        self.trunk = make_trunk(trunk, self.perception.width, len(spec.tasks))
        self.memory = Memory(int(self.trunk.out), memory) if memory else None  # type: ignore[arg-type]
        self.out: int = memory or int(self.trunk.out)  # type: ignore[arg-type]
        self.per_task = bool(self.trunk.per_task)

    def forward(self, rows: Rows, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows and the memory [n, H] before them -> features [t, n, out] and the memory after them."""
        t, n = rows.task.shape
        latents = []
        for group, leaves in rows.leaves.items():
            flat = self.perception({leaf: x.flatten(0, 1) for leaf, x in leaves.items()}, group)
            latents.append(flat.view(t, len(flat) // t, self.perception.width))
        joined = latents[0] if len(latents) == 1 else torch.cat(latents, 1)
        features = self.trunk(joined.flatten(0, 1), rows.task.flatten()).unflatten(0, (t, n))
        if self.memory is None or state is None:
            return features, None
        return self.memory(features, rows.first, state)


class PolicyNet(nn.Module):
    """A body and one action head per group (of every task, if the trunk asks for it)."""

    def __init__(self, spec: Spec, body: Body, hidden: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleDict(
            {
                group.name: ActionHead(group, body.out, hidden, per_task=body.per_task, activation=activation)
                for group in spec.groups
            }
        )
        orthogonal_(self, 2**0.5)
        for head in self.heads.values():
            orthogonal_(cast(ActionHead, head).net.layers[-1], 0.01)  # a nearly uniform policy at the start

    def forward(self, rows: Rows, state: Tensor | None) -> tuple[dict[str, Distribution], tuple[Tensor, Tensor | None]]:
        """Per group the distributions of its t * n_g actions; then what the body returned."""
        features, state = self.body(rows, state)
        found: dict[str, Distribution] = {}
        start = 0
        for group, leaves in rows.leaves.items():
            stop = start + next(iter(leaves.values())).shape[1]
            legal = leaves["legal"].flatten(0, 1) if "legal" in leaves else None
            part = features[:, start:stop].flatten(0, 1)
            found[group] = self.heads[group](part, rows.task[:, start:stop].flatten(), legal)
            start = stop
        return found, (features, state)

    def to_env(self, group: str, action: Tensor) -> Tensor:
        """A sample of the group's distribution as its environments want it."""
        return cast(ActionHead, self.heads[group]).to_env(action)


class ValueNet(nn.Module):
    """A value head over features of ``like``; ``body`` is the critic's own body, or None if it uses the policy's."""

    def __init__(self, spec: Spec, body: Body | None, like: Body, hidden: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.body = body
        self.head = ValueHead(len(spec.tasks), like.out, hidden, per_task=like.per_task, activation=activation)
        orthogonal_(self, 2**0.5)
        orthogonal_(self.head.net.layers[-1], 0.01)  # the first advantages come from rewards, not from noise

    def forward(self, features: Tensor, rows: Rows) -> Tensor:
        """Features [t, n, D] -> values [t, n]."""
        return self.head(features.flatten(0, 1), rows.task.flatten()).view(rows.task.shape)
