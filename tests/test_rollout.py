"""Rollouts and generalised advantages against closed forms and brute force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from mtrl.rollout import Items, Rollout, gae
from mtrl.types import Decision, Group, Obs, Spec, Step, TaskInfo

GAMMA, LAM = 0.9, 0.8


def brute_force(reward: Any, value: Any, next_value: Any, terminated: Any, truncated: Any) -> np.ndarray:
    """The definition: the discounted sum of temporal differences up to the end of the episode or of the rollout."""
    steps, n = reward.shape
    out = np.zeros((steps, n))
    for row in range(n):
        for t in range(steps):
            for k in range(t, steps):
                bootstrap = 0.0 if terminated[k, row] else next_value[k, row]
                delta = reward[k, row] + GAMMA * bootstrap - value[k, row]
                out[t, row] += (GAMMA * LAM) ** (k - t) * delta
                if terminated[k, row] or truncated[k, row]:
                    break
    return out


def test_gae_equals_its_definition_over_several_episodes() -> None:
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 40, 7))
    terminated = rng.random((40, 7)) < 0.1
    truncated = (rng.random((40, 7)) < 0.1) & ~terminated
    found = gae(reward, value, next_value, terminated, truncated, gamma=GAMMA, lam=LAM)
    np.testing.assert_allclose(found, brute_force(reward, value, next_value, terminated, truncated), atol=1e-12)


def test_gae_with_lambda_1_is_return_minus_value() -> None:
    reward = np.array([[1.0], [2.0], [3.0]])
    ends = np.array([[False], [False], [True]])
    never = np.zeros_like(ends)
    value = np.full((3, 1), 0.5)
    nexts = np.array([[0.5], [0.5], [9.0]])
    terminated = gae(reward, value, nexts, ends, never, gamma=GAMMA, lam=1.0)
    assert terminated[0, 0] == pytest.approx(1 + 0.9 * 2 + 0.81 * 3 - 0.5)
    # The same rewards cut by a time limit: the value of the true successor stands for what would have come.
    truncated = gae(reward, value, nexts, never, ends, gamma=GAMMA, lam=1.0)
    assert truncated[0, 0] == pytest.approx(1 + 0.9 * 2 + 0.81 * 3 + 0.729 * 9 - 0.5)


def test_gae_of_an_endless_task_with_the_right_value_is_zero() -> None:
    shape = (25, 2)
    value = np.full(shape, 1 / (1 - GAMMA))
    truncated = np.zeros(shape, bool)
    truncated[9::10] = True
    found = gae(np.ones(shape), value, value, np.zeros(shape, bool), truncated, gamma=GAMMA, lam=LAM)
    np.testing.assert_allclose(found, 0.0, atol=1e-12)


# Two groups: "a" has rows 0, 1 (task 0), "b" has the team of rows 2, 3 (task 1).
SPEC = Spec(
    (TaskInfo("a/x", "a", 5), TaskInfo("b/y", "b", 5, agents=2)),
    (
        Group("a", {"vector": Box(-np.inf, np.inf, (1,))}, Discrete(3), (0,)),
        Group("b", {"vector": Box(-np.inf, np.inf, (2,)), "alive": Box(0, 1, (), np.bool_)}, Box(-1, 1, (2,)), (1,)),  # pyright: ignore
    ),
)


def observation(t: float, alive: tuple[bool, bool] = (True, True)) -> Obs:
    leaves: Mapping[str, Any] = {
        "a": {"vector": np.array([[t], [t + 100]], np.float32)},
        "b": {"vector": np.array([[t, 0], [t + 100, 0]], np.float32), "alive": np.array(alive)},
    }
    return Obs(leaves, np.array([0, 0, 1, 1]), np.full(4, t == 0))


def transition(t: int, *, terminated: Any = (), truncated: Any = (), **dead: Any) -> Step:
    action = {"a": np.array([t % 3, 1]), "b": np.full((2, 2), t / 10, np.float32)}
    over, cut = (np.isin(np.arange(4), rows) for rows in (terminated, truncated))
    before, after = (observation(x, dead.get(key, (True, True))) for x, key in ((t, "before"), (t + 0.5, "after")))
    decision = Decision(action, {"log_prob": np.arange(4) + 10.0 * t})
    return Step(before, decision, np.arange(4.0) + t, over, cut, np.zeros(4, bool), after, np.ones(4, bool))


def test_the_rollout_keeps_true_successors_of_truncations_and_of_the_last_step() -> None:
    roll = Rollout(SPEC, 3)
    roll.add(transition(0, truncated=[1]))
    roll.add(transition(1, terminated=[0], truncated=[2, 3]))
    assert not roll.full
    roll.add(transition(2, terminated=[2, 3]))
    assert roll.full
    ends = roll.successors()
    assert list(zip(ends.t.tolist(), ends.row.tolist(), strict=True)) == [(0, 1), (2, 0), (2, 1), (1, 2), (1, 3)]
    assert ends.leaves["a"]["vector"][:, 0].tolist() == [100.5, 2.5, 102.5]
    assert ends.leaves["b"]["vector"][:, 0].tolist() == [1.5, 101.5]
    with pytest.raises(RuntimeError, match="already holds 3 steps"):
        roll.add(transition(3))
    roll.clear()
    assert len(roll.successors().t) == 0


def test_death_ends_a_row_and_the_dead_teach_nothing() -> None:
    roll = Rollout(SPEC, 2)
    roll.add(transition(0, after=(False, True)))
    roll.add(transition(1, truncated=[2, 3], before=(False, True), after=(False, True)))
    assert roll.terminated[:, 2].tolist() == [True, False]
    assert roll.valid.tolist() == [[True] * 4, [True, True, False, True]]
    assert roll.successors().row.tolist() == [0, 1, 3]


def test_the_dead_of_a_team_that_shares_its_reward_go_on_being_paid() -> None:
    """Row 2 dies in step 0; the team (rows 2, 3) earns 1, 2, 3 and ends. With lambda 1, an advantage is the return
    minus the value: the dead row's first action earns what comes after its death."""
    shared = Spec((SPEC.tasks[0], replace(SPEC.tasks[1], shared_reward=True)), SPEC.groups)
    found = {}
    for name, spec in {"shared": shared, "own": SPEC}.items():
        roll = Rollout(spec, 3)
        for t, before in enumerate([(True, True), (False, True), (False, True)]):
            step = transition(t, terminated=[2, 3] if t == 2 else [], before=before, after=(False, True))
            roll.add(step._replace(reward=np.full(4, t + 1.0)))
        value = np.full((3, 4), 0.5)
        ends = roll.terminated, roll.truncated
        advantage = gae(roll.reward, value, np.roll(value, -1, 0), *ends, gamma=GAMMA, lam=1.0)
        found[name] = roll, advantage[:, 2:] + 0.5
    roll, returns = found["shared"]
    whole = [1 + 0.9 * 2 + 0.81 * 3, 2 + 0.9 * 3, 3]
    np.testing.assert_allclose(returns, np.repeat(np.array(whole)[:, None], 2, 1))
    assert roll.valid.all()
    assert roll.terminated[:, 2:].tolist() == [[False, False], [False, False], [True, True]]
    np.testing.assert_allclose(roll.living, [[1, 1, 1.5, 1.5], [1, 1, 0, 1.5], [1, 1, 0, 1.5]])
    roll, returns = found["own"]
    assert returns[0].tolist() == [1.0, pytest.approx(whole[0])]
    np.testing.assert_array_equal(roll.living, roll.valid)


