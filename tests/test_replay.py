from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from mtrl.replay import Replay
from mtrl.types import Decision, Group, Obs, Spec, Step, TaskInfo

LINE = Box(-1.0, 1.0, (2,), np.float32)
PICTURE = Box(0, 255, (1, 3, 3), np.uint8)
FLAG = Box(0, 1, (), np.bool_)  # type: ignore[call-overload]


def make_spec(alive: bool = False) -> Spec:
    """Tasks 0 and 2 in group "a" (vectors, continuous), task 1 in group "b" (pictures, discrete)."""
    leaves = {"vector": LINE, "alive": FLAG} if alive else {"vector": LINE}
    groups = (Group("a", leaves, LINE, (0, 2)), Group("b", {"image": PICTURE}, Discrete(3), (1,)))
    names = (("t0", "a"), ("t1", "b"), ("t2", "a"))
    return Spec(tuple(TaskInfo(name, group, 10) for name, group in names), groups)


def make_step(stamp: int, *, tasks_a: tuple[int, ...] = (0, 0, 2), active: bool = True, alive: bool = True) -> Step:
    """Rows of group "a" and two rows of group "b"; every number in a row tells (stamp, row)."""
    n, rows_b = len(tasks_a), 2
    mark = (np.arange(n + rows_b) + 100 * stamp).astype(np.float32)
    picture = np.broadcast_to(mark[n:, None, None, None] % 256, (rows_b, 1, 3, 3)).astype(np.uint8)

    def obs(shift: float) -> Obs:
        leaves = {"vector": np.stack([mark[:n] + shift] * 2, 1)}
        if not alive:
            leaves["alive"] = np.arange(n) != 0
        task = np.array([*tasks_a, 1, 1])
        return Obs({"a": leaves, "b": {"image": picture + np.uint8(shift)}}, task, np.zeros(n + rows_b, bool))

    decision = Decision({"a": np.stack([mark[:n]] * 2, 1) / 1e6, "b": np.array([stamp % 3, (stamp + 1) % 3])}, {})
    ended = np.full(n + rows_b, stamp % 2 == 0)
    running = np.ones(n + rows_b, bool)
    running[0] = active
    return Step(obs(0), decision, mark.astype(np.float64), ended, ~ended, ended, obs(1), running)


