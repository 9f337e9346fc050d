from __future__ import annotations

import torch
from torch import nn

from mtrl.nn.averaging import Average


def net(weight: float) -> nn.Linear:
    made = nn.Linear(1, 1)
    nn.init.constant_(made.weight, weight)
    nn.init.constant_(made.bias, -weight)
    return made


def test_the_average_is_the_exponential_one() -> None:
    """From 1, along 2, 3, 4 with a share of 0.9: 0.9^3 + 0.1 (0.9^2 * 2 + 0.9 * 3 + 4)."""
    learner = net(1.0)
    average = Average(learner, 0.9)
    for weight in (2.0, 3.0, 4.0):
        nn.init.constant_(learner.weight, weight)
        average.follow()
    expected = 0.9**3 + 0.1 * (0.81 * 2 + 0.9 * 3 + 4)
    torch.testing.assert_close(average.slow.weight, torch.full((1, 1), expected))
    torch.testing.assert_close(average.slow.bias, torch.tensor([-1.0]))
    assert average.slow.weight.is_leaf
    assert not average.slow.weight.requires_grad
    average.restart()
    assert torch.equal(average.slow.weight, learner.weight)


def test_without_a_share_it_is_the_network_itself() -> None:
    learner = net(1.0)
    average = Average(learner, 0.0)
    average.follow()
    assert average.slow is learner
    assert list(average.state_dict()) == ["weight", "bias"]


def test_states_hold_both_and_the_learner_under_its_own_names() -> None:
    one, two = Average(net(1.0), 0.5), Average(net(7.0), 0.5)
    nn.init.constant_(one.net.weight, 2.0)
    one.follow()
    two.load_state_dict(one.state_dict())
    assert two.net.weight.item() == one.state_dict()["weight"].item() == 2.0
    assert two.slow.weight.item() == 1.5