def test_the_dead_bootstrap_where_their_team_is_cut_off() -> None:
    shared = Spec((SPEC.tasks[0], replace(SPEC.tasks[1], shared_reward=True)), SPEC.groups)
    roll = Rollout(shared, 2)
    roll.add(transition(0, after=(False, True)))
    roll.add(transition(1, truncated=[2, 3], before=(False, True), after=(False, True)))
    assert roll.successors().row.tolist() == [0, 1, 2, 3]
    assert roll.truncated[:, 2:].tolist() == [[False, False], [True, True]]


def test_a_half_full_rollout_survives_its_state_dict() -> None:
    roll, other = Rollout(SPEC, 3), Rollout(SPEC, 3)
    roll.add(transition(0, truncated=[1]))
    other.load_state_dict(roll.state_dict())
    for each in (roll, other):
        each.add(transition(1))
        each.add(transition(2, terminated=[0]))
    for name in ("reward", "terminated", "truncated", "task", "first", "valid"):
        np.testing.assert_array_equal(getattr(roll, name), getattr(other, name))
    np.testing.assert_array_equal(roll.leaves["b"]["vector"], other.leaves["b"]["vector"])
    np.testing.assert_array_equal(roll.action["b"], other.action["b"])
    np.testing.assert_array_equal(roll.extras["log_prob"], other.extras["log_prob"])
    for mine, theirs in zip(roll.successors()[:2], other.successors()[:2], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("steps", [1, 2])
def test_minibatches_cover_every_valid_step_once_and_keep_rows_together(steps: int) -> None:
    roll = Rollout(SPEC, 4)
    for t in range(4):
        roll.add(transition(t, before=(t < 1, True), after=(False, True)))
    stamp = np.arange(4)[:, None] + np.array([0.0, 100, 0, 100])
    memory = {"actor": torch.arange(16).view(4, 4, 1)}
    columns = {"stamp": stamp}
    items = Items(roll, steps=steps, columns=columns, action=roll.action, memory=memory, device=torch.device("cpu"))
    seen = []
    for batch in items.minibatches(2, torch.Generator().manual_seed(0)):
        columns = batch.columns
        assert columns["task"].shape[0] == steps
        assert batch.same == {}, "so few rows are not searched for repetitions"
        both = torch.cat([batch.leaves[g]["vector"][..., 0] for g in ("a", "b")], 1)
        torch.testing.assert_close(both, columns["stamp"].float())
        torch.testing.assert_close(batch.action["b"][..., 0], batch.leaves["b"]["vector"][..., 0] % 100 / 10)
        assert (columns["task"][0].diff() >= 0).all()
        row = (columns["stamp"][0] >= 100).long() + 2 * columns["task"][0]
        torch.testing.assert_close(batch.memory["actor"][:, 0], columns["stamp"][0].long() % 100 * 4 + row)
        keys = (columns["stamp"] + 1000 * columns["task"])[columns["valid"]]
        seen += keys.tolist()
    expected = (stamp + 1000 * roll.task)[roll.valid]
    assert sorted(seen) == sorted(expected.tolist())


def test_rows_that_repeat_carry_the_same_number() -> None:
    roll = Rollout(SPEC, 128)
    for t in range(128):
        roll.add(transition(t % 8, before=(True, True), after=(True, True)))
    items = Items(roll, steps=1, columns={}, action=roll.action, memory={}, device=torch.device("cpu"))
    for batch in items.minibatches(2, torch.Generator().manual_seed(0)):
        assert list(batch.same) == ["a", "b"]
        for group, number in batch.same.items():
            views, start = batch.leaves[group]["vector"], list(batch.leaves).index(group)
            rows = sum(batch.same[g].shape[1] for g in list(batch.leaves)[:start])
            told = torch.cat([views[0], batch.columns["task"][0, rows : rows + number.shape[1], None]], 1)
            for value in number[0].unique():
                assert len(told[number[0] == value].unique(dim=0)) == 1
        for part in batch.parts().values():
            (group,) = part.leaves
            assert part.columns["task"].unique().numel() == 1
            assert part.same[group].shape == part.columns["task"].shape
