"""Stacks of 2x2 convolutions over grids of ids, computed once per distinct patch.

A grid world shows the same few corners again and again: 274 different views of minigrid/mt3 have 9864 patches of 2x2
cells, 132 of them different, and 4384 of 4x4 cells, 689 of them different. What a layer says about a patch depends on
the patch alone, so each layer is a product over its distinct patches, whose inputs are looked up among those of the
layer before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtrl.nn.linear import roomy

FEW = 32
"""Fewer grids than this are convolved as they are: looking for patches would take longer than it saves."""

MOST = 65536
"""Most distinct patches of a layer: four of their numbers fit into one of 64 bits."""


_folding = True


def folding() -> bool:
    """Whether what repeats in a batch may be computed once."""
    return _folding


@contextmanager
def unfolded() -> Iterator[None]:
    """Networks compute every row and patch, so that means over what their layers say are means over the batch."""
    global _folding
    before, _folding = _folding, False
    try:
        yield
    finally:
        _folding = before


def one_hot_cells(planes: tuple[int, ...]) -> Tensor:
    """All cells [prod(planes), sum(planes)] of one id per plane, one-hot, in the order of their numbers."""
    ids = torch.cartesian_prod(*(torch.arange(p) for p in planes)).view(-1, len(planes))
    return torch.cat([F.one_hot(ids[:, k], p) for k, p in enumerate(planes)], 1).float()


def strides(planes: tuple[int, ...]) -> Tensor:
    """A cell's number is the sum of its ids times these, int32."""
    return torch.tensor([math.prod(planes[k + 1 :]) for k in range(len(planes))], dtype=torch.int32)


def codes(planes: tuple[int, ...]) -> Tensor:
    """A one-hot cell's number is the sum of its planes [sum(planes)] times these, float32."""
    return torch.cat([stride * torch.arange(p) for stride, p in zip(strides(planes), planes, strict=True)]).float()


class Patches(NamedTuple):
    """``parts[l]`` [u_l, 4] int64: each distinct patch of layer l as four of layer l - 1 (of cells, for the first one):
    top left, top right, bottom left, bottom right; then a few that nobody needs, so that u_l is ``roomy``. ``place``
    [n, h - L, w - L]: every picture's among the last."""

    parts: tuple[Tensor, ...]
    place: Tensor


def find_patches(cells: Tensor, layers: int) -> Patches | None:
    """What ``layers`` 2x2 convolutions see of grids of ids [n, h, w] int64, ids in [0, 65536).

    None where it does not pay: without layers, for few grids, for more patches than can be told apart, and on a GPU
    (where the gradient of a look-up is not deterministic either); and while all is ``unfolded``.
    """
    if not layers or len(cells) < FEW or cells.device.type != "cpu" or not folding():
        return None
    parts: list[Tensor] = []
    for _ in range(layers):
        quads = torch.stack((cells[:, :-1, :-1], cells[:, :-1, 1:], cells[:, 1:, :-1], cells[:, 1:, 1:]), 3)
        a, b, c, d = quads.unbind(3)
        # The key may wrap around; numbers below 2^16 remain distinct.
        _, cells = (((a * MOST + b) * MOST + c) * MOST + d).unique(return_inverse=True)
        distinct = int(cells.max()) + 1
        if distinct > MOST:
            return None
        first = torch.zeros(roomy(distinct), dtype=torch.int64)  # in its spare places, any patch
        first.scatter_(0, cells.flatten(), torch.arange(cells.numel()))
        parts.append(quads.view(-1, 4)[first])
    return Patches(tuple(parts), cells)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [m, p] of each stack [K, u, d], side by side: [K, m, p * d].

    As an embedding, since the gradient of one is much cheaper than that of indexing.
    """
    k, u, _ = x.shape
    every = index + torch.arange(0, k * u, u)[:, None, None] if k > 1 else index[None]
    return F.embedding(every, x.flatten(0, 1)).flatten(2)
