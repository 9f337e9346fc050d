"""Networks of off-policy agents with continuous actions: rows to Gaussians, rows and actions to values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from mtrl.nn.heads import TaskMLP, look_up, to_bounds
from mtrl.nn.perception import Perception, PerceptionConfig, flat_width, with_action
from mtrl.nn.trunk import TrunkConfig, make_trunk
from mtrl.nn.trunk.paco import start_alike_
from mtrl.types import Spec

Leaves = Mapping[str, Mapping[str, Tensor]]
"""{group: {leaf: [n_g, ...]}}."""


class Rows(NamedTuple):
    """A batch of n transitions, group after group: {group: ...} per group, [n] over all of them.

    ``noise`` and ``next_noise`` [n_g, a], standard normal, decide the policy's actions in ``obs`` and ``next``.
    """

    task: Tensor
    obs: dict[str, dict[str, Tensor]]
    action: dict[str, Tensor]
    reward: Tensor
    terminated: Tensor
    next: dict[str, dict[str, Tensor]]
    noise: dict[str, Tensor]
    next_noise: dict[str, Tensor]
    target: Tensor = torch.empty(0)

    @property
    def weight(self) -> None:
        """All rows count alike: replay draws as many of every task."""

    def parts(self) -> dict[int, Rows]:
        """The rows of each task, which are adjacent."""
        found, start = {}, 0
        for name, action in self.action.items():
            tasks = self.task[start : start + len(action)]
            own = 0
            for task, count in zip(*(x.tolist() for x in tasks.unique_consecutive(return_counts=True)), strict=True):
                here, all_ = slice(own, own + count), slice(start + own, start + own + count)
                obs, following = ({name: {k: x[here] for k, x in part[name].items()}} for part in (self.obs, self.next))
                noise, after = ({name: part[name][here]} for part in (self.noise, self.next_noise))
                rest = self.reward[all_], self.terminated[all_], following, noise, after, self.target[all_]
                found[task] = Rows(self.task[all_], obs, {name: action[here]}, *rest)
                own += count
            start += len(action)
        return found


def standard_normal(sizes: Mapping[str, tuple[int, int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Random numbers of these shapes, on the generator's device."""
    device = generator.device
    return {name: torch.empty(size, device=device).normal_(generator=generator) for name, size in sizes.items()}


class SquashedPolicy(nn.Module):
    """Perception per group, one trunk, a head per group (and task) with mean and log deviation of a Gaussian."""

    def __init__(
        self, spec: Spec, perception: PerceptionConfig, trunk: TrunkConfig, log_std: tuple[float, float]
    ) -> None:
        super().__init__()
        self.perception = Perception(spec, perception)
        self.trunk = make_trunk(trunk, self.perception.width, len(spec.tasks), self.perception.view)
        self.heads = nn.ModuleDict()
        self.low, self.high = log_std
        for group in spec.groups:
            heads = len(group.tasks) if self.trunk.per_task else 1
            self.heads[group.name] = head = TaskMLP(heads, (self.trunk.out, 2 * flat_width(group)))
            start_alike_(self.trunk, head)
            local = torch.zeros(len(spec.tasks), dtype=torch.int64)
            if self.trunk.per_task:
                local[list(group.tasks)] = torch.arange(heads)
            self.register_buffer(f"local:{group.name}", local, persistent=False)
            assert isinstance(group.action, Box)  # agents have checked
            for end, values in (("low", group.action.low), ("high", group.action.high)):
                self.register_buffer(
                    f"{end}:{group.name}", torch.as_tensor(values, dtype=torch.float32), persistent=False
                )

    def forward(self, obs: Leaves, task: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Leaves per group and the tasks [n] of their rows -> (mean, log deviation) [n_g, a] per group."""
        latents = [self.perception(leaves, name) for name, leaves in obs.items()]
        features = self.trunk(torch.cat(latents), task)
        out, start = {}, 0
        for name, latent in zip(obs, latents, strict=True):
            rows = slice(start, start + len(latent))
            local = look_up(self.get_buffer(f"local:{name}"), task, rows)
            mean, log_std = self.heads[name](features[rows], local).float().chunk(2, 1)
            out[name] = mean, log_std.clamp(self.low, self.high)
            start = rows.stop
        return out

    def to_unit(self, action: Tensor, group: str) -> Tensor:
        """The environment's bounds to [-1, 1]; to -1 where they leave no choice."""
        low, high = self.get_buffer(f"low:{group}"), self.get_buffer(f"high:{group}")
        return (action - low) / torch.where(high > low, high - low, 1.0) * 2 - 1

    def to_env(self, action: Tensor, group: str) -> Tensor:
        """[-1, 1] to the environment's bounds."""
        low, high = self.get_buffer(f"low:{group}"), self.get_buffer(f"high:{group}")
        return to_bounds(action, low, high)


class ActionCritic(nn.Module):
    """Q(s, a): the action joins the ``vector`` leaf; perception per group, one trunk, one head (per task)."""

    def __init__(self, spec: Spec, perception: PerceptionConfig, trunk: TrunkConfig, out: int) -> None:
        super().__init__()
        # Who ignores the vector still needs the action, which comes in its place.
        self.reads_vector = "vector" not in perception.ignore
        ignored = tuple(leaf for leaf in perception.ignore if leaf != "vector")
        perception = perception.model_copy(update={"ignore": ignored})
        groups = []
        for group in spec.groups:
            kept = {leaf: box for leaf, box in group.leaves.items() if leaf != "vector" or self.reads_vector}
            groups.append(dataclasses.replace(group, leaves=with_action(dataclasses.replace(group, leaves=kept))))
        self.perception = Perception(dataclasses.replace(spec, groups=tuple(groups)), perception, state=True)
        self.trunk = make_trunk(trunk, self.perception.width, len(spec.tasks), self.perception.view)
        self.head = TaskMLP(len(spec.tasks) if self.trunk.per_task else 1, (self.trunk.out, out))
        start_alike_(self.trunk, self.head)
        self.register_buffer("common", torch.zeros(len(spec.tasks), dtype=torch.int64), persistent=False)

    def forward(self, obs: Leaves, action: Mapping[str, Tensor], task: Tensor) -> Tensor:
        """Leaves and actions in [-1, 1] per group, tasks [n] of their rows -> [n, out]."""
        latents = []
        for name, leaves in obs.items():
            own = [leaves["vector"]] if "vector" in leaves and self.reads_vector else []
            latents.append(self.perception({**leaves, "vector": torch.cat([*own, action[name]], 1)}, name))
        features = self.trunk(torch.cat(latents), task)
        return self.head(features, task if self.trunk.per_task else look_up(self.get_buffer("common"), task))
