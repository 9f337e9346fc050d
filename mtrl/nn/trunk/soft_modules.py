"""Soft modularization (Yang et al. 2020, https://arxiv.org/abs/2003.13661).

As in the authors' code (RchalYang/Soft-Module, ``ModularGatedCascadeCondNet``), which differs from the paper's text.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.experts import ExpertLinear, GateLinear
from mtrl.nn.perception import mlp
from mtrl.nn.trunk.config import TrunkConfig


class SoftModulesTrunk(nn.Module):
    """Layers of n modules; task and latents decide how much each module reads from each one before it.

    ``encoder`` makes h of the latents; g = gate(ReLU(h * Linear(task))). Module j of the next layer reads
    ReLU(sum_i P[j, i] m_i), where the routing P = softmax over i of a layer on ReLU(c), with c = g first and then
    c = Linear(all routings so far) * g. At the end one softmax over the modules sums them.

    Args:
        config: ``experts`` modules in each of ``len(widths)`` layers (published: 2 x 2 of 256 and 4 x 4 of 128).
        width: of the latents.
        num_tasks: T.
    """

    per_task = False

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        if not config.widths:
            raise ValueError("soft_modules needs layers of modules: set trunk.widths, for instance [256, 256]")
        encoder = (400, 400) if config.encoder is None else config.encoder
        gate = (256, 256) if config.gate is None else config.gate
        if not encoder or not gate:
            raise ValueError("soft_modules needs trunk.encoder and trunk.gate to have layers")
        n, self.num_tasks = config.experts, num_tasks
        self.encoder = mlp((width, *encoder), "relu", last=False)
        self.task = nn.Linear(num_tasks, encoder[-1])
        self.gate = mlp((encoder[-1], *gate), "relu", last=False)
        sizes = itertools.pairwise((encoder[-1], *config.widths))
        self.layers = nn.ModuleList(ExpertLinear(n, a, b) for a, b in sizes)
        depth = len(config.widths)
        self.routes = nn.ModuleList(GateLinear(gate[-1], n * n) for _ in range(depth - 1))
        self.conditions = nn.ModuleList(nn.Linear(n * n * (i + 1), gate[-1]) for i in range(depth - 1))
        self.last = GateLinear(gate[-1], n)
        self.experts, self.out = n, config.widths[-1]
        self.activation = nn.ReLU()

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        h = self.encoder(latents)
        relu = self.activation
        g = self.gate(relu(h * self.task(F.one_hot(task, self.num_tasks).to(h.dtype))))
        first, *later = self.layers
        found, condition, routings = first(relu(h)).transpose(0, 1), g, []  # found: [N, n, d]
        for route, relate, layer in zip(self.routes, self.conditions, later, strict=True):
            routing = torch.softmax(route(relu(condition)).unflatten(1, (self.experts, -1)), 2)
            routings.append(routing.flatten(1))
            found = layer(relu((routing @ found).transpose(0, 1))).transpose(0, 1)
            condition = relate(torch.cat(routings, 1)) * g
        weights = torch.softmax(self.last(relu(condition)), 1)
        return relu((weights[:, None] @ found)[:, 0])
