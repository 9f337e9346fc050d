"""Steps on many tasks' losses: the plain one, and what changes with aggregated gradients or balanced losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mtrl.nn.aggregation import Aggregator
from mtrl.nn.descent import Descent, unchecked
from mtrl.nn.heads import TaskMLP
from mtrl.nn.trunk import TrunkConfig, make_trunk


class Batch(NamedTuple):
    task: Tensor
    x: Tensor
    y: Tensor

    @property
    def weight(self) -> Tensor | None:
        return None

    def parts(self) -> dict[int, Batch]:
        return {k: Batch(*(column[self.task == k] for column in self)) for k in self.task.unique().tolist()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = make_trunk(TrunkConfig(kind="multi_head", widths=(8,)), 4, 2)
        self.head = TaskMLP(2, (8, 1))

    def loss(self, rows: Batch) -> Tensor:
        return (self.head(self.trunk(rows.x, rows.task), rows.task)[:, 0] - rows.y).square()


def made(**options: Any) -> tuple[Net, Descent, Batch]:
    torch.manual_seed(0)
    net = Net()
    task = torch.tensor([0, 0, 0, 1, 1, 1])
    rows = Batch(task, torch.randn(6, 4), torch.where(task == 0, 1.0, -5.0))
    return net, Descent("critic", net, torch.optim.SGD(net.parameters(), 0.01), ["a", "b"], **options), rows


def test_the_plain_step_is_gradient_descent_on_the_mean_loss() -> None:
    net, descent, rows = made()
    other, _, _ = made()
    mean = descent(net.loss, rows, 0)
    loss = other.loss(rows).mean()
    loss.backward()
    torch.testing.assert_close(mean, loss.detach())
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.01 * theirs.grad)  # type: ignore[operator]


def test_aggregated_gradients_are_clipped_and_stepped() -> None:
    pytest.importorskip("torchjd")
    net, descent, rows = made(gradients="upgrad", clip=0.1)
    other, _, _ = made()
    before = [p.detach().clone() for p in net.parameters()]
    descent(net.loss, rows, 0)
    Aggregator("upgrad").backward([other.loss(part).mean() for part in rows.parts().values()], other)
    nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    for old, mine, theirs in zip(before, net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, old - 0.01 * theirs.grad)  # type: ignore[operator]


def test_famo_compares_losses_around_the_step() -> None:
    net, descent, rows = made(balance="famo")
    before = net.loss(rows).detach()
    descent(net.loss, rows, 0)
    after = net.loss(rows).detach()
    fall = (before[:3].mean() / after[:3].mean()).log() - (before[3:].mean() / after[3:].mean()).log()
    logits = descent.balancer.logits.detach()  # type: ignore[union-attr]
    assert torch.sign(logits[1] - logits[0]) == torch.sign(fall)


def test_what_is_not_finite_is_named_and_not_stepped() -> None:
    net, descent, rows = made()
    before = [p.detach().clone() for p in net.parameters()]
    rows.y[4] = torch.inf
    with pytest.raises(FloatingPointError, match="the critic loss of b is not finite at update 7"):
        descent(net.loss, rows, 7)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_gradients_and_losses_are_not_both_changed() -> None:
    with pytest.raises(ValueError, match="critic: gradients=cagrad and balance=igb exclude each other"):
        made(gradients="cagrad", balance="igb")


def test_unchecked_steps_are_the_same_until_one_is_not_finite_and_none_after_it() -> None:
    torch.manual_seed(0)
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    _, _, rows = made()
    checked, free = (
        Descent("critic", net, torch.optim.Adam(net.parameters(), 0.1, fused=True), ["a", "b"], clip=1.0)
        for net in nets
    )
    with unchecked([free], torch.device("cpu")) as stop:
        for step in range(2):
            assert torch.equal(free(nets[1].loss, rows, step), checked(nets[0].loss, rows, step))
        assert stop.item() == 0
        broken = rows._replace(y=rows.y.masked_fill(rows.task == 0, torch.inf))
        for batch in (broken, rows):
            assert free(nets[1].loss, batch, 2).isnan()
        assert stop.item() == 1
    for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        states = [descent.optimizer.state[p] for descent, p in ((checked, mine), (free, theirs))]
        assert all(torch.equal(states[0][name], states[1][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    with pytest.raises(FloatingPointError, match="critic loss of a is not finite"):
        free(nets[1].loss, broken, 3)
    for step in range(2, 4):
        assert torch.equal(free(nets[1].loss, rows, step), checked(nets[0].loss, rows, step))
