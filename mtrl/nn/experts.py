"""Stacks of K equal networks, evaluated together: dense layers as one batched product, convolutions as one grouped one.

Parameters are stacked [K, ...]. Measured on two kinds of CPU, batching costs no more than a loop over separate experts
at a learner's batch sizes and is several times faster at those of acting.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.perception import ACTIVATIONS


class ExpertLinear(nn.Module):
    """K linear layers: weight [K, in, out], bias [K, out]."""

    def __init__(self, experts: int, inner: int, outer: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inner)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(experts, inner, outer).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, outer).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Rows of each expert [K, n, in], or the same rows for all of them [n, in] -> [K, n, out]."""
        if x.ndim == 2:
            x = x.expand(len(self.weight), *x.shape)
        return torch.baddbmm(self.bias[:, None], x, self.weight)


class ExpertConv(nn.Module):
    """K convolutions 2x2: weight [K, out, in, 2, 2], bias [K, out]; the first of a stack reads one common picture."""

    def __init__(self, experts: int, inner: int, outer: int, *, common: bool) -> None:
        super().__init__()
        self.groups = 1 if common else experts
        bound = 1 / math.sqrt(4 * inner)  # as nn.Conv2d
        self.weight = nn.Parameter(torch.empty(experts, outer, inner, 2, 2).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, outer).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] (common) or [n, K * in, h, w] -> [n, K * out, h - 1, w - 1]."""
        weight = self.weight.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias.flatten(), groups=self.groups)


class GateLinear(nn.Module):
    """A linear layer with small uniform weights, so that what it gates starts out even; no initialiser touches it."""

    def __init__(self, inner: int, outer: int, bound: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outer, inner).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ExpertMLP(nn.Module):
    """K MLPs of these sizes; no activation behind the last layer."""

    def __init__(self, experts: int, sizes: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ExpertLinear(experts, a, b) for a, b in itertools.pairwise(sizes))
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Rows [n, in] for all experts, or [K, n, in] -> [K, n, out]."""
        for i, layer in enumerate(self.layers):
            x = layer(self.activation(x) if i else x)
        return x


class ExpertCNN(nn.Module):
    """K stacks of 2x2 convolutions with ReLU between them over one view: the experts of MOORE's MiniGrid networks.

    Args:
        experts: K.
        view: (h, w, c) of the picture.
        channels: outputs of each convolution.

    Attributes:
        out: width of an expert's flat output.
    """

    def __init__(self, experts: int, view: tuple[int, int, int], channels: tuple[int, ...]) -> None:
        super().__init__()
        h, w, c = view
        self.experts, self.view = experts, view
        pairs = itertools.pairwise((c, *channels))
        self.layers = nn.ModuleList(ExpertConv(experts, a, b, common=i == 0) for i, (a, b) in enumerate(pairs))
        self.activation = nn.ReLU()
        self.out = (h - len(channels)) * (w - len(channels)) * channels[-1]

    def forward(self, latents: Tensor) -> Tensor:
        """Flat views [n, h * w * c], channels last -> [K, n, out]."""
        x = latents.unflatten(1, self.view).permute(0, 3, 1, 2)
        for i, layer in enumerate(self.layers):
            x = layer(self.activation(x) if i else x)
        return x.unflatten(1, (self.experts, -1)).flatten(2).transpose(0, 1)
