"""Trunks: latents [n, width] of any group and the rows' tasks [n] -> features [n, D].

A trunk is chosen by the one field ``kind``. All have ``out`` (D) and ``per_task`` (does every task need a head of its
own, or does the trunk already tell the head which task it is?). Agents never learn which trunk they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mtrl.nn.perception import mlp


class TrunkConfig(BaseModel):
    """Which trunk, and its size."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["shared", "multi_head"] = Field(
        default="multi_head",
        description="shared: task one-hot at the input, one head; multi_head: no one-hot, a head per task",
    )
    widths: tuple[int, ...] = Field(default=(), description="hidden layers; () hands the latents straight to the heads")
    activation: Literal["relu", "tanh"] = "relu"
    layer_norm: bool = False
    blocks: int = Field(default=0, ge=0, description="residual blocks of the last width behind the layers (BRC)")


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
        self.layers = _layers(config, width + num_tasks)
        self.out = config.widths[-1] if config.widths else width + num_tasks

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        one_hot = F.one_hot(task, self.num_tasks).to(latents.dtype)
        return self.layers(torch.cat((latents, one_hot), 1))


class MultiHeadTrunk(nn.Module):
    """Layers that do not know the task; every task has its own head behind them."""

    per_task = True

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        self.layers = _layers(config, width)
        self.out = config.widths[-1] if config.widths else width

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        return self.layers(latents)


Trunk = SharedTrunk | MultiHeadTrunk

TRUNKS: dict[str, Callable[[TrunkConfig, int, int], Trunk]] = {
    "shared": SharedTrunk,
    "multi_head": MultiHeadTrunk,
}


def make_trunk(config: TrunkConfig, width: int, num_tasks: int) -> Trunk:
    """The trunk that ``config.kind`` names, for latents of ``width`` and task ids below ``num_tasks``."""
    return TRUNKS[config.kind](config, width, num_tasks)


class Memory(nn.Module):
    """A GRU over time whose state is cleared where an episode starts (Cho et al. 2014; gates as ``nn.GRUCell``)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.input = nn.Linear(width, 3 * out)
        self.hidden = nn.Linear(out, 3 * out)

    def forward(self, features: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Features [t, n, width], first [t, n] bool, state [n, out] -> outputs [t, n, out], last state [n, out]."""
        gates = self.input(features)  # one product for all steps; only the recurrent half is sequential
        keep = (~first).to(features.dtype)[..., None]
        outputs = []
        for now, kept in zip(gates.unbind(0), keep.unbind(0), strict=True):
            state = state * kept
            reset_x, update_x, new_x = now.chunk(3, 1)
            reset_h, update_h, new_h = self.hidden(state).chunk(3, 1)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            state = new + update * (state - new)
            outputs.append(state)
        return torch.stack(outputs), state
