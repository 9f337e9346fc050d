"""Soft modules, CARE, PaCo, FiLM and gated experts against plain formulas, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtrl.nn.actor_critic import orthogonal_
from mtrl.nn.heads import TaskMLP
from mtrl.nn.trunk import TrunkConfig, make_trunk
from mtrl.nn.trunk.paco import start_alike_
from mtrl.nn.trunk.topk import balance_loss

TASK = torch.tensor([0, 2, 1, 1, 2, 0, 0])
KINDS: dict[str, dict[str, Any]] = {
    "soft_modules": {"widths": (12, 10, 8), "experts": 3, "encoder": (16,), "gate": (6,)},
    "care": {"widths": (12,), "experts": 3, "encoder": (9, 8), "context": 5},
    "paco": {"widths": (12, 8), "experts": 3},
    "film": {"widths": (12,), "encoder": (9, 8), "context": 5},
    "moe_topk": {"widths": (12,), "experts": 5, "top_k": 2, "gate": (6,), "expert_width": 7},
}


def build(kind: str, **fields: Any) -> Any:
    return make_trunk(TrunkConfig(kind=kind, **{**KINDS[kind], **fields}), 6, 3).double()  # type: ignore[arg-type]


def latents() -> torch.Tensor:
    return torch.randn(len(TASK), 6, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_neighbours_and_tasks_differ(kind: str) -> None:
    trunk, x = build(kind), latents()
    for parameter in trunk.parameters():  # away from neutral starts
        nn.init.uniform_(parameter, -0.5, 0.5)
    out = trunk(x, TASK)
    assert out.shape == (len(TASK), trunk.out)
    single = torch.cat([trunk(x[i : i + 1], TASK[i : i + 1]) for i in range(len(TASK))])
    torch.testing.assert_close(single, out)
    assert not torch.allclose(trunk(x, (TASK + 1) % 3), out)
    assert trunk(x[:0], TASK[:0]).shape == (0, trunk.out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: str) -> None:
    trunk = build(kind)
    orthogonal_(trunk, 2**0.5)
    for _ in range(2):  # FiLM's embedding learns from the second step on
        trunk.zero_grad()
        (trunk(latents(), TASK) * torch.randn(len(TASK), trunk.out)).sum().backward()
        with torch.no_grad():
            for parameter in trunk.parameters():
                assert torch.isfinite(parameter.grad).all()
                parameter -= 0.1 * parameter.grad
    assert [name for name, p in trunk.named_parameters() if not p.grad.any()] == []


def test_soft_modules_follow_the_published_cascade() -> None:
    trunk, x = build("soft_modules"), latents()
    for row, task, found in zip(x, TASK, trunk(x, TASK), strict=True):
        h = trunk.encoder(row)
        g = trunk.gate(F.relu(h * (trunk.task.weight[:, task] + trunk.task.bias)))
        m = [F.relu(h) @ trunk.layers[0].weight[j] + trunk.layers[0].bias[j] for j in range(3)]
        c, seen = g, []
        for level in range(2):
            p = torch.softmax(trunk.routes[level](F.relu(c)).view(3, 3), 1)
            seen.append(p.flatten())
            read = [F.relu(sum((p[j, i] * m[i] for i in range(3)), torch.zeros(()))) for j in range(3)]
            layer = trunk.layers[level + 1]
            m = [read[j] @ layer.weight[j] + layer.bias[j] for j in range(3)]
            c = trunk.conditions[level](torch.cat(seen)) * g
        last = torch.softmax(trunk.last(F.relu(c)), 0)
        torch.testing.assert_close(found, F.relu(sum((last[i] * m[i] for i in range(3)), torch.zeros(()))))


def test_routing_starts_even() -> None:
    trunk = build("soft_modules")
    orthogonal_(trunk, 2**0.5)
    routing = torch.softmax(trunk.routes[0](torch.rand(5, 6, dtype=torch.float64)).view(5, 3, 3), 2)
    torch.testing.assert_close(routing, torch.full_like(routing, 1 / 3), atol=1e-2, rtol=0)


def test_care_mixes_encoders_by_the_tasks_attention() -> None:
    trunk, x = build("care"), latents()
    z = trunk.context()
    weights = torch.softmax(trunk.attention(z), 1)
    first, second = trunk.encoders.layers
    for row, task, found in zip(x, TASK, trunk(x, TASK), strict=True):
        codes = [F.relu(row @ first.weight[k] + first.bias[k]) @ second.weight[k] + second.bias[k] for k in range(3)]
        e = sum((weights[task, k] * codes[k] for k in range(3)), torch.zeros(()))
        torch.testing.assert_close(found, trunk.layers(torch.cat((e, z[task]))))


def test_cares_attention_sends_no_gradient_into_the_embedding() -> None:
    trunk, x = build("care", widths=()), latents()
    trunk(x, TASK)[:, :8].sum().backward()  # without layers, the features are the mixture and z
    assert trunk.attention[0].weight.grad.any()
    assert trunk.context.embedding.grad is None or not trunk.context.embedding.grad.any()


def test_pacos_composed_network_equals_the_sum_over_its_sets() -> None:
    trunk, x = build("paco"), latents()
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter))
    head = nn.Linear(trunk.out, 4, bias=False).double()
    sets = head.weight.view(4, -1)  # columns: K blocks of D for A_k, then K for b_k
    for row, task, features in zip(x, TASK, trunk(x, TASK), strict=True):
        w, h = trunk.weights[task], row
        for matrix, bias in zip(trunk.matrices, trunk.biases, strict=True):
            h = F.relu(sum((w[k] * (h @ matrix[k] + bias[k]) for k in range(3)), torch.zeros(())))
        outputs = [sets[:, 8 * k : 8 * k + 8] @ h + sets[:, 24 + k] for k in range(3)]
        expected = sum((w[k] * outputs[k] for k in range(3)), torch.zeros(()))
        torch.testing.assert_close(head(features), expected)


def test_paco_starts_as_one_network_for_all_tasks() -> None:
    trunk = build("paco", experts=20)
    assert all(torch.equal(m, m[:1].expand_as(m)) for m in trunk.matrices)
    torch.testing.assert_close(trunk.weights.sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("start", ["as it comes", "orthogonal"])
def test_pacos_heads_start_as_one_ordinary_layer(start: str) -> None:
    torch.manual_seed(0)
    trunk = make_trunk(TrunkConfig(kind="paco", widths=(64,), experts=20), 6, 3)
    head, plain = TaskMLP(1, (trunk.out + 2, 8)), TaskMLP(1, (64, 8))  # beside the features, an action
    if start == "orthogonal":
        orthogonal_(head, 0.5)
        orthogonal_(plain, 0.5)
    beside = head.layers[0].weight[:, -2:].clone()  # type: ignore[index]
    start_alike_(trunk, head)
    assert torch.equal(head.layers[0].weight[:, -2:], beside)  # type: ignore[index]
    x, task = torch.randn(3, 6), torch.arange(3)
    features = torch.cat([trunk(row.expand(3, 6), task) for row in x])
    found = head(torch.cat((features, torch.zeros(9, 2)), 1), torch.zeros(9, dtype=torch.int64)).view(3, 3, 8)
    torch.testing.assert_close(found, found[:, :1].expand_as(found))  # whatever the task
    composed = (head.layers[0].weight.detach()[0, : -20 - 2].view(20, 64, 8) / 20).sum(0)  # type: ignore[index, operator]
    assert float(composed.std()) == pytest.approx(float(plain.layers[0].weight.detach().std()), rel=0.2)  # type: ignore[operator]
    start_alike_(build("care"), plain)  # touches no other


@pytest.mark.parametrize("modulation", ["channel", "scalar"])
def test_film_is_the_plain_encoder_at_first_and_scales_and_shifts_later(modulation: str) -> None:
    trunk, x = build("film", modulation=modulation), latents()
    orthogonal_(trunk, 2**0.5)  # as PPO does; it must leave the neutral start alone
    one, two = trunk.encoder
    z = trunk.context()

    def expected(gammas: Any, betas: Any) -> torch.Tensor:
        h = gammas[0] * F.relu(one(x)) + betas[0]
        return trunk.layers(torch.cat((gammas[1] * two(h) + betas[1], z[TASK]), 1))

    torch.testing.assert_close(trunk(x, TASK), expected((1, 1), (0, 0)))
    nn.init.normal_(trunk.modulation)
    change = (F.relu(trunk.hidden(z)) @ trunk.modulation)[TASK]
    sizes = (9, 8) if modulation == "channel" else (1, 1)
    assert change.shape == (len(TASK), 2 * sum(sizes))
    a, b, c, d = change.split((*sizes, *sizes), 1)
    torch.testing.assert_close(trunk(x, TASK), expected((1 + a, 1 + b), (c, d)))


def test_gated_experts_equal_all_experts_masked() -> None:
    trunk, x = build("moe_topk"), latents()
    h = trunk.layers(x)
    gates = trunk.gates(h, TASK).double()
    chosen = gates >= gates.sort(1, descending=True).values[:, 1:2]
    weights = gates * chosen / (gates * chosen).sum(1, keepdim=True)
    all_experts = torch.stack([trunk.experts(h, torch.full((len(h),), k)) for k in range(5)], 1)
    torch.testing.assert_close(trunk(x, TASK), F.relu((weights[:, :, None] * all_experts).sum(1)), rtol=1e-6, atol=1e-6)


def test_the_balance_loss_reaches_the_gate_alone_and_only_while_it_learns() -> None:
    even, sharp = torch.full((4, 4), 0.25), torch.eye(4)
    torch.testing.assert_close(balance_loss(even), torch.tensor(4.0).log())
    torch.testing.assert_close(balance_loss(sharp), torch.tensor(0.0))
    torch.testing.assert_close(balance_loss(sharp[:1].expand(4, 4)), torch.tensor(3 / 16))

    x = latents().requires_grad_()
    trunk = build("moe_topk", balance=10.0)
    (trunk(x, TASK) * 0).sum().backward()  # the main loss says nothing
    assert trunk.gate[0].weight.grad.any()
    assert not any(p.grad.any() for name, p in trunk.named_parameters() if not name.startswith(("gate", "task")))
    assert x.grad is not None
    assert not x.grad.any()

    trunk.requires_grad_(False)  # a frozen critic passes the actor's gradient on and nothing else
    x.grad = None
    (trunk(x, TASK) * 0).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("paco", {"widths": ()}, "paco needs layers to compose"),
        ("soft_modules", {"widths": ()}, "set trunk.widths"),
        ("soft_modules", {"gate": ()}, "trunk.gate"),
        ("film", {"encoder": ()}, "film needs trunk.encoder"),
    ],
)
def test_missing_layers_are_named(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **fields)
