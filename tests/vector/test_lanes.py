"""Batched slots: the same bits as slots stepped one by one, in every situation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from mtrl.types import Array, Outcome, Task
from mtrl.vector import EnvironmentFailedError, EpisodeList, MultiTaskVectorEnv, replay
from mtrl.vector.lanes import Lanes
from tests.vector.drive import assert_same, begin_and_drive, drive
from tests.vector.probes import tasks

Make = Callable[..., MultiTaskVectorEnv]


class Together:
    """A batch made of the plain environments; counts its calls, so that tests can see that it was used."""

    def __init__(self, kind: str, fault: str, made: Sequence[Task], slots: int) -> None:
        self._kind, self._fault = kind, fault
        if fault == "make":
            raise OSError("no engine")
        self._envs = [[task.build() for task in made] for _ in range(slots)]
        self._now: list[Any] = [None] * slots
        agents = made[0].agents
        self._leaves: dict[str, Array] = {"vector": np.zeros((slots, agents, 3), np.float32)}
        self._leaves["legal"] = np.zeros((slots, agents, 3 if kind == "team" else 4), bool)
        if kind == "team":
            self._leaves["state"] = np.zeros((slots, agents, 4), np.float32)
            self._leaves["alive"] = np.zeros((slots, agents), bool)
        self._shape, self._steps = (slots, agents), 0

    def reset(self, mask: Array, seeds: Array, task: Array) -> None:
        if self._fault == "reset":
            raise OSError("no display")
        for i in np.flatnonzero(mask).tolist():
            self._now[i] = self._envs[i][task[i]]
            obs, info = self._now[i].reset(seed=int(seeds[i]))
            self._see(i, obs, info)

    def step(self, actions: Array, mask: Array) -> Outcome:
        reward = np.full(self._shape, np.nan)  # what was not stepped is not read
        flags = np.zeros((3, self._shape[0]), bool)
        self._steps += 1
        if self._fault == "step" and self._steps == 3:
            raise ZeroDivisionError("the physics exploded")
        for i in np.flatnonzero(mask).tolist():
            env = self._now[i]
            if self._kind == "team":
                acting = list(env.agents)
                sent = {a: int(x) for a, x in zip(env.possible_agents, actions[i], strict=True) if a in acting}
                obs, rewards, terminations, _, infos = env.step(sent)
                reward[i] = [rewards.get(agent, 0.0) for agent in env.possible_agents]
                died = {agent for agent in acting if terminations[agent]}
                over = not env.agents
                flags[:, i] = over and died == set(acting), over, any(info["success"] for info in infos.values())
                self._alive = set(acting) - died if over else set(env.agents)
                self._see(i, obs, infos)
            else:
                obs, gain, terminated, truncated, info = env.step(int(actions[i, 0]))
                reward[i], flags[:, i] = gain, (terminated, truncated, info["success"])
                self._see(i, obs, info)
        if self._fault == "reward" and self._steps == 3:
            reward[-1] = np.inf
        if self._fault == "observation" and self._steps == 3:
            self._leaves["vector"][-1, 0, :2] = np.nan
        return Outcome(reward, *flags)

    def leaves(self) -> Mapping[str, Array]:
        return self._leaves

    def close(self) -> None:
        self._now.clear()

    def _see(self, i: int, obs: Any, info: Any) -> None:
        leaves = self._leaves
        if self._kind != "team":
            leaves["vector"][i], leaves["legal"][i] = obs["count"], obs["action_mask"]
            return
        env = self._now[i]
        alive = set(env.agents) if env._steps == 0 else self._alive
        for leaf in leaves.values():
            leaf[i] = 0
        leaves["legal"][i, :, 0] = True
        for k, agent in enumerate(env.possible_agents):
            if agent in alive:
                leaves["vector"][i, k], leaves["alive"][i, k] = obs[agent], True
                leaves["legal"][i, k] = info[agent]["action_mask"]
        leaves["state"][i] = env.state()


COUNTER, TEAM = partial(Together, "counter", ""), partial(Together, "team", "")


def batched(*names: str, **faults: str) -> list[Task]:
    """Probe tasks; counters and teams with a batch."""
    counter = partial(Together, "counter", faults["fault"]) if faults else COUNTER
    kinds = {"counter": counter, "team": TEAM}
    return [replace(task, batch=kinds.get(task.name.partition("/")[2].partition("-")[0])) for task in tasks(*names)]


def lanes_of(envs: MultiTaskVectorEnv) -> list[Lanes]:
    return list(envs._backend._runner._lanes.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_same_bits_as_slot_by_slot(make: Make, workers: int) -> None:
    one, other = make(tasks("all"), 3, seed=5), make(batched("all"), 3, seed=5, workers=workers)
    one.reset()
    other.reset()
    assert_same(list(other.obs), list(one.obs))
    assert_same(drive(other, 80), drive(one, 80))
    assert_same(other.state_dict(), one.state_dict())
    if not workers:
        assert [len(lanes.slots) for lanes in lanes_of(other)] == [6, 6]  # counters and teams, two tasks each
    one.reset(seed=6)
    other.reset(seed=6)
    assert_same(drive(other, 10), drive(one, 10))


def test_state_goes_from_one_to_the_other(make: Make) -> None:
    one, other = make(tasks("counter", "team"), 2, seed=5), make(batched("counter", "team"), 2, seed=5, workers=2)
    one.reset()
    drive(one, 13)
    other.load_state_dict(one.state_dict())
    assert_same(list(other.obs), list(one.obs))
    assert_same(drive(other, 20, seed=1), drive(one, 20, seed=1))
    one.load_state_dict(other.state_dict())
    assert_same(drive(other, 20, seed=2), drive(one, 20, seed=2))


def test_parked_lanes(make: Make) -> None:
    """Lists of different lengths, of both tasks, in one batch."""
    lists = [[(0, 1), (1, 2)], [], [(1, 3)], [(0, 4), (0, 5), (1, 6)]]
    one, other = (
        make(made, [2, 2], schedule=EpisodeList(lists))
        for made in (tasks("counter", "counter-b"), batched("counter", "counter-b"))
    )
    one.reset()
    other.reset()
    assert_same(list(other.obs), list(one.obs))
    assert_same(drive(other, 40), drive(one, 40))
    assert not other.active.any()


def test_a_killed_worker_comes_back(make: Make) -> None:
    one, other = make(tasks("counter", "team"), 4, seed=5), make(batched("counter", "team"), 4, seed=5, workers=2)
    one.reset()
    other.reset()
    assert_same(drive(other, 9), drive(one, 9))
    other._backend._processes[1].kill()  # type: ignore[attr-defined]
    assert_same(drive(other, 20, seed=1), drive(one, 20, seed=1))
    assert len(other.faults) == 1


def test_journals_replay_outside_the_batch(make: Make) -> None:
    envs = make(batched("counter", "team"), 2, seed=5)
    envs.reset()
    by_name = {task.name: task for task in tasks("counter", "team")}
    episodes = [episode for _, _, ended in drive(envs, 30) for episode in ended]
    assert {episode.journal.task for episode in episodes} == {"probe/counter", "probe/team"}
    for episode in episodes:
        again = replay(by_name[episode.journal.task], episode.journal)
        assert (again.ret, again.length, again.success) == (episode.ret, episode.length, episode.success)


def test_tasks_that_disagree_are_stepped_singly(make: Make) -> None:
    plain, fast = tasks("counter")[0], batched("counter-b")[0]
    envs = make([plain, fast])
    envs.reset()
    drive(envs, 5)
    assert not lanes_of(envs)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("make", r"the batch of probe/counter, probe/counter-b \(slots 0, 1, 2, 3\): cannot be made: .*no engine"),
        ("reset", "the batch of probe/counter, probe/counter-b .*no display"),
        ("step", "the batch of probe/counter, .*the physics exploded"),
        ("reward", r"task 'probe/counter-b' \(slot 3, seed .* step .*returned the reward \[inf\]"),
        (
            "observation",
            r"task 'probe/counter-b' \(slot 3, seed .* step .*observed nan \(2 such numbers, leaf 'vector'\)",
        ),
    ],
)
def test_faults_are_named(make: Make, fault: str, message: str) -> None:
    envs = make(batched("counter", "counter-b", fault=fault), 2)
    with pytest.raises(EnvironmentFailedError, match=message):
        begin_and_drive(envs)
