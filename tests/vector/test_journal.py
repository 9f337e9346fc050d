"""Journals, replays, and going on from a saved state bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mtrl.types import Journal
from mtrl.vector import EnvironmentFailedError, EpisodeList, MultiTaskVectorEnv, replay
from tests.vector.drive import assert_same, drive
from tests.vector.probes import tasks

Make = Callable[..., MultiTaskVectorEnv]


def plain(value: object) -> bool:
    """Only what a checkpoint can hold without pickle."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str, np.ndarray)


def test_replay_equals_the_recorded_episode(make: Make) -> None:
    envs = make(tasks("all"), 2, seed=21)
    envs.reset()
    by_name = {task.name: task for task in tasks("all")}
    episodes = [episode for _, _, ended in drive(envs, 60) for episode in ended]
    assert {episode.journal.task for episode in episodes} == set(by_name)
    for episode in episodes:
        again = replay(by_name[episode.journal.task], episode.journal)
        assert (again.ret, again.length, again.success) == (episode.ret, episode.length, episode.success)
        assert again.frames == []


def test_replay_renders(make: Make) -> None:
    envs = make(tasks("picture"))
    envs.reset()
    ((*_, (episode,)),) = drive(envs, 5)[-1:]
    frames = replay(tasks("picture")[0], episode.journal, render=True).frames
    assert [int(frame[0, 0, 0]) for frame in frames] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="belongs to task 'probe/picture'"):
        replay(tasks("counter")[0], episode.journal)


def test_replay_of_a_made_up_journal() -> None:
    """Counter earns step + action: 1 + 2, 2 + 0, ..."""
    seed = next(s for s in range(100) if np.random.default_rng(np.random.PCG64(s)).integers(1, 11) >= 3)
    again = replay(tasks("counter")[0], Journal("probe/counter", seed, np.array([2, 0, 3])))
    assert again[:3] == (3.0 + 2.0 + 6.0, 3, True)


@pytest.mark.parametrize("steps", [0, 1, 13, 30])
@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (2, 0)])
def test_state_continues_bit_for_bit(make: Make, steps: int, workers: tuple[int, int]) -> None:
    envs = make(tasks("all"), 2, seed=5, workers=workers[0])
    envs.reset()
    drive(envs, steps)
    state = envs.state_dict()
    assert plain(state)
    other = make(tasks("all"), 2, seed=77, workers=workers[1])
    other.load_state_dict(state)
    assert_same(list(other.obs), list(envs.obs))
    assert_same(other.state_dict(), state)
    assert_same(drive(other, 25, seed=1), drive(envs, 25, seed=1))


def test_state_with_parked_slots(make: Make) -> None:
    def vector() -> MultiTaskVectorEnv:
        lists = EpisodeList([[(0, 5)], [(0, 6), (1, 3), (0, 1), (1, 1), (0, 2)], []])
        return make(tasks("counter", "counter-b"), [1, 2], schedule=lists)

    envs, other = vector(), vector()
    envs.reset()
    drive(envs, 12)
    other.load_state_dict(envs.state_dict())
    assert_same(list(other.obs), list(envs.obs))
    assert_same(other.active, envs.active)
    assert_same(drive(other, 15), drive(envs, 15))


def test_state_after_reset_of_a_used_vector(make: Make) -> None:
    envs = make(tasks("counter", "walk"), 2)
    envs.reset()
    state = envs.state_dict()
    first = drive(envs, 20)
    envs.load_state_dict(state)
    assert_same(drive(envs, 20), first)


def test_state_of_other_tasks_is_refused(make: Make) -> None:
    envs = make(tasks("counter"), 2)
    envs.reset()
    with pytest.raises(ValueError, match="belongs to the slots"):
        make(tasks("counter"), 3).load_state_dict(envs.state_dict())


def test_a_task_that_its_seed_does_not_determine_is_found(make: Make) -> None:
    envs = make(tasks("faulty-unseeded"))
    envs.reset()
    drive(envs, 4)
    with pytest.raises(EnvironmentFailedError, match=r"'probe/faulty-unseeded'.*reset\(seed\) must determine"):
        make(tasks("faulty-unseeded")).load_state_dict(envs.state_dict())


def test_actions_are_forgotten_when_no_episode_needs_them(make: Make) -> None:
    """The longest episode of 'walk' has 20 steps; the memory of actions stays within a small multiple."""
    envs = make(tasks("walk"), 4)
    envs.reset()
    drive(envs, 300)
    history = envs._history["probe"]
    assert len(history) <= 2 * 20 + 1
