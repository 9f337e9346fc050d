"""Stacks of K equal networks, evaluated together: dense layers as one batched product, convolutions as one grouped one
or, over grids of ids, as products over their distinct patches.

Parameters are stacked [K, ...]. Measured on two kinds of CPU, batching costs no more than a loop over separate experts
at a learner's batch sizes and is several times faster at those of acting.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.patches import codes, find_patches, one_hot_cells, pick
from mtrl.nn.perception import ACTIVATIONS, View


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
        return torch.bmm(x, self.weight).add_(self.bias[:, None])  # oneDNN adds while it multiplies, but more slowly


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

    def patches(self, x: Tensor, parts: Tensor) -> Tensor:
        """What it says about patches made of four parts: [K or 1, u, in], parts [m, 4] -> [K, m, out]."""
        weight = self.weight.permute(0, 3, 4, 2, 1).flatten(1, 3)  # [K, 4 * in, out]
        picked = pick(x, parts)
        return torch.baddbmm(self.bias[:, None], picked.expand(len(weight), -1, -1), weight)


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
        view: the picture in the latents.
        channels: outputs of each convolution.

    Attributes:
        out: width of an expert's flat output.
    """

    cells: Tensor
    codes: Tensor

    def __init__(self, experts: int, view: View, channels: tuple[int, ...]) -> None:
        super().__init__()
        h, w, c = view.shape
        self.experts, self.shape, self.ids = experts, view.shape, bool(view.planes)
        if view.planes:
            self.register_buffer("cells", one_hot_cells(view.planes), persistent=False)
            self.register_buffer("codes", codes(view.planes), persistent=False)
        pairs = itertools.pairwise((c, *channels))
        self.layers = nn.ModuleList(ExpertConv(experts, a, b, common=i == 0) for i, (a, b) in enumerate(pairs))
        self.activation = nn.ReLU(inplace=True)
        self.out = (h - len(channels)) * (w - len(channels)) * channels[-1]

    def forward(self, latents: Tensor) -> Tensor:
        """Flat views [n, h * w * c], channels last -> [K, n, out], channels last."""
        x = latents.unflatten(1, self.shape)
        patches = find_patches((x * self.codes).sum(3).long(), len(self.layers)) if self.ids else None
        if patches is not None:
            x = self.cells[None]
            for i, (layer, parts) in enumerate(zip(self.layers, patches.parts, strict=True)):
                x = layer.patches(self.activation(x) if i else x, parts)  # type: ignore[operator]
            return pick(x, patches.place.flatten(1))
        x = x.permute(0, 3, 1, 2)
        for i, layer in enumerate(self.layers):
            x = layer(self.activation(x) if i else x)
        return x.permute(0, 2, 3, 1).unflatten(3, (self.experts, -1)).permute(3, 0, 1, 2, 4).flatten(2)
