"""Diagnostics: known answers, and what they say about whole networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mtrl.nn.actor_critic import Rows, fold
from mtrl.nn.diagnostics import (
    conflict_metrics,
    dormant_units,
    effective_rank,
    expert_cosine,
    expert_usage,
    gradient_conflict,
    inspect,
    residual_share,
    task_similarity,
)
from mtrl.nn.heads import TaskMLP
from mtrl.nn.perception import GridCNN, NatureCNN
from mtrl.nn.trunk import TrunkConfig, make_trunk
from tests.trunks import small


def test_usage_and_similarity_of_tasks() -> None:
    weights = torch.tensor([[3.0, -1.0], [-6.0, 2.0], [1.0, 3.0], [0.0, 0.0]])
    expected = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.0, 0.0]])
    torch.testing.assert_close(expert_usage(weights), expected)
    similarity = task_similarity(weights)
    torch.testing.assert_close(similarity[0, :3], torch.tensor([1.0, -1.0, 0.0]), atol=1e-6, rtol=0)


def test_cosine_and_residual_of_experts() -> None:
    s = math.sqrt(0.5)
    outputs = torch.tensor([[[2.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 5.0]]]).expand(4, 3, 3)
    cosine = expert_cosine(outputs)
    torch.testing.assert_close(cosine, torch.tensor([[1.0, s, 0.0], [s, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(residual_share(outputs), torch.tensor([1.0, s, 1.0]))
    same = outputs.clone()
    same[:, 2] = same[:, 1]
    assert float(residual_share(same)[2]) < 1e-6


def test_effective_rank_counts_equal_directions() -> None:
    basis = torch.linalg.qr(torch.randn(50, 8))[0]
    for rank in (1, 3, 8):
        features = basis[:, :rank] @ torch.linalg.qr(torch.randn(20, rank))[0].T
        assert float(effective_rank(features)) == pytest.approx(rank, rel=1e-2)
        assert float(effective_rank(features.T)) == pytest.approx(rank, rel=1e-2)
    p = torch.tensor([3.0, 1.0]) / 4
    assert float(effective_rank(torch.diag(torch.tensor([3.0, 1.0])))) == pytest.approx(
        float((-(p * p.log()).sum()).exp())
    )
    assert float(effective_rank(torch.zeros(5, 3))) == 0


def test_dormant_units_are_those_far_below_their_layers_mean() -> None:
    activations = torch.tensor([[1.0, 0.0, 0.01, -1.0], [1.0, 0.0, 0.01, 1.0]])
    assert dormant_units(activations).tolist() == [False, True, True, False]
    assert dormant_units(activations, 0.0).tolist() == [False, True, False, False]
    assert dormant_units(torch.zeros(3, 4)).all()


def test_conflict_of_gradients() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    found = gradient_conflict(jacobian @ jacobian.T)
    torch.testing.assert_close(torch.stack(found), torch.tensor([1 / 3, -1 / 3, 4.0]))
    torch.testing.assert_close(torch.stack(gradient_conflict(torch.zeros(2, 2))), torch.tensor([0.0, 0.0, 1.0]))


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        config = TrunkConfig(**{**small(kind, 8, 6), **({"experts": 2} if kind == "moore" else {})})
        self.trunk: Any = make_trunk(config, 4, 2)
        self.head = TaskMLP(2, (self.trunk.out, 1))

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x, task), task)[:, 0]


def look(net: Net, x: torch.Tensor, task: torch.Tensor) -> dict[str, float]:
    found = inspect({"net": net, "idle": Net("shared")}, lambda: net(x, task), ["a", "b"])
    return {name.removeprefix("diagnostics/net/"): value for name, value in found.items()}


def test_inspection_of_a_mixture() -> None:
    net = Net("moore")
    first = net.trunk.layers.layers[0]
    with torch.no_grad():  # kill one unit of one expert
        first.weight[1, :, 3] = 0
        first.bias[1, 3] = -1
        net.trunk.weights.copy_(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    x, task = torch.rand(30, 4), torch.arange(30) % 2
    found = look(net, x, task)
    outputs = net.trunk.outputs(x).detach()
    assert found["expert_cosine"] == pytest.approx(float(expert_cosine(outputs)[0, 1]), rel=1e-5)
    assert found["expert_residual"] == pytest.approx(float(residual_share(outputs)[1]), rel=1e-5)
    assert found["effective_rank"] == pytest.approx(float(effective_rank(net.trunk(x, task).detach())), rel=1e-5)
    assert (found["a_weight_norm"], found["b_weight_norm"]) == (5, 2)
    assert (found["a_expert1"], found["b_expert0"]) == (pytest.approx(4 / 7), 0)
    hidden = torch.relu(first(x)).transpose(0, 1).flatten(1).detach()
    units = torch.cat((dormant_units(hidden), dormant_units(net.trunk(x, task).detach())))
    assert found["dormant"] == pytest.approx(float(units.float().mean()))
    assert found["dormant"] >= 1 / 24
    assert not net.trunk._forward_hooks


def test_experts_that_serve_rows_of_their_own_are_dormant_one_by_one() -> None:
    """A dead one, and one that no row chose, count with all of their units."""
    net = Net("moe_topk")
    x, task = torch.rand(60, 4), torch.arange(60) % 2
    alive = look(net, x, task)["dormant"]
    first, units = net.trunk.experts.layers[0], 8 + 6 + 8 + 3 * 8 + 6  # shared layers, gate, experts, sum
    with torch.no_grad():
        first.weight[1] = 0
        first.bias[1] = -1
    assert look(net, x, task)["dormant"] * units >= alive * units + 2  # some of the eight may have slept before
    with torch.no_grad():
        net.trunk.gate[-1].bias[0] = -1e9
    assert look(net, x, task)["dormant"] * units >= 16


def test_beyond_the_width_nothing_is_left_of_an_expert() -> None:
    found = residual_share(torch.randn(5, 6, 3))
    assert found.shape == (6,)
    assert found[3:].tolist() == [0, 0, 0]
    assert (found[:3] > 0).all()


def test_inspection_of_a_plain_trunk() -> None:
    net = Net("multi_head")
    found = look(net, torch.rand(9, 4), torch.arange(9) % 2)
    assert found.keys() == {"dormant", "effective_rank"}


def test_units_are_dormant_on_the_batch_not_on_what_it_holds_of_different_rows() -> None:
    """Networks compute what repeats once; a unit that is awake in one row of many still counts by its mean."""
    torch.manual_seed(0)
    net = nn.Module()
    net.perception = nn.Module()
    net.perception.image = cnn = GridCNN((1, 5, 5), (8,), (6, 6))
    rare, common = torch.randint(0, 8, (2, 1, 1, 5, 5), dtype=torch.uint8)
    x = torch.cat((rare, common.expand(199, -1, -1, -1)))

    def measure(forward: Callable[[], object]) -> float:
        return inspect({"net": net}, forward, [])["diagnostics/net/dormant"]

    found = measure(lambda: cnn(x))
    with torch.no_grad():
        hidden = torch.relu(cnn.convs[0](cnn.cells[x[:, 0].long()].permute(0, 3, 1, 2)))
        last = torch.tanh(cnn.convs[2](hidden))
    units = [dormant_units(layer.permute(0, 2, 3, 1).flatten(0, 2)) for layer in (hidden, last)]
    assert found == float(torch.cat(units).float().mean())
    rows = Rows(
        {"g": {"image": x[None]}}, torch.zeros(1, 200, dtype=torch.int64), torch.zeros(1, 200, dtype=torch.bool)
    )
    seen = [fold(rows)]
    inspect({"net": net}, lambda: (cnn(x), seen.append(fold(rows))), [])
    assert [folded is None for folded in (*seen, fold(rows))] == [False, True, False]


def test_every_activation_layer_is_seen() -> None:
    nature = nn.Module()
    nature.perception = cnn = NatureCNN((3, 40, 40))
    x, units = torch.randint(0, 256, (40, 3, 40, 40), dtype=torch.uint8), 32 + 64 + 64 + 512

    def dormant(net: nn.Module, forward: Callable[[], object]) -> float:
        return inspect({"net": net}, forward, ["a", "b"])["diagnostics/net/dormant"]

    alive = dormant(nature, lambda: cnn(x))
    nn.init.constant_(cnn.linear.bias, -100)
    assert dormant(nature, lambda: cnn(x)) * units >= max(512, alive * units)
    latents, task = torch.rand(40, 4), torch.arange(40) % 2
    for kind in ("soft_modules", "film", "moe_topk", "moore", "moe", "care", "paco", "shared"):
        net = Net(kind)
        for name, parameter in net.trunk.named_parameters():
            if name != "weights":  # of a mixture or PaCo: of what is silent
                nn.init.constant_(parameter, 0)
        assert dormant(net, lambda net=net: net.trunk(latents, task)) == 1, kind


def test_conflict_metrics_see_shared_parameters_and_leave_the_graph_usable() -> None:
    net = Net("moore")
    x = torch.rand(1, 4).expand(6, 4)
    task = torch.tensor([0, 0, 0, 1, 1, 1])
    with torch.no_grad():  # equal weights and heads: the tasks differ in the sign of their loss alone
        for parameter in (net.trunk.weights, net.head.layers[0].weight, net.head.layers[0].bias):
            parameter[1] = parameter[0]  # type: ignore[index]
    loss = net(x, task) * torch.where(task == 0, 1.0, -3.0)
    found = conflict_metrics("net", loss, task, net)
    expected = {"negative": 1, "cosine": -1, "imbalance": 3}
    assert found == pytest.approx({f"diagnostics/net/gradient_{k}": v for k, v in expected.items()}, rel=1e-4)
    loss.mean().backward()


def test_there_is_no_conflict_of_one_task_or_without_shared_parameters() -> None:
    net, x = Net("moore"), torch.rand(3, 4)
    one = torch.zeros(3, dtype=torch.int64)
    assert conflict_metrics("net", net(x, one), one, net) == {}
    assert conflict_metrics("head", net(x, one), torch.tensor([0, 1, 1]), nn.Identity()) == {}


def test_ranks_are_those_of_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 1, generator=generator) @ torch.randn(1, 200, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(effective_rank(features)) < 1.5
