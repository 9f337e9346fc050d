"""Loss balancers: closed forms, TorchJD's own numbers, exact resume."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch

from mtrl.nn.balancers import FAMO, IGB, BalancerName, Uncertainty, make_balancer


def test_uncertainty_settles_where_the_weight_is_half_the_inverse_loss() -> None:
    losses = torch.tensor([0.5, 8.0], requires_grad=True)
    balancer = Uncertainty(2)
    for _ in range(400):
        balancer(losses).backward()
        balancer.step()
    torch.testing.assert_close(balancer.log_variance.detach(), losses.detach().log(), rtol=0, atol=1e-2)
    losses.grad = None
    balancer(losses).backward()
    torch.testing.assert_close(losses.grad, 1 / (2 * losses.detach()), rtol=1e-2, atol=0)
    assert balancer.log_variance.grad is not None
    assert float(balancer.log_variance.grad.abs().max()) < 1e-2


def test_igb_weights_by_the_distance_from_the_base_of_the_second_period() -> None:
    balancer = IGB(2, period=2)
    history = [[9.0, 9.0], [5.0, 1.0], [4.0, 1.0], [2.0, 3.0]]  # base: (3, 2)
    for losses in history:
        value = torch.tensor(losses, requires_grad=True)
        balancer(value).backward()
        torch.testing.assert_close(value.grad, 1 / value.detach())
    value = torch.tensor([3.0, 1.0], requires_grad=True)
    balancer(value).backward()
    weights = 2 * torch.softmax(torch.tensor([1.0, 0.5]), 0)
    torch.testing.assert_close(value.grad, weights / value.detach())


def test_famo_equals_torchjds() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    mine, theirs = FAMO(3), scalarization.FAMO(3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        losses = torch.rand(3, generator=generator) + 0.1
        mine_in, their_in = losses.clone().requires_grad_(), losses.clone().requires_grad_()
        mine(mine_in).backward()
        theirs(their_in).backward()
        torch.testing.assert_close(mine_in.grad, their_in.grad)
        after = losses * torch.rand(3, generator=generator)
        mine.step(after)
        theirs.update(after)


def test_famo_favours_the_task_that_fell_least() -> None:
    balancer = FAMO(2)
    for _ in range(20):
        balancer(torch.tensor([1.0, 1.0]))
        balancer.step(torch.tensor([0.5, 0.9]))
    assert balancer.logits[1] > balancer.logits[0] + 0.5
    with pytest.raises(RuntimeError, match="pass it the losses after"):
        balancer.step(None)


@pytest.mark.parametrize("name", get_args(BalancerName))
def test_a_restored_balancer_goes_on_alike(name: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def drive(balancer: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            losses = torch.rand(3, generator=generator).requires_grad_()
            loss = balancer(losses)
            loss.backward()
            balancer.step(losses.detach() / 2 if balancer.needs_after else None)
            found.append(float(loss.detach()))
        return found

    one, two = make_balancer(name, 3), make_balancer(name, 3)
    drive(one, 4)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    state = generator.get_state()
    expected = drive(one, 4)
    generator.set_state(state)
    assert drive(two, 4) == expected


@pytest.mark.parametrize("name", get_args(BalancerName))
def test_an_absent_task_neither_counts_nor_disturbs_the_others(name: Any) -> None:
    """Two of three tasks are there: as with these two alone, and the third one's weight does not run away."""
    whole, pair = make_balancer(name, 3), make_balancer(name, 2)
    present = torch.tensor([True, True, False])
    for step in range(30):
        losses = torch.tensor([2.0, 0.5 + 0.01 * step, 0.0], requires_grad=True)
        two = losses.detach()[:2].clone().requires_grad_()
        (grad,) = torch.autograd.grad(whole(losses, present), losses, retain_graph=True)
        (want,) = torch.autograd.grad(pair(two), two, retain_graph=True)
        torch.testing.assert_close(grad[:2], want)
        assert float(grad[2]) == 0.0
        if name == "uncertainty":
            whole(losses, present).backward()
            pair(two).backward()
        after = losses.detach() * 0.9
        whole.step(after if whole.needs_after else None)
        pair.step(after[:2] if pair.needs_after else None)


@pytest.mark.parametrize("name", ["uncertainty", "famo"])
def test_a_task_that_leaves_keeps_its_weight(name: Any) -> None:
    """Though Adam's momentum, and FAMO's weight decay, would move it on."""
    balancer = make_balancer(name, 2)
    weight = balancer.log_variance if name == "uncertainty" else balancer.logits  # type: ignore[attr-defined]
    kept = weight.detach().clone()
    for present in [None] * 5 + [torch.tensor([True, False])] * 5:
        losses = torch.tensor([2.0, 0.5 if present is None else 0.0], requires_grad=True)
        balancer(losses, present).backward()
        balancer.step(losses.detach() * torch.tensor([0.9, 0.8]) if balancer.needs_after else None)
        if present is None:
            kept = weight.detach().clone()
            assert kept[1] != 0
    assert weight[1] == kept[1]
    assert weight[0] != kept[0]