def test_every_field_of_a_transition_stays_together() -> None:
    replay = Replay(make_spec(), 50, seed=0)
    for stamp in range(20):
        replay.add(make_step(stamp))
    drawn = replay.sample(40)
    a, b = drawn["a"], drawn["b"]
    np.testing.assert_array_equal(a.task, np.repeat([0, 2], 40))
    np.testing.assert_array_equal(a.obs["vector"][:, 0], a.reward)
    np.testing.assert_array_equal(a.next["vector"][:, 1], a.reward + 1)
    np.testing.assert_allclose(a.action[:, 0] * 1e6, a.reward, rtol=1e-5)
    np.testing.assert_array_equal(a.terminated, (a.reward // 100) % 2 == 0)
    assert b.obs["image"].dtype == np.uint8
    assert b.action.dtype == np.int64
    np.testing.assert_array_equal(b.obs["image"][:, 0, 0, 0], b.reward % 256)
    np.testing.assert_array_equal(b.next["image"][:, 0, 0, 0], (b.reward + 1) % 256)
    # Rows 0 and 1 of a step belong to task 0, row 2 to task 2.
    assert set(a.reward[:40] % 100) == {0, 1}
    assert set(a.reward[40:] % 100) == {2}


def test_ring_keeps_the_newest_as_a_plain_list_would() -> None:
    capacity = 7
    replay = Replay(make_spec(), capacity, seed=0)
    plain: dict[int, list[float]] = {0: [], 1: [], 2: []}
    kept: dict[int, list[float]] = {}
    rng = np.random.default_rng(1)
    for stamp in range(30):
        step = make_step(stamp, tasks_a=tuple(rng.choice((0, 2), 3).tolist()))
        replay.add(step)
        for task, reward in zip(step.obs.task, step.reward, strict=True):
            plain[int(task)].append(float(reward))
        kept = {task: rewards[-capacity:] for task, rewards in plain.items()}
        assert replay.sizes.tolist() == [len(kept[task]) for task in range(3)]
    drawn = replay.sample(400)
    assert set(drawn["a"].reward[:400]) == set(kept[0])
    assert set(drawn["b"].reward) == set(kept[1])
    assert set(drawn["a"].reward[400:]) == set(kept[2])


def test_parked_and_dead_rows_are_left_out() -> None:
    replay = Replay(make_spec(), 10, seed=0)
    replay.add(make_step(1, active=False))
    assert replay.sizes.tolist() == [1, 2, 1]
    team = Replay(make_spec(alive=True), 10, seed=0)
    team.add(make_step(1, alive=False))
    assert team.sizes.tolist() == [1, 2, 1]


@pytest.mark.parametrize("shared", [False, True])
def test_death_ends_a_row_unless_the_team_shares_its_reward(shared: bool) -> None:
    spec = make_spec(alive=True)
    tasks = tuple(dataclasses.replace(task, shared_reward=shared) for task in spec.tasks)
    spec = dataclasses.replace(spec, tasks=tasks)
    replay, step = Replay(spec, 10, seed=0), make_step(1, alive=False)  # stamp 1: no slot ends by itself
    step.obs.leaves["a"]["alive"][:] = True  # row 0 of three dies at this step
    replay.add(step)
    drawn = replay.sample(50)["a"]
    assert set(drawn.reward[drawn.terminated]) == (set() if shared else {100.0})
    assert {100.0, 101.0, 102.0} == set(drawn.reward)


def test_tasks_without_data_are_not_drawn() -> None:
    replay = Replay(make_spec(), 10, seed=0)
    assert replay.sample(4) == {}
    replay.add(make_step(1, tasks_a=(2, 2, 2)))
    drawn = replay.sample(4)
    assert drawn["a"].task.tolist() == [2] * 4
    assert drawn["b"].task.tolist() == [1] * 4


def test_draws_are_uniform_over_a_task() -> None:
    replay = Replay(make_spec(), 10, seed=0)
    for stamp in range(10):
        replay.add(make_step(stamp))
    drawn = replay.sample(20_000)["a"].reward[20_000:]  # task 2: ten transitions
    _, counts = np.unique(drawn, return_counts=True)
    assert len(counts) == 10
    assert ((counts - 2_000) ** 2 / 2_000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("steps", [3, 30])
def test_state_goes_on_as_the_original(steps: int) -> None:
    first = Replay(make_spec(), 8, seed=0)
    for stamp in range(steps):
        first.add(make_step(stamp))
    first.sample(5)
    state = copy.deepcopy(first.state_dict())
    second = Replay(make_spec(), 8, seed=99)
    second.load_state_dict(state)
    for stamp in range(steps, steps + 6):
        for replay in (first, second):
            replay.add(make_step(stamp))
        one, two = first.sample(6), second.sample(6)
        for name in one:
            np.testing.assert_array_equal(one[name].reward, two[name].reward)
    assert len(state["rings"]["a"]["data"][1]["reward"]) == min(steps, 8)  # only what is filled
    with pytest.raises(ValueError, match="capacity 8, not 9"):
        Replay(make_spec(), 9, seed=0).load_state_dict(state)


def test_a_buffer_that_cannot_fit_is_refused_with_the_capacity_that_would() -> None:
    huge = Replay(make_spec(), 10**13, seed=0)  # what only acts needs no memory
    for use in (huge.reserve, lambda: huge.add(make_step(0))):
        with pytest.raises(MemoryError, match="lower the capacity to"):
            use()
    assert not huge.sizes.any()
    with pytest.raises(ValueError, match="at least 1"):
        Replay(make_spec(), 0, seed=0)


def test_size_is_told_before_it_is_used() -> None:
    # a: 2 + 2 (obs, next) + 2 (action) + 1 (reward) floats + 1 byte, two tasks; b: 9 + 9 bytes + int64 + float + 1.
    assert Replay(make_spec(), 1_000, seed=0).nbytes == 1_000 * (2 * 29 + 31)
