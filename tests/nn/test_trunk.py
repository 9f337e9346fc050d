"""Trunks know the task exactly when they say so, have the published sizes, and equal the plain formulas."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete
from pydantic import ValidationError
from torch import Tensor, nn

from mtrl import registry
from mtrl.nn.actor_critic import Body, PolicyNet, Rows, ValueNet
from mtrl.nn.aggregation import task_parameters
from mtrl.nn.heads import TaskMLP
from mtrl.nn.perception import PerceptionConfig
from mtrl.nn.trunk import Memory, TrunkConfig, make_trunk
from mtrl.spaces import make_spec
from mtrl.types import Group, Spec, TaskInfo


def test_the_shared_trunk_tells_tasks_apart_and_the_multi_head_trunk_does_not() -> None:
    x = torch.randn(1, 6).repeat(2, 1)
    task = torch.tensor([0, 2])
    shared = make_trunk(TrunkConfig(kind="shared", widths=(8,)), 6, 3)
    multi = make_trunk(TrunkConfig(kind="multi_head", widths=(8,)), 6, 3)
    assert (shared.per_task, multi.per_task) == (False, True)
    assert shared(x, task).shape == multi(x, task).shape == (2, 8)
    assert not torch.allclose(*shared(x, task))
    torch.testing.assert_close(*multi(x, task))


def test_without_layers_a_trunk_hands_on_the_latents() -> None:
    x, task = torch.randn(2, 6), torch.tensor([0, 2])
    multi, shared = (make_trunk(TrunkConfig(kind=kind), 6, 3) for kind in ("multi_head", "shared"))  # type: ignore[arg-type]
    torch.testing.assert_close(multi(x, task), x)
    torch.testing.assert_close(shared(x, task), torch.cat((x, torch.tensor([[1.0, 0, 0], [0, 0, 1]])), 1))
    assert (multi.out, shared.out) == (6, 9)


def test_the_memory_is_torchs_gru_and_a_running_maximum_between_resets() -> None:
    memory, gru = Memory(3, 9), nn.GRUCell(3, 5)
    keep = torch.cat((torch.zeros(5), memory.keep.detach(), torch.zeros(5)))
    gru.load_state_dict(
        {
            "weight_ih": memory.input.weight[:15],
            "bias_ih": memory.input.bias[:15] + keep,
            "weight_hh": memory.hidden.weight,
            "bias_hh": memory.hidden.bias,
        }
    )
    x, state = torch.randn(6, 2, 3), torch.randn(2, 9)
    first = torch.zeros(6, 2, dtype=torch.bool)
    first[3, 0] = first[0, 1] = True
    out, last = memory(memory.read(x), first, state)
    for t in range(6):
        state = torch.where(first[t][:, None], torch.zeros(()), state)
        sight = torch.tanh(x[t] @ memory.input.weight[15:].T + memory.input.bias[15:])
        state = torch.cat((gru(x[t], state[:, :5]), torch.maximum(state[:, 5:], sight)), 1)
        torch.testing.assert_close(out[t], state)
    torch.testing.assert_close(last, state)


def test_the_memorys_gradient_is_that_of_its_steps() -> None:
    memory = Memory(3, 9).double()
    read = torch.randn(7, 4, 3 * 5 + 4, dtype=torch.float64)
    read[3] = read[2]  # the maximum meets its equal
    first, state = torch.rand(7, 4) < 0.3, torch.randn(4, 9, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (read, state)] + [*memory.hidden.parameters(), memory.keep]

    def step_by_step() -> Tensor:
        outputs, now = [], state
        for x, start in zip(read, first, strict=True):
            short, peak = now.masked_fill(start[:, None], 0).split((5, 4), 1)
            (reset_x, update_x, new_x), said = x[:, :15].chunk(3, 1), memory.hidden(short).chunk(3, 1)
            update = torch.sigmoid(update_x + said[1] + memory.keep)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + said[0]) * said[2])
            now = torch.cat(((1 - update) * new + update * short, torch.maximum(peak, x[:, 15:].tanh())), 1)
            outputs.append(now)
        return torch.stack(outputs)

    found, last = memory(read, first, state)
    expected = step_by_step()
    torch.testing.assert_close(found, expected)
    weights = torch.randn(7, 4, 9, dtype=torch.float64)
    mine = torch.autograd.grad((found * weights).sum() + last.square().sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum() + expected[-1].square().sum(), inputs)
    assert all(bool(x.any()) for x in theirs)
    torch.testing.assert_close(mine, theirs)


def test_what_the_memory_saw_first_still_gets_its_gradient_at_the_end() -> None:
    memory = Memory(4, 8)
    nn.init.zeros_(memory.input.bias)
    nn.init.constant_(memory.input.weight, 0.1)
    x = torch.zeros(50, 1, 4)
    x[0, 0] = torch.tensor([3.0, -1.0, 2.0, 0.0])
    x.requires_grad_()
    out, _ = memory(memory.read(x), torch.zeros(50, 1, dtype=torch.bool), torch.zeros(1, 8))
    out[-1, 0, 4:].sum().backward()
    assert x.grad is not None
    slope = 1 - np.tanh(0.4) ** 2  # of the tanh at 0.1 * (3 - 1 + 2), for each of four units
    torch.testing.assert_close(x.grad[0, 0], torch.full((4,), 4 * 0.1 * slope))
    assert not x.grad[1:].any()


def test_the_memorys_units_start_with_time_constants_from_2_to_64_steps() -> None:
    keep = torch.sigmoid(Memory(4, 512).keep)
    span = 1 / (1 - keep)  # a leaky unit that keeps this share per step
    assert 2 <= span.min() < 6
    assert 55 < span.max() <= 64


def trunk(num_tasks: int = 3, width: int = 6, **fields: Any) -> Any:
    return make_trunk(TrunkConfig(**fields), width, num_tasks)


def test_the_single_head_trunk_appends_the_task_to_its_features() -> None:
    x, task = torch.randn(1, 6).repeat(2, 1), torch.tensor([0, 2])
    single = trunk(kind="single_head", widths=(8,))
    out = single(x, task)
    assert (single.per_task, single.out, out.shape) == (False, 11, (2, 11))
    torch.testing.assert_close(out[0, :8], out[1, :8])
    torch.testing.assert_close(out[:, 8:], torch.tensor([[1.0, 0, 0], [0, 0, 1]]))


def mix(found: Any, outputs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    """Reference: Gram-Schmidt and sum, one row after the other."""
    rows = []
    for u, t in zip(outputs, task, strict=True):
        basis: list[torch.Tensor] = []
        for one in u:
            rest = one - sum(((one @ q) * q for q in basis), torch.zeros(()))
            basis.append(rest / rest.norm() if found.orthogonal else one)
        rows.append(sum(w * q for w, q in zip(found.weights[t], basis, strict=True)))
    return torch.tanh(torch.stack(rows))


@pytest.mark.parametrize("kind", ["moe", "moore"])
def test_mixtures_equal_the_published_formula(kind: str) -> None:
    found = trunk(kind=kind, widths=(12, 10), experts=3)
    x, task = torch.randn(8, 6), torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])
    h = [F.relu(x @ found.layers.layers[0].weight[k] + found.layers.layers[0].bias[k]) for k in range(3)]
    u = [h[k] @ found.layers.layers[1].weight[k] + found.layers.layers[1].bias[k] for k in range(3)]
    if kind == "moe":
        expected = torch.tanh((found.weights[task][:, :, None] * torch.stack(u, 1)).sum(1))
    else:
        expected = mix(found, torch.stack(u, 1), task)
    torch.testing.assert_close(found(x, task), expected, rtol=0, atol=2e-5)


def test_moe_with_one_expert_of_weight_one_is_the_multi_head_net() -> None:
    moe, multi = trunk(kind="moe", widths=(12, 10), experts=1), trunk(kind="multi_head", widths=(12, 10))
    with torch.no_grad():
        moe.weights.fill_(1)
        for own, layer in zip(moe.layers.layers, (multi.layers[0], multi.layers[2]), strict=True):
            layer.weight.copy_(own.weight[0].T)
            layer.bias.copy_(own.bias[0])
    x, task = torch.randn(8, 6), torch.randint(0, 3, (8,))
    torch.testing.assert_close(moe(x, task), torch.tanh(multi.layers[:3](x)))


def test_two_mixtures_of_different_size_live_side_by_side() -> None:
    one, two = trunk(kind="moore", widths=(8,), experts=2), trunk(kind="moore", widths=(8,), experts=5)
    x, task = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    before = one(x, task)
    two(x, task)
    torch.testing.assert_close(one(x, task), before)
    norm = torch.atanh(before).norm(dim=1)
    torch.testing.assert_close(norm, one.weights[task].norm(dim=1), rtol=1e-4, atol=1e-5)  # |a| = |w_t|


def test_training_one_task_leaves_the_others_weights_alone() -> None:
    found = trunk(kind="moore", widths=(8,), experts=2)
    found(torch.randn(5, 6), torch.full((5,), 1)).sum().backward()
    assert found.weights.grad[1].abs().min() > 0
    assert (found.weights.grad[[0, 2]] == 0).all()


def grid_spec(tasks: int, direction: bool = False) -> Spec:
    high = np.broadcast_to(np.array([10, 5, 2], np.uint8)[:, None, None], (3, 7, 7))
    box = Box(np.zeros_like(high), high, dtype=np.uint8)  # pyright: ignore[reportArgumentType]
    infos = tuple(TaskInfo(f"t{i}", "g", 5) for i in range(tasks))
    leaves = {"vector": Box(0, 1, (4,)), "image": box} if direction else {"image": box}
    return Spec(infos, (Group("g", leaves, Discrete(7), tuple(range(tasks))),))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("tasks", "experts", "actor", "critic"),
    [(3, 2, 417_403, 415_081), (5, 3, 692_162, 688_292), (7, 4, 966_925, 961_507)],
)
@pytest.mark.parametrize("kind", ["moore", "moe"])
def test_minigrid_networks_have_the_published_size(
    kind: Any, tasks: int, experts: int, actor: int, critic: int
) -> None:
    spec = grid_spec(tasks, direction=True)
    perception = PerceptionConfig(grid="cast", channels=(), ignore=("vector",))
    config = TrunkConfig(kind=kind, experts=experts, channels=(16, 32, 64))
    body = Body(spec, perception, config)
    assert size(body) == experts * 10_544 + experts * tasks
    assert size(PolicyNet(spec, body, (128,), "tanh")) == actor
    assert size(ValueNet(spec, body, body, (128,), "tanh")) == critic


@pytest.mark.parametrize(("tasks", "actor"), [(3, 406_853), (5, 671_059), (7, 935_265)])
def test_the_multi_head_baseline_has_the_published_size(tasks: int, actor: int) -> None:
    body = Body(grid_spec(tasks), PerceptionConfig(grid="cast"), TrunkConfig(kind="multi_head"))
    assert size(PolicyNet(grid_spec(tasks), body, (128,), "tanh")) == actor


@pytest.mark.parametrize(
    ("tasks", "experts", "critic", "actor"), [(10, 4, 1_357_650, 1_379_320), (50, 6, 2_050_750, 2_181_500)]
)
def test_metaworld_networks_have_the_published_size(tasks: int, experts: int, critic: int, actor: int) -> None:
    config = TrunkConfig(kind="moore", experts=experts, widths=(400, 400, 400))
    for width, out, expected in ((43, 1, critic), (39, 8, actor)):
        assert size(make_trunk(config, width, tasks)) + size(TaskMLP(tasks, (400, out))) == expected


@pytest.mark.parametrize("grid", ["onehot", "cast"])
def test_convolutional_experts_see_the_view_as_perception_does(grid: Any) -> None:
    spec = grid_spec(2)
    trunk = TrunkConfig(kind="moe", experts=1, channels=(4, 5))
    body = Body(spec, PerceptionConfig(grid=grid, channels=()), trunk)
    plain = Body(spec, PerceptionConfig(grid=grid, channels=(4, 5)), TrunkConfig(kind="multi_head"))
    mixture, encoder = cast(Any, body.trunk), cast(Any, plain.perception.groups["g"]).encoders["image"]
    with torch.no_grad():
        mixture.weights.fill_(1)
        for own, conv in zip(mixture.convs.layers, (encoder.convs[0], encoder.convs[2]), strict=True):
            conv.weight.copy_(own.weight[0])
            conv.bias.copy_(own.bias[0])
    image = torch.stack([torch.randint(0, high, (1, 6, 7, 7)) for high in (11, 6, 3)], 2).to(torch.uint8)
    rows = Rows({"g": {"image": image}}, torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.bool))
    mine, theirs = body(rows)[0][0], plain(rows)[0][0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_beside_the_view_passes_by_the_experts() -> None:
    config = TrunkConfig(kind="moore", experts=2, channels=(4, 5))
    body = Body(grid_spec(2, direction=True), PerceptionConfig(channels=()), config)
    image, vector = torch.zeros(1, 3, 3, 7, 7, dtype=torch.uint8), torch.randn(1, 3, 4)
    task, first = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool)
    features = body(Rows({"g": {"vector": vector, "image": image}}, task, first))[0]
    assert features.shape == (1, 3, 4 + 5 * 25)
    torch.testing.assert_close(features[..., :4], vector)
    torch.testing.assert_close(features[:, 0, 4:], features[:, 1, 4:])  # the picture is the same


def test_memory_stands_behind_a_mixture() -> None:
    body = Body(grid_spec(2), PerceptionConfig(), TrunkConfig(kind="moore", experts=2, widths=(16,)), memory=8)
    image = torch.zeros(4, 3, 3, 7, 7, dtype=torch.uint8)
    first = torch.zeros(4, 3, dtype=torch.bool)
    rows = Rows({"g": {"image": image}}, torch.ones(4, 3, dtype=torch.int64), first)
    features, state = body(rows, torch.zeros(3, 8))
    assert features.shape == (4, 3, 16 + 8)  # the trunk's go around the memory
    features.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in body.parameters())
    torch.testing.assert_close(state * 2**0.5, features[-1, :, 16:])  # 16 features and 8 of the memory: equally loud
    torch.testing.assert_close(features[..., :16].std(-1, correction=0), torch.ones(4, 3), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "moore"}, "need layers"),
        ({"kind": "moore", "channels": (16,)}, r"set perception.channels=\[\]"),
        ({"kind": "moore", "widths": (3,), "experts": 4}, "4 experts cannot be orthogonal in 3 dimensions"),
    ],
)
def test_experts_that_cannot_be_built_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trunk(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "multi_head", "experts": 3}, "multi_head does not read experts; moe, moore, .* leave it out"),
        ({"kind": "moore", "layer_norm": True}, "moore does not read layer_norm; shared, "),
        ({"kind": "moe_topk", "experts": 3}, "top_k=4 of experts=3"),
    ],
)
def test_fields_that_would_be_ignored_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrunkConfig(**fields)


def test_all_of_a_memory_is_shared_among_tasks() -> None:
    spec = grid_spec(2)
    body = Body(spec, PerceptionConfig(), TrunkConfig(kind="moore", experts=2, widths=(16,)), memory=8)
    net = ValueNet(spec, body, body, (8,), "tanh")
    own = {id(p) for p in task_parameters(net)[1]}
    names = {name.split(".")[1] for name, p in net.named_parameters() if name.startswith("body") and id(p) not in own}
    assert names == {"perception", "trunk", "memory"}
    assert not own & {id(p) for p in body.memory.parameters()}  # type: ignore[union-attr]


def test_a_memory_of_raw_observations_keeps_their_scale() -> None:
    spec = make_spec(registry.tasks("mtrl.testing:Probes/memory"))
    body = Body(spec, PerceptionConfig(), TrunkConfig(kind="shared"), memory=8)
    vector = torch.tensor([[[3.0, -4.0]]])
    rows = Rows(
        {spec.groups[0].name: {"vector": vector}}, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool()
    )
    features, state = body(rows, torch.zeros(1, 8))
    torch.testing.assert_close(features[0, 0, :2], vector[0, 0])
    torch.testing.assert_close(features[0, :, -8:], state)
