"""A sparse mixture of experts behind shared layers: each row is served by the few experts that its gate chose.

The layer of MENTOR (Huang et al. 2024, https://arxiv.org/abs/2410.14972; suninghuang19/mentor) for many tasks: the gate
also sees the task, and every task has its own head. Left out: the dropout of its gate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.heads import TaskMLP
from mtrl.nn.perception import mlp
from mtrl.nn.trunk.config import TrunkConfig


class TopKTrunk(nn.Module):
    """ReLU(sum over the ``top_k`` likeliest experts of gate * expert(h)) with h the shared layers' output.

    Gate probabilities are renormalised over the chosen experts, and only these are computed. Rows are sorted by expert,
    each of which gets one contiguous slice. To keep experts in use, the variance of their mean gate over the batch plus
    the gates' mean entropy is minimised, with weight ``balance``; its gradient reaches the gate alone.

    Args:
        config: ``widths`` shared layers; ``experts`` of one hidden layer ``expert_width``; ``gate``'s hidden layers.
        width: of the latents.
        num_tasks: T.
    """

    per_task = True
    whole = True  # the balancing loss is a mean over all rows of the batch, repeated ones among them

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        self.layers = mlp((width, *config.widths), config.activation)
        self.out = (width, *config.widths)[-1]
        gate = (256,) if config.gate is None else config.gate
        self.gate = mlp((self.out, *gate, config.experts), "relu", last=False)
        self.task = nn.Linear(num_tasks, (*gate, config.experts)[0], bias=False)  # joins the gate's first layer
        self.experts = TaskMLP(config.experts, (self.out, config.expert_width, self.out), "relu")
        self.activation = nn.ReLU()
        self.num_tasks, self.top_k, self.balance = num_tasks, config.top_k, config.balance

    def gates(self, features: Tensor, task: Tensor) -> Tensor:
        """Probabilities [n, K] of the experts for features [n, out] of the shared layers."""
        first, *others = self.gate
        x = first(features) + self.task(F.one_hot(task, self.num_tasks).to(features.dtype))
        for layer in others:
            x = layer(x)
        return torch.softmax(x.float(), 1)

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        h = self.layers(latents)
        likeliest, expert = self.gates(h, task).topk(self.top_k, 1)
        weights = likeliest / likeliest.sum(1, keepdim=True)
        served = self.experts(h.repeat_interleave(self.top_k, 0), expert.flatten()).unflatten(0, (-1, self.top_k))
        out = self.activation((weights.to(served.dtype)[:, None] @ served)[:, 0])
        if self.balance and len(out) and torch.is_grad_enabled():
            loss = balance_loss(self.gates(h.detach(), task))
            if loss.requires_grad:  # false where the network is frozen, as a critic in the actor's loss
                out = _WithLoss.apply(out, self.balance * loss)
        return out  # type: ignore[return-value] # apply is untyped


def balance_loss(gates: Tensor) -> Tensor:
    """Variance over experts of their mean gate, plus the mean entropy of a row's gates [n, K]."""
    entropy = -(gates * gates.clamp(min=1e-12).log()).sum(1).mean()
    return gates.mean(0).var(correction=0) + entropy


class _WithLoss(torch.autograd.Function):
    """Features as they are; in the backward pass also the gradient of an auxiliary loss, whatever the main loss is."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.new_ones(loss.shape)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, ctx.like
