"""Pieces of losses: the squashed Gaussian's density and the categorical value's projection."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def squashed_sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Reparameterised action tanh(mean + std * noise) [n, a] in (-1, 1) and its log-density [n].

    The density is the one in the units of the squashed action (Haarnoja et al. 2018, appendix C):
    log N(u) - sum log(1 - tanh(u)^2), where log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) is exact for large |u|.
    """
    raw = mean + log_std.exp() * noise
    normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return torch.tanh(raw), (normal - 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))).sum(-1)


def project(probs: Tensor, atoms: Tensor, support: Tensor) -> Tensor:
    """Lay mass ``probs`` [n, A] at places ``atoms`` [n, A] onto the evenly spaced ``support`` [S] -> [n, S].

    Each mass is split between its two neighbours in proportion to nearness, so mass and, within the support, mean are
    kept; places outside count as the support's ends (C51, https://arxiv.org/abs/1707.06887).
    """
    low, spacing = support[0], support[1] - support[0]
    place = ((atoms - low) / spacing).clamp(0, len(support) - 1)
    left = place.floor().clamp(max=len(support) - 2)
    share = place - left  # of the right neighbour
    left = left.nan_to_num().long()  # what is not a number stays so in ``share``
    out = probs.new_zeros(len(probs), len(support))
    out.scatter_add_(1, left, probs * (1 - share))
    return out.scatter_add_(1, left + 1, probs * share)


def task_weights(task: Tensor, valid: Tensor, num_tasks: int) -> Tensor:
    """Weights of rows [...] that sum to 1 and give an equal share to each task that has valid rows; 0 elsewhere."""
    valid = valid.float()
    count = valid.new_zeros(num_tasks).index_add_(0, task.flatten(), valid.flatten())
    return valid / (count[task].clamp(min=1) * (count > 0).sum())
