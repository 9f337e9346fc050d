"""Folding: rows that repeat are computed once, and nobody can tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from mtrl.nn import actor_critic
from mtrl.nn.actor_critic import Body, PolicyNet, Rows, Scene, ValueNet, appraise, decide, evaluate, fold, label
from mtrl.nn.heads import Shared
from mtrl.nn.perception import PerceptionConfig
from mtrl.nn.trunk import TrunkConfig
from mtrl.types import Group, Spec, TaskInfo

IMAGE = Box(0, 10, (3, 7, 7), np.uint8)
VECTOR = Box(-1, 1, (4,), np.float32)
LEGAL = Box(0, 1, (5,), np.bool_)  # pyright: ignore[reportCallIssue, reportArgumentType]


def info(name: str, group: str) -> TaskInfo:
    return TaskInfo(name=name, group=group, horizon=10, score=(0.0, 1.0))


SPEC = Spec(
    tasks=(info("a", "grid"), info("b", "grid"), info("c", "arm")),
    groups=(
        Group("arm", {"vector": VECTOR}, Box(-1, 1, (2,), np.float32), (2,)),
        Group("grid", {"image": IMAGE, "vector": VECTOR, "legal": LEGAL}, Discrete(5), (0, 1)),
    ),
)


def make_rows(t: int = 8, views: int = 20) -> Rows:
    """[t, 40 arm + 40 grid]: the arm's rows all differ, the grid's are drawn from few views."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(views, (t, 40), generator=generator)
    images = torch.randint(0, 10, (views, 3, 7, 7), generator=generator, dtype=torch.uint8)
    codes = torch.eye(4)[torch.arange(views) % 4]
    legal = torch.rand(views, 5, generator=generator) < 0.6
    arm = torch.rand(t, 40, 4, generator=generator)
    task = torch.cat([torch.full((t, 40), 2), torch.randint(2, (t, 40), generator=generator)], 1)
    grid = {"image": images[picks], "vector": codes[picks], "legal": legal[picks]}
    return Rows({"arm": {"vector": arm}, "grid": grid}, task, torch.zeros(t, 80, dtype=torch.bool))


def make_nets(memory: int = 0, *, action_values: bool = False) -> tuple[PolicyNet, ValueNet]:
    torch.manual_seed(0)
    perception, trunk = PerceptionConfig(width=16, channels=(4, 8)), TrunkConfig(kind="multi_head", widths=(12,))
    body, own = (Body(SPEC, perception, trunk, memory) for _ in range(2))
    return PolicyNet(SPEC, body, (8,), "tanh", action_values=action_values), ValueNet(SPEC, own, own, (8,), "tanh")


def test_every_row_finds_itself_among_fewer() -> None:
    rows = make_rows()
    found = fold(rows)
    assert found is not None
    assert found.place.shape == rows.task.shape
    for leaf, x in rows.leaves["grid"].items():
        alone = found.rows.leaves["grid"][leaf][0]
        assert torch.equal(alone[found.place[:, 40:] - 320], x)  # the arm's 8 * 40 rows come first, all of them
        assert len(alone) == 48, "20 views of two tasks, with room for 24 each"
    assert torch.equal(found.rows.leaves["arm"]["vector"][0], rows.leaves["arm"]["vector"].flatten(0, 1))
    assert torch.equal(found.rows.task[0][found.place], rows.task)
    assert bool((found.rows.task[0, 320:].diff() >= 0).all()), "sorted by task within the group"


def test_spare_rows_follow_each_tasks_own() -> None:
    image = torch.zeros(1, 300, 3, 7, 7, dtype=torch.uint8)
    image[0, :, 0, 0, 0] = torch.arange(300) % 10
    task = (torch.arange(300) % 10 == 9).long()[None]  # nine views of one task, one of the other
    found = fold(Rows({"grid": {"image": image}}, task, torch.zeros(1, 300, dtype=torch.bool)))
    assert found is not None
    views, place = found.rows.leaves["grid"]["image"][0, :, 0, 0, 0], found.place[0]
    assert found.rows.task.tolist() == [[0] * 16 + [1] * 8]
    assert sorted(views[:9].tolist()) == list(range(9))
    assert views[9:16].tolist() == [int(views[8])] * 7
    assert views[16:].tolist() == [9] * 8
    assert set(place.tolist()) == {*range(9), 16}


