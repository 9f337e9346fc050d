"""Parameter counts and matched widths equal the published ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mtrl.nn.heads import TaskMLP
from mtrl.nn.perception import GridCNN
from mtrl.nn.size import count_parameters, match_width, network_sizes
from mtrl.nn.trunk import TrunkConfig, make_trunk


def net(kind: str, width: int, num_tasks: int, out: int, hidden: int, **fields: int) -> nn.Module:
    trunk = make_trunk(TrunkConfig(kind=kind, widths=(hidden,) * 3, **fields), width, num_tasks)  # type: ignore[arg-type]
    return nn.ModuleList([trunk, TaskMLP(num_tasks, (hidden, out))])


@pytest.mark.parametrize(
    ("num_tasks", "experts", "width", "out", "matched", "size"),
    [
        (10, 4, 43, 1, 810, 1_357_570),
        (10, 4, 39, 8, 800, 1_377_680),
        (50, 6, 43, 1, 989, 2_051_236),
        (50, 6, 39, 8, 940, 2_183_080),
    ],
)
def test_multi_head_networks_at_moores_size(
    num_tasks: int, experts: int, width: int, out: int, matched: int, size: int
) -> None:
    moore = net("moore", width, num_tasks, out, 400, experts=experts)
    found = match_width(lambda hidden: net("multi_head", width, num_tasks, out, hidden), count_parameters(moore))
    assert found == matched
    assert count_parameters(net("multi_head", width, num_tasks, out, found)) == size
    assert abs(size - count_parameters(moore)) < 0.01 * size


@pytest.mark.parametrize(("experts", "channels", "size"), [(2, (28, 56), 21_092), (3, (38, 76), 31_642)])
def test_convolutions_at_moores_size(experts: int, channels: tuple[int, int], size: int) -> None:
    def build(c: int) -> nn.Module:
        return GridCNN((3, 7, 7), None, (c, 2 * c, 64))

    found = match_width(build, experts * 10_544)
    assert (found, 2 * found) == channels
    assert count_parameters(build(found)) == size


def test_the_random_generator_is_left_alone_and_small_targets_are_refused() -> None:
    before = torch.random.get_rng_state()
    assert match_width(lambda width: nn.Linear(3, width), 4) == 1
    assert match_width(lambda width: nn.Linear(3, width), 403) == 101
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ValueError, match="has 4 parameters already; 1 are asked for"):
        match_width(lambda width: nn.Linear(3, width), 1)


def test_an_agents_networks_are_counted_once() -> None:
    policy, targets = nn.Sequential(nn.Linear(3, 2)), nn.Linear(3, 2).requires_grad_(False)
    agent = SimpleNamespace(body=policy[0], policy=policy, targets=targets, other=5)
    assert network_sizes(agent) == {"policy": 8}
