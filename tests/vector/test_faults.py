"""Workers that fail are replaced, and nobody can tell from the numbers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from mtrl import registry
from mtrl.types import Decision, Task
from mtrl.vector import EnvironmentFailedError, MultiTaskVectorEnv, episode_seed
from mtrl.vector.actions import random_actions
from mtrl.vector.workers import Workers
from tests.vector.drive import assert_same, drive
from tests.vector.probes import Walk, tasks

Make = Callable[..., MultiTaskVectorEnv]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrl.vector.workers._PAUSE", 0.0)


class Flaky(Walk):
    """A walk that goes wrong ``times`` times in all, after step 3; it counts in a file."""

    def __init__(self, fault: str, counter: Path, times: int = 1) -> None:
        super().__init__()
        self._fault, self._counter, self._times = fault, counter, times

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        seen = len(self._counter.read_text()) if self._counter.exists() else 0
        if self._steps == 3 and seen < self._times and self._fault != "none":
            self._counter.write_text("x" * (seen + 1))
            if self._fault == "raise":
                raise ZeroDivisionError("the physics exploded")
            os._exit(3)
        return super().step(action)


def flaky(fault: str, counter: Path, times: int = 1) -> Task:
    return Task("probe/flaky", partial(Flaky, fault, counter, times), 20)


def workers(envs: MultiTaskVectorEnv) -> Workers:
    assert isinstance(envs._backend, Workers)
    return envs._backend


def drive_with_faults(
    envs: MultiTaskVectorEnv, steps: int, faults: dict[int, int], before: Callable[[int], None] = lambda _: None
) -> list[Any]:
    """``drive``, but at some steps a signal hits a random worker: before the step, or while it is under way.

    ``before`` is called at the start of every step.
    """
    rng, chance, seen = np.random.default_rng(0), np.random.default_rng(1), []
    for step in range(steps):
        before(step)
        actions = random_actions(envs, rng)
        early = bool(chance.integers(2))
        victim = workers(envs)._processes[int(chance.integers(len(workers(envs)._processes)))]
        if step in faults and early:
            victim.send_signal(faults[step])
        envs.step_async(actions)
        if step in faults and not early:
            victim.send_signal(faults[step])
        seen.append((*envs.step_wait(Decision(actions, {})), envs.episodes))
    return seen


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_signals_change_no_bit(make: Make, kind: int) -> None:
    """Killed, crashed and hung workers, at random moments, between teams, pictures and walks."""
    one = make(tasks("all"), 2, seed=5)
    other = make(tasks("all"), 2, seed=5, workers=2, patience=5.0 if kind == signal.SIGSTOP else 300.0)
    one.reset()
    other.reset()
    moments = [4, 17, 31] if kind == signal.SIGSTOP else [1, 2, 9, 22, 23, 38]
    assert_same(drive_with_faults(other, 45, dict.fromkeys(moments, kind)), drive(one, 45))
    assert 0 < len(other.faults) <= len(moments)  # a stopped worker may have finished its step before
    expected = "did not answer for" if kind == signal.SIGSTOP else f"was killed by {signal.Signals(kind).name}"
    assert all(expected in fault for fault in other.faults)
    assert_same(other.state_dict(), one.state_dict())


@pytest.mark.parametrize(("fault", "message"), [("raise", "the physics exploded"), ("exit", "ended with exit code 3")])
def test_an_environment_that_fails_now_and_then(make: Make, tmp_path: Path, fault: str, message: str) -> None:
    calm = make([flaky("none", tmp_path / "n"), *tasks("counter")], 2, seed=1)
    envs = make([flaky(fault, tmp_path / "n", times=2), *tasks("counter")], 2, seed=1, workers=2)
    calm.reset()
    envs.reset()
    assert_same(drive(envs, 30), drive(calm, 30))
    assert len(envs.faults) == 2
    assert all(message in fault and "'probe/flaky' (slot" in fault and "step 4)" in fault for fault in envs.faults)


def test_what_always_fails_ends_with_its_journal(make: Make) -> None:
    envs = make(tasks("counter", "faulty-raise"), workers=2)
    envs.reset(seed=2)
    seen = drive(envs, 2)
    last = random_actions(envs, np.random.default_rng(3))
    envs.step_async(last)
    with pytest.raises(EnvironmentFailedError, match=r"'probe/faulty-raise'.*the physics exploded") as caught:
        envs.step_wait(Decision(last, {}))
    assert len(envs.faults) == 4  # the first try and three more
    journal = caught.value.journal
    assert journal is not None
    assert (journal.task, journal.seed) == ("probe/faulty-raise", episode_seed(2, 1, 0))
    played = [step.decision.action["probe-2"][0] for step, _, _ in seen] + [last["probe-2"][0]]
    assert journal.actions.tolist() == played


def test_in_process_too_the_journal_is_known(make: Make) -> None:
    envs = make(tasks("faulty-raise"))
    envs.reset(seed=2)
    with pytest.raises(EnvironmentFailedError) as caught:
        drive(envs, 5)
    assert caught.value.journal is not None
    assert len(caught.value.journal.actions) == 3


def test_budget_for_a_whole_life(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrl.vector.workers._MOST_FAULTS", 2)
    envs = make(tasks("walk"), workers=1)
    envs.reset()
    drive_with_faults(envs, 10, dict.fromkeys((2, 5), signal.SIGKILL))
    with pytest.raises(EnvironmentFailedError, match="was killed by SIGKILL"):
        drive_with_faults(envs, 10, {3: signal.SIGKILL})


def test_killed_before_reset_and_before_load(make: Make) -> None:
    one, other = make(tasks("walk", "team"), 2, seed=3), make(tasks("walk", "team"), 2, seed=3, workers=2)
    workers(other)._processes[0].kill()
    one.reset()
    other.reset()
    assert_same(drive(other, 9), drive(one, 9))
    state = one.state_dict()
    drive(one, 4)
    one.load_state_dict(state)
    for process in workers(other)._processes:
        process.kill()
    other.load_state_dict(state)
    assert_same(drive(other, 9, seed=1), drive(one, 9, seed=1))
    assert len(other.faults) == 3


def test_killed_while_slots_move(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrl.vector.workers.COST_STEPS", 0)
    names = ("counter", "counter-b", "walk", "team")
    one, other = make(tasks(*names), 2, seed=3), make(tasks(*names), 2, seed=3, workers=2)
    one.reset()
    other.reset()
    rng = np.random.default_rng(0)
    rebalance, hits = workers(other).rebalance, [0]

    def hit(movable: list[int], running: Any) -> None:
        if hits[0] < 4:
            victim = workers(other)._processes[hits[0] % 2]
            victim.kill()
            victim.wait()
            hits[0] += 1
        rebalance(movable, running)

    monkeypatch.setattr(workers(other), "rebalance", hit)
    owners = set()
    for round_ in range(8):
        workers(other).buffers.cost[:] = rng.uniform(0.1, 1.0, 8) ** 4
        assert_same(drive(other, 5, seed=round_), drive(one, 5, seed=round_))
        owners.add(tuple(workers(other)._owner))
    assert hits[0] == 4
    assert len(owners) > 1


def test_a_task_that_its_seed_does_not_determine_cannot_come_back(make: Make) -> None:
    envs = make(tasks("faulty-unseeded"), workers=1)
    envs.reset()
    drive(envs, 2)
    workers(envs)._processes[0].kill()
    with pytest.raises(EnvironmentFailedError, match=r"reset\(seed\) must determine"):
        drive(envs, 1)


class Trapped(gym.Wrapper[Any, Any, Any, Any]):
    """Any environment; its next step raises once a file is there (and takes the file away)."""

    def __init__(self, build: Callable[..., gym.Env[Any, Any]], trap: Path) -> None:
        super().__init__(build())
        self._trap = trap

    def step(self, action: Any) -> Any:
        if self._trap.exists():
            self._trap.unlink()
            raise ZeroDivisionError("the trap")
        return super().step(action)


@pytest.mark.slow
def test_a_hundred_faults_over_all_families(make: Make, tmp_path: Path) -> None:
    """Real suites: a worker raises, is killed, crashes or is stopped every few steps, and the run never notices."""
    for package in ("ale_py", "numba", "pettingzoo"):
        pytest.importorskip(package)
    real = registry.tasks("metaworld/mt3+minigrid/mt3+atari/Pong+atari/MsPacman+smac/3m+smac/2s3z")
    traps = [tmp_path / str(number) for number in range(len(real))]
    trapped = [
        task if task.batch else replace(task, build=partial(Trapped, task.build, trap))
        for task, trap in zip(real, traps, strict=True)
    ]
    one = make(real, seed=5)
    other = make(trapped, seed=5, workers=2, patience=20.0)
    one.reset()
    other.reset()
    rng = np.random.default_rng(2)
    kinds = [0] * 34 + [signal.SIGKILL] * 33 + [signal.SIGSEGV] * 29 + [signal.SIGSTOP] * 4
    moments = rng.choice(1200, len(kinds), replace=False)
    faults = dict(zip(map(int, moments), map(int, rng.permutation(kinds)), strict=True))
    able = [trap for trap, task in zip(traps, real, strict=True) if not task.batch]

    def spring(step: int) -> None:
        if faults.get(step) == 0:
            able[int(rng.integers(len(able)))].touch()

    signals = {step: kind for step, kind in faults.items() if kind}
    assert_same(drive_with_faults(other, 1200, signals, before=spring), drive(one, 1200))
    assert len(other.faults) >= 95  # a stopped worker may have finished its step before
    assert sum("the trap" in fault for fault in other.faults) == 34