def test_labels_of_all_rows_fold_a_part_of_them_as_it_would_be_alone() -> None:
    rows = make_rows()
    same = label(rows)
    assert list(same) == ["grid"]
    picked = torch.arange(3, 7)
    leaves = {g: {leaf: x[picked] for leaf, x in own.items()} for g, own in rows.leaves.items()}
    part = Rows(leaves, rows.task[picked], rows.first[picked])
    found, expected = fold(part._replace(same={"grid": same["grid"][picked]})), fold(part)
    assert found is not None
    assert expected is not None
    assert torch.equal(found.place, expected.place)
    assert torch.equal(found.rows.task, expected.rows.task)
    for group, own in found.rows.leaves.items():
        for leaf, x in own.items():
            assert torch.equal(x, expected.rows.leaves[group][leaf])
    assert fold(part._replace(same={})) is None


def test_rows_that_differ_in_one_number_stay_apart() -> None:
    image = torch.zeros(1, 200, 3, 7, 7, dtype=torch.uint8)
    image[0, 7, 2, 6, 6] = 1
    vector = torch.zeros(1, 200, 4)
    vector[0, 9, 3] = 1e-30
    legal = torch.ones(1, 200, 5, dtype=torch.bool)
    task = torch.zeros(1, 200, dtype=torch.int64)
    task[0, 11] = 1
    leaves = {"grid": {"image": image, "vector": vector, "legal": legal}}
    found = fold(Rows(leaves, task, torch.zeros(1, 200, dtype=torch.bool)))
    assert found is not None
    assert found.rows.task.tolist() == [[0] * 8 + [1] * 8]
    assert len({int(found.place[0, i]) for i in (0, 7, 9, 11)}) == 4


@pytest.mark.parametrize("rows", [make_rows(t=1), make_rows(views=10_000)], ids=["few rows", "few repetitions"])
def test_nothing_to_gain(rows: Rows) -> None:
    assert fold(rows) is None


def test_fingerprints_that_collide_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "random_", lambda self, generator: self.zero_())  # all rows look the same
    assert fold(make_rows()) is None


@pytest.mark.parametrize("memory", [0, 6])
def test_folding_changes_neither_outputs_nor_gradients(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    rows, (policy, critic) = make_rows(), make_nets(memory)
    state = {name: torch.zeros(80, memory) for name in ("actor", "critic")} if memory else {}

    def run() -> tuple[list[Tensor], list[Tensor]]:
        policies, value = evaluate(policy, critic, rows, state)
        logits = policies["grid"].log_probs.clamp(min=-1e9)  # type: ignore[attr-defined]
        outputs = [value, logits, policies["arm"].mean, policies["grid"].entropy()]  # type: ignore[attr-defined]
        weights = torch.linspace(-1, 1, value.numel()).view_as(value)
        loss = (value * weights).sum() + policies["grid"].log_prob(policies["grid"].mode()).square().mean()
        nets = [*policy.parameters(), *critic.parameters()]
        return outputs, [g for g in torch.autograd.grad(loss, nets, allow_unused=True) if g is not None]

    assert fold(rows) is not None
    folded = run()
    monkeypatch.setattr(actor_critic, "FEW", 10**9)
    assert fold(rows) is None
    for one, two in zip(folded, run(), strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [0, 6])
def test_folded_rows_give_the_same_action_values_and_gradients(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    policy, _ = make_nets(memory, action_values=True)
    rows = make_rows()
    action = {"arm": torch.rand(8, 40, 2), "grid": torch.randint(5, (8, 40))}
    answers = []
    for folds in (True, False):
        if not folds:
            monkeypatch.setattr(actor_critic, "fold", lambda rows: None)
        scene = Scene.of(rows, {"actor": torch.zeros(80, memory)} if memory else {})
        assert (scene.folded is not None) == (folds and not memory)
        _, features = decide(policy, scene)
        assert isinstance(features, Shared) == (folds and bool(memory))
        told = appraise(policy, scene, features, action)
        assert told.shape == (8, 80)
        told.square().mean().backward()
        answers.append([told.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
        policy.zero_grad()
    assert len(answers[0]) == len(answers[1]) > len(list(policy.action_values.parameters()))
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_group_without_rows_shares_nothing() -> None:
    policy, critic = make_nets(6, action_values=True)
    rows = make_rows()
    arm = {"vector": rows.leaves["arm"]["vector"][:, :0]}
    rows = Rows({"arm": arm, "grid": rows.leaves["grid"]}, rows.task[:, 40:], rows.first[:, 40:])
    assert fold(rows) is not None
    policies, value = evaluate(policy, critic, rows, {name: torch.zeros(40, 6) for name in ("actor", "critic")})
    assert policies["arm"].entropy().shape == (0,)
    assert value.shape == (8, 40)


def test_networks_without_action_values_are_those_of_before() -> None:
    (plain, _), (more, _) = make_nets(), make_nets(action_values=True)
    assert {name for name in more.state_dict() if not name.startswith("action_values.")} == set(plain.state_dict())
