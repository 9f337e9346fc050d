"""Stacked experts equal K separate networks, in value and gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mtrl.nn.experts import ExpertCNN, ExpertMLP
from mtrl.nn.heads import orthogonal_
from mtrl.nn.perception import View


def test_stacked_layers_equal_separate_ones() -> None:
    stack = ExpertMLP(3, (5, 6, 4), "relu").double()
    x = torch.randn(7, 5, dtype=torch.float64)
    first, second = stack.layers
    rows = [
        F.relu(x @ first.weight[k] + first.bias[k]) @ second.weight[k] + second.bias[k]  # type: ignore[index]
        for k in range(3)
    ]
    expected = torch.stack(rows)
    torch.testing.assert_close(stack(x), expected)
    mine = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(stack.parameters()))
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(stack(torch.stack([x, x + 1, x - 1]))[0], expected[0])


def test_grouped_convolutions_equal_separate_ones() -> None:
    stack = ExpertCNN(3, View(0, (7, 7, 2)), (4, 5, 6)).double()
    x = torch.randn(9, 7 * 7 * 2, dtype=torch.float64)
    found = stack(x)
    assert found.shape == (3, 9, stack.out) == (3, 9, 4 * 4 * 6)
    for k in range(3):
        net = nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Conv2d(4, 5, 2), nn.ReLU(), nn.Conv2d(5, 6, 2)).double()
        with torch.no_grad():
            for conv, own in zip((net[0], net[2], net[4]), stack.layers, strict=True):
                conv.weight.copy_(own.weight[k])  # type: ignore[operator, index, union-attr, arg-type]
                conv.bias.copy_(own.bias[k])  # type: ignore[operator, index, union-attr, arg-type]
        torch.testing.assert_close(found[k], net(x.view(9, 7, 7, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1))


def test_orthogonal_initialisation_reaches_every_expert() -> None:
    dense, convs = ExpertMLP(3, (8, 5), "relu"), ExpertCNN(2, View(0, (4, 4, 3)), (6,))
    orthogonal_(dense, 2.0)
    orthogonal_(convs, 1.0)
    for weight in dense.layers[0].weight:  # type: ignore[union-attr]
        torch.testing.assert_close(weight.T @ weight, 4 * torch.eye(5), atol=1e-5, rtol=1e-5)
    for weight in convs.layers[0].weight.flatten(2):  # type: ignore[union-attr, operator]
        torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-5, rtol=1e-5)
