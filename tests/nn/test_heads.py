"""Per-task layers equal a naive loop; distributions equal torch.distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from mtrl.nn.heads import (
    ActionHead,
    ActionValueHead,
    Categorical,
    Gaussian,
    Shared,
    TaskLinear,
    TaskMLP,
    ValueHead,
    orthogonal_,
)
from mtrl.types import Group

TASKS = {
    "sorted, equal": [0, 0, 1, 1, 2, 2],
    "sorted, ragged": [0, 2, 2, 2, 2, 2],
    "mixed": [2, 0, 1, 2, 2, 0],
    "none": [],
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_task_layers_equal_a_loop_over_rows_in_value_and_gradient(task: list[int]) -> None:
    torch.manual_seed(0)
    layer, mlp = TaskLinear(3, 5, 4).double(), TaskMLP(3, (5, 6, 4)).double()
    x, ids = torch.randn(len(task), 5, dtype=torch.float64), torch.tensor(task, dtype=torch.int64)
    if not task:  # a minibatch may hold no row of a group
        assert layer(x, ids).shape == mlp(x, ids).shape == (0, 4)
        return
    naive = torch.stack([row @ layer.weight[t] + layer.bias[t] for row, t in zip(x, ids, strict=True)])
    torch.testing.assert_close(layer(x, ids), naive)
    one, two = mlp.layers
    rows = [
        torch.tanh(row @ one.weight[t] + one.bias[t]) @ two.weight[t] + two.bias[t]  # type: ignore[index]
        for row, t in zip(x, ids, strict=True)
    ]
    found, expected = mlp(x, ids), torch.stack(rows)
    torch.testing.assert_close(found, expected)
    mine = torch.autograd.grad(found.square().sum(), list(mlp.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(mlp.parameters()))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
@pytest.mark.parametrize("sizes", [(5, 4), (5, 6, 4)], ids=["one layer", "two"])
def test_shared_rows_are_rows_written_out_in_value_and_gradient(task: list[int], sizes: tuple[int, ...]) -> None:
    mlp, ids = TaskMLP(3, sizes).double(), torch.tensor(task, dtype=torch.int64)
    of = torch.tensor([2, 0, 1, 2, 0, 1, 2] if task else [], dtype=torch.int64)  # each start's task
    starts = [(of == t).nonzero()[:, 0].tolist() for t in task]
    place = torch.tensor([own[i % len(own)] for i, own in enumerate(starts)], dtype=torch.int64)
    start = torch.randn(len(of), 3, dtype=torch.float64, requires_grad=True)
    rest = torch.randn(len(task), 2, dtype=torch.float64, requires_grad=True)
    shared = mlp(Shared(start, of, place, rest), ids)
    written = mlp(torch.cat((start[place], rest), 1), ids)
    torch.testing.assert_close(shared, written)
    needed = [start, rest, *mlp.parameters()]
    mine, theirs = (torch.autograd.grad(x.square().sum(), needed) for x in (shared, written))
    torch.testing.assert_close(mine, theirs)


def test_a_task_out_of_range_is_an_error() -> None:
    with pytest.raises(IndexError, match="task id 3 is out of range: the layer has 3 tasks"):
        TaskLinear(3, 2, 2)(torch.zeros(2, 2), torch.tensor([0, 3]))


def test_the_categorical_equals_torchs() -> None:
    logits = torch.randn(50, 4, dtype=torch.float64)
    action = torch.randint(0, 4, (50,))
    mine, theirs = Categorical(logits), torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(mine.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(mine.entropy(), theirs.entropy())
    torch.testing.assert_close(mine.mode(), logits.argmax(1))


def test_samples_follow_the_probabilities_and_their_generator() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0]).repeat(20_000, 1)
    draw = Categorical(logits).sample(torch.Generator().manual_seed(3))
    share = torch.bincount(draw, minlength=4) / len(draw)
    torch.testing.assert_close(share, torch.softmax(logits[0], 0), atol=0.01, rtol=0)
    assert torch.equal(draw, Categorical(logits).sample(torch.Generator().manual_seed(3)))


def test_illegal_actions_are_never_drawn_and_the_rest_equals_the_smaller_categorical() -> None:
    logits = torch.randn(4000, 5, dtype=torch.float64, requires_grad=True)
    legal = torch.rand(4000, 5) < 0.4
    legal[:, 2] |= ~legal.any(1)
    masked = Categorical(logits, legal)
    draw = masked.sample(torch.Generator().manual_seed(0))
    assert legal.gather(1, draw[:, None]).all()
    assert legal.gather(1, masked.mode()[:, None]).all()
    for row in range(30):
        own = torch.distributions.Categorical(logits=logits[row, legal[row]])
        place = int(legal[row, : draw[row]].sum())
        torch.testing.assert_close(masked.log_prob(draw)[row], own.log_prob(torch.tensor(place)))
        torch.testing.assert_close(masked.entropy()[row], own.entropy())
    (masked.entropy().sum() + masked.log_prob(draw).sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[~legal] == 0).all()


def test_a_row_without_legal_actions_stays_finite() -> None:
    dead = Categorical(torch.randn(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert dead.entropy().isfinite().all()
    assert dead.log_prob(dead.sample(torch.Generator())).isfinite().all()


def test_the_gaussian_equals_torchs() -> None:
    mean, log_std = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    mine = Gaussian(mean, log_std)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    action = mine.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(mine.entropy(), theirs.entropy())


def test_numbers_are_clipped_to_the_unit_box_and_mapped_to_the_bounds() -> None:
    bounds: Any = Box(np.array([-2, 0], np.float32), np.array([4, 1], np.float32))
    head = ActionHead(Group("g", {}, bounds, (0,)), 3, per_task=True)
    found = head.to_env(torch.tensor([[-5.0, -1.0], [0.0, 0.0], [1.0, 9.0]]))
    torch.testing.assert_close(found, torch.tensor([[-2.0, 0.0], [1.0, 0.5], [4.0, 1.0]]))


def test_heads_use_the_groups_own_task_numbers() -> None:
    group = Group("g", {}, Discrete(2), (3, 5))
    head, shared = (ActionHead(group, 4, per_task=per_task) for per_task in (True, False))
    x = torch.randn(1, 4).repeat(2, 1)
    task = torch.tensor([5, 3])
    layer: Any = head.net.layers[0]
    expected = torch.log_softmax(torch.stack([x[0] @ layer.weight[k] + layer.bias[k] for k in (1, 0)]), 1)
    torch.testing.assert_close(head(x, task).log_probs, expected)  # type: ignore[union-attr]
    same = shared(x, task).log_probs  # type: ignore[union-attr]
    torch.testing.assert_close(same[0], same[1])


def test_values_of_discrete_actions_are_read_off_by_action() -> None:
    head = ActionValueHead(Group("g", {}, Discrete(3), (3, 5)), 4, per_task=True)
    layer: Any = head.net.layers[0]
    x, place, action = torch.randn(2, 4), torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1])
    table = torch.stack([x[0] @ layer.weight[1] + layer.bias[1], x[1] @ layer.weight[0] + layer.bias[0]])
    found = head(x, torch.tensor([5, 3]), place, action)
    torch.testing.assert_close(found, torch.stack([table[1, 2], table[0, 0], table[1, 1]]))


def test_an_action_value_reads_the_action_that_the_environment_executes() -> None:
    bounds: Any = Box(-3, 3, (2,), np.float32)
    head = ActionValueHead(Group("g", {}, bounds, (0, 1)), 4, (5,), per_task=True)
    x, task, place = torch.randn(2, 4), torch.tensor([1, 0]), torch.tensor([0, 0, 1, 1])
    action = torch.tensor([[0.5, 1.0], [0.5, 7.0], [0.5, 1.0], [-0.5, 1.0]])
    found = head(x, task, place, action)
    assert found[0] == found[1], "what lies outside is clipped"
    assert len(found.unique()) == 3
    expected = head.net(torch.cat([x[place[2:]], action[2:]], 1), torch.tensor([0, 0]))[:, 0]
    torch.testing.assert_close(found[2:], expected)


def test_values_are_one_number_per_row() -> None:
    head = ValueHead(3, 4, (5,), per_task=True)
    assert head(torch.randn(6, 4), torch.tensor([2, 0, 1, 2, 2, 0])).shape == (6,)


def test_orthogonal_initialisation_reaches_every_tasks_weights() -> None:
    layer = TaskLinear(3, 8, 5)
    orthogonal_(layer, 2.0)
    for weight in layer.weight:
        torch.testing.assert_close(weight.T @ weight, 4 * torch.eye(5), atol=1e-5, rtol=1e-5)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    assert (layer.bias == 0).all()
