"""Layers shared by all tasks; the kinds differ in where the task comes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.perception import mlp
from mtrl.nn.trunk.config import TrunkConfig


class Residual(nn.Module):
    """x + LN(Linear(ReLU(LN(Linear(x))))): the block of BRC (Nauman et al. 2025, https://arxiv.org/abs/2505.23150)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _layers(config: TrunkConfig, width: int) -> nn.Sequential:
    sizes = (width, *config.widths)
    blocks = (Residual(sizes[-1]) for _ in range(config.blocks))
    return nn.Sequential(*mlp(sizes, config.activation, layer_norm=config.layer_norm), *blocks)


class SharedTrunk(nn.Module):
    """Layers over the latents joined with the task's one-hot; all tasks share one head behind it."""

    per_task = False

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.layers = _layers(config, width if config.widths else width + num_tasks)
        self.out = config.widths[-1] if config.widths else width + num_tasks
        # The first layer's columns of the one-hot: each is a task's own, as an embedding.
        self.task = nn.Linear(num_tasks, config.widths[0], bias=False) if config.widths else None

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        if self.task is None:
            return self.layers(_with_task(latents, task, self.num_tasks))
        first, *others = self.layers
        x = first(latents) + self.task(F.one_hot(task, self.num_tasks).to(latents.dtype))
        for layer in others:
            x = layer(x)
        return x


class SingleHeadTrunk(nn.Module):
    """Layers that do not know the task; its one-hot joins the features, for the one head that all tasks share.

    The single-head baseline of MOORE's MiniGrid experiments (https://arxiv.org/abs/2311.11385).
    """

    per_task = False

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.layers = _layers(config, width)
        self.out = (config.widths[-1] if config.widths else width) + num_tasks

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        return _with_task(self.layers(latents), task, self.num_tasks)


class MultiHeadTrunk(nn.Module):
    """Layers that do not know the task; every task has its own head behind them."""

    per_task = True

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        self.layers = _layers(config, width)
        self.out = config.widths[-1] if config.widths else width

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        return self.layers(latents)


def _with_task(x: Tensor, task: Tensor, num_tasks: int) -> Tensor:
    return torch.cat((x, F.one_hot(task, num_tasks).to(x.dtype)), 1)
