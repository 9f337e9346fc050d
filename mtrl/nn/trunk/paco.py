"""Parameter-compositional networks (PaCo, Sun et al. 2022, https://arxiv.org/abs/2210.11653)."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.heads import TaskLinear, TaskMLP, TaskRows, task_linear
from mtrl.nn.perception import ACTIVATIONS
from mtrl.nn.trunk.config import TrunkConfig


class PacoTrunk(nn.Module):
    """All weights of task t are theta_t = sum_k w[t, k] Phi_k: K sets of parameters, composed once per task.

    The output layer is composed, too, without the head knowing: with features (w_t x f, w_t) of width K * D + K, one
    common linear head computes sum_k w[t, k] (A_k f + b_k). The head must have no hidden layers (``agent.head=[]``).
    The sets start equal (in heads, too: ``start_alike_``) and the w[t, k] near 1/K with sum 1, so that at first all
    tasks have one ordinary network. The authors' masking of tasks with exploding losses is left out.

    Args:
        config: ``experts`` sets (published: 5 for MT10) of the layers ``widths``.
        width: of the latents.
        num_tasks: T.
    """

    per_task = False

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        if not config.widths:
            raise ValueError("paco needs layers to compose: set trunk.widths")
        k = config.experts
        self.num_tasks = num_tasks
        weights = 1 + torch.empty(num_tasks, k).uniform_(-0.5, 0.5)
        self.weights = nn.Parameter(weights / weights.sum(1, keepdim=True))
        self.matrices, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in itertools.pairwise((width, *config.widths)):
            bound = 1 / math.sqrt(a)  # as nn.Linear
            self.matrices.append(nn.Parameter(torch.empty(a, b).uniform_(-bound, bound).repeat(k, 1, 1)))
            self.biases.append(nn.Parameter(torch.empty(b).uniform_(-bound, bound).repeat(k, 1)))
        self.activation = ACTIVATIONS[config.activation]()
        self.sets, self.out = k, k * (config.widths[-1] + 1)

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        rows = TaskRows.of(task, self.num_tasks)
        x = latents if rows.order is None else latents[rows.order]
        for matrix, bias in zip(self.matrices, self.biases, strict=True):
            composed = (self.weights @ matrix.flatten(1)).unflatten(1, matrix.shape[1:])  # [T, in, out]
            x = self.activation(task_linear(x, composed, self.weights @ bias, rows.counts))
        x = x if rows.back is None else x[rows.back]
        weights = F.embedding(task, self.weights)
        return torch.cat(((weights[:, :, None] * x[:, None]).flatten(1), weights), 1)


@torch.no_grad()
def start_alike_(trunk: nn.Module, head: TaskMLP) -> None:
    """Make the sets of a head behind ``PacoTrunk`` one ordinary layer: equal A_k, no b_k. Others stay as they are."""
    if not isinstance(trunk, PacoTrunk):
        return
    weight = cast(TaskLinear, head.layers[0]).weight[:, : trunk.out]  # [1, K * D + K, out]; an action may follow
    matrices, biases = weight.split((trunk.out - trunk.sets, trunk.sets), 1)
    blocks = matrices.unflatten(1, (trunk.sets, -1))
    blocks.copy_((blocks[:, :1] * math.sqrt(trunk.sets)).expand_as(blocks))  # initialisers saw K times the inputs
    biases.zero_()
