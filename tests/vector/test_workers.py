"""Worker processes: the same numbers as in process, and no fault that hangs or leaves something behind."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from mtrl import registry
from mtrl.types import Decision, Task
from mtrl.vector import EnvironmentFailedError, MultiTaskVectorEnv, episode_seed
from mtrl.vector.actions import random_actions
from mtrl.vector.workers import Workers, _Link, _shut_down, plan_moves, unsendable
from tests.vector.drive import assert_same, begin_and_drive, drive
from tests.vector.probes import tasks

Make = Callable[..., MultiTaskVectorEnv]
ROOT = Path(__file__).parents[2]


def processes(envs: MultiTaskVectorEnv) -> list[subprocess.Popen[bytes]]:
    backend = envs._backend
    assert isinstance(backend, Workers)
    return backend._processes


def gone(pid: int, within: float = 10.0) -> bool:
    """Whether a process that is not our child ends in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def moved(owner: list[int], moves: dict[int, int]) -> list[int]:
    """Owners after the moves."""
    return [moves.get(slot, worker) for slot, worker in enumerate(owner)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_bits_as_in_process(make: Make, workers: int) -> None:
    one, other = make(tasks("all"), 2, seed=5), make(tasks("all"), 2, seed=5, workers=workers)
    one.reset()
    other.reset()
    assert_same(list(other.obs), list(one.obs))
    assert_same(drive(other, 60), drive(one, 60))
    one.reset(seed=6)
    other.reset(seed=6)
    assert_same(drive(other, 10), drive(one, 10))


def test_no_more_workers_than_slots(make: Make) -> None:
    assert len(processes(make(tasks("counter"), 2, workers=8))) == 2


def test_steps_run_while_the_parent_works(make: Make) -> None:
    """Between ``step_async`` and ``step_wait`` the workers step by themselves."""
    envs = make(tasks("slow-30"), 2, workers=2)
    envs.reset()
    backend = envs._backend
    actions = random_actions(envs, np.random.default_rng(0))
    envs.step_async(actions)
    deadline = time.monotonic() + 10
    while not backend.buffers.length.all() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert backend.buffers.length.tolist() == [1, 1]
    envs.step_wait(Decision(actions, {}))


def test_moving_slots_changes_no_bit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are set by hand, so that slots must move; trajectories stay those of the process without workers."""
    names = ("counter", "counter-b", "walk", "team")
    monkeypatch.setattr("mtrl.vector.workers.COST_STEPS", 0)
    one, other = make(tasks(*names), 2, seed=3), make(tasks(*names), 2, seed=3, workers=2)
    one.reset()
    other.reset()
    backend = other._backend
    assert isinstance(backend, Workers)
    owners = {tuple(backend._owner)}
    rng = np.random.default_rng(0)
    for round_ in range(12):
        backend.buffers.cost[:] = rng.uniform(0.1, 1.0, 8) ** 4
        assert_same(drive(other, 5, seed=round_), drive(one, 5, seed=round_))
        owners.add(tuple(backend._owner))
    assert len(owners) > 2


def test_expensive_slots_are_spread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots 0 and 2 begin in one worker; once they have proved expensive, one of them moves, and not before that pays:
    after one step, moving wins 2.0 - 1.2 s."""
    envs = make(tasks("slow-5", "counter"), [1, 3], workers=2)
    backend = envs._backend
    assert isinstance(backend, Workers)
    envs.reset()
    drive(envs, 1)
    backend.buffers.cost[:] = [1.0, 0.1, 1.0, 0.1]
    backend.rebalance([2], envs._running)
    assert backend._owner == [0, 1, 0, 1]
    monkeypatch.setattr("mtrl.vector.workers.COST_STEPS", 0)
    assert 0 < backend.buffers.built[2] < 0.8
    backend.buffers.built[2] = 0.9
    backend.rebalance([2], envs._running)
    assert backend._owner == [0, 1, 0, 1]
    backend.buffers.built[2] = 0.7
    backend.rebalance([2], envs._running)
    assert backend._owner == [0, 1, 1, 1]


def test_slots_stay_twice_as_long_after_each_move(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However noisy the costs are: what moves cost stays a vanishing share of all steps."""
    monkeypatch.setattr("mtrl.vector.workers.COST_STEPS", 2)
    envs = make(tasks("counter"), 4, workers=2)
    backend = envs._backend
    assert isinstance(backend, Workers)
    envs.reset()
    moves = []
    for step in range(1, 30):
        drive(envs, 1, seed=step)
        owner = list(backend._owner)
        backend.buffers.cost[:] = [1.0 if each == owner[0] else 0.1 for each in owner]  # one worker has all the work
        backend.rebalance(range(4), envs._running)
        if owner != backend._owner:
            moves.append(step)
    assert moves == [2, 6, 14]


@pytest.mark.parametrize(
    ("owner", "cost", "movable", "expected"),
    [
        ([0, 1, 0, 1], [1, 1, 1, 1], [0, 1, 2, 3], {}),  # even already
        ([0, 0, 1, 1], [3, 3, 1, 1], [0, 1, 2, 3], {1: 1, 2: 0}),  # a swap: 4 and 4
        ([0, 0, 1], [2, 2, 2], [2], {}),  # only a slot of the idle worker may move: no gain
        ([0, 0, 1], [1, 1, 0.0], [1], {1: 1}),
        ([0, 0, 1, 1], [1.05, 1, 1, 1], [0, 1, 2, 3], {}),  # not worth it
        ([0, 0, 0], [1, 1, 1], [0, 1, 2], {0: 1}),
    ],
)
def test_plan_moves(owner: list[int], cost: list[float], movable: list[int], expected: dict[int, int]) -> None:
    moves = plan_moves(owner, np.array(cost, float), movable, 2)
    after = np.bincount(moved(owner, moves), weights=cost, minlength=2)
    wanted = np.bincount(moved(owner, expected), weights=cost, minlength=2)
    assert sorted(after) == sorted(wanted)
    assert set(moves) <= set(movable)


def test_plan_moves_is_never_worse() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        slots, workers = int(rng.integers(1, 20)), int(rng.integers(1, 5))
        owner, cost = rng.integers(0, workers, slots).tolist(), rng.exponential(size=slots)
        movable = [slot for slot in range(slots) if rng.random() < 0.7]
        moves = plan_moves(owner, cost, movable, workers)
        before = np.bincount(owner, weights=cost, minlength=workers).max()
        after = np.bincount(moved(owner, moves), weights=cost, minlength=workers).max()
        assert after < 0.96 * before if moves else after == before
        assert set(moves) <= set(movable)
        assert all(owner[slot] != worker for slot, worker in moves.items())


def test_exception_in_a_worker(make: Make) -> None:
    envs = make(tasks("counter", "faulty-raise"), workers=2)
    envs.reset(seed=2)
    drive(envs, 2)
    where = rf"task 'probe/faulty-raise' \(slot 1, seed {episode_seed(2, 1, 0)}, step 3\): raised ZeroDivisionError"
    with pytest.raises(EnvironmentFailedError, match=where) as caught:
        drive(envs, 1)
    assert "the physics exploded" in str(caught.value)
    assert re.search(r"probes\.py:\d+ \(in worker process 1\)$", str(caught.value))
    assert "in step" in caught.value.trace
    for call in (lambda: drive(envs, 1), envs.reset, envs.state_dict):
        with pytest.raises(EnvironmentFailedError, match=where):
            call()


@pytest.mark.parametrize(("fault", "message"), [("build", "no such ROM"), ("reset", "no display"), ("reward", "nan")])
def test_faults_are_named(make: Make, fault: str, message: str) -> None:
    envs = make(tasks(f"faulty-{fault}"), workers=1)
    with pytest.raises(EnvironmentFailedError, match=f"'probe/faulty-{fault}'.*{message}"):
        begin_and_drive(envs)


def test_worker_that_dies_in_a_step(make: Make) -> None:
    envs = make(tasks("counter", "faulty-die"), workers=2)
    envs.reset(seed=2)
    where = (
        rf"'probe/faulty-die' \(slot 1, seed {episode_seed(2, 1, 0)}, step 3\): worker process 1 was killed by SIGKILL"
    )
    with pytest.raises(EnvironmentFailedError, match=where):
        drive(envs, 5)
    with pytest.raises(EnvironmentFailedError, match="SIGKILL"):
        drive(envs, 1)


def test_interrupts_are_the_parents_affair(make: Make) -> None:
    envs = make(tasks("counter", "walk"), workers=2)
    envs.reset()
    for process in processes(envs):
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
    drive(envs, 5)
    assert [process.poll() for process in processes(envs)] == [None, None]


def test_close_leaves_no_process_even_if_one_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrl.vector.workers._CLOSE_SECONDS", 0.3)
    envs = MultiTaskVectorEnv(tasks("counter", "faulty-hang"), workers=2)
    envs.reset()
    drive(envs, 2)
    envs.step_async(random_actions(envs, np.random.default_rng(0)))
    children = processes(envs)
    started = time.monotonic()
    envs.close()
    assert time.monotonic() - started < 30
    assert [process.returncode for process in children] == [1, -signal.SIGKILL] or children[1].returncode == -9
    envs.close()


def test_no_file_descriptor_stays_open() -> None:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    gc.collect()
    before = len(list(folder.iterdir()))
    envs = MultiTaskVectorEnv(tasks("counter"), 2, workers=2)
    envs.reset()
    children = processes(envs)
    assert len(list(folder.iterdir())) > before
    envs.close()
    assert [process.returncode for process in children] == [0, 0]
    del envs
    gc.collect()
    assert len(list(folder.iterdir())) == before


def test_close_while_a_forked_child_holds_the_pipes() -> None:
    """Copies of the pipes in other children must not keep workers alive, nor may such a child end the workers."""
    envs = MultiTaskVectorEnv(tasks("counter"), workers=1)
    envs.reset()
    backend = envs._backend
    assert isinstance(backend, Workers)
    copy = os.dup(backend._links[0].writer.fileno())
    (child,) = processes(envs)
    _shut_down(os.getpid() + 1, backend._links, backend._processes, backend._file)
    drive(envs, 2)
    envs.close()
    os.close(copy)
    assert child.returncode == 0


def test_module_that_the_worker_cannot_import(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ghost = types.ModuleType("ghost")
    exec("class Env: pass\nEnv.__module__ = 'ghost'", vars(ghost))
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    envs = make([replace(tasks("walk-calm")[0], build=vars(ghost)["Env"])], workers=1)
    with pytest.raises(EnvironmentFailedError, match="No module named 'ghost'"):
        envs.reset()


def test_forgotten_vector_ends_its_workers() -> None:
    envs = MultiTaskVectorEnv(tasks("counter"), workers=1)
    (child,) = processes(envs)
    del envs
    assert child.poll() == 0


def test_workers_die_with_a_killed_parent() -> None:
    """kill -9 of the parent, while one worker idles and another hangs in its environment; nothing stays in /dev/shm."""
    script = (
        "import numpy as np\nfrom mtrl.vector import MultiTaskVectorEnv\nfrom tests.vector.probes import tasks\n"
        "envs = MultiTaskVectorEnv(tasks('counter', 'faulty-hang'), workers=2)\nenvs.reset()\n"
        "zero = {'probe': np.zeros(1, int), 'probe-2': np.zeros(1, int)}\n"
        "envs.step(zero)\nenvs.step(zero)\nenvs.step_async(zero)\n"
        "print(*(p.pid for p in envs._backend._processes), flush=True)\ninput()\n"
    )
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(gone(pid, within=0.2) for pid in pids)
        parent.kill()
    assert all(gone(pid) for pid in pids)
    left = set(shared.iterdir()) if shared.is_dir() else set()
    assert not [path for path in left - before if "mtrl" in path.name]


def test_workers_import_neither_torch_nor_the_main_module(make: Make) -> None:
    envs = make(tasks("counter"), workers=1)
    envs.reset()
    maps = Path(f"/proc/{processes(envs)[0].pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert "numpy" in maps.read_text()
    assert "torch" not in maps.read_text()


def test_tasks_that_cannot_travel_are_named() -> None:
    unpicklable = replace(tasks("counter")[0], build=lambda **render: tasks("counter")[0].build(**render))
    with pytest.raises(ValueError, match=r"'probe/counter' cannot be sent to worker processes.*module-level"):
        MultiTaskVectorEnv([unpicklable], workers=1)
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from dataclasses import replace\nfrom mtrl.vector import MultiTaskVectorEnv\n"
            "from tests.vector.probes import Counter, tasks\n"
            "class Mine(Counter): pass\n"
            "MultiTaskVectorEnv([replace(tasks('counter')[0], build=Mine)], workers=1)\n",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "move them into a module, or use workers=0" in result.stderr


@pytest.mark.parametrize(("last", "awake"), [(0.0, True), (1.0, False)])
def test_a_worker_stays_awake_only_while_orders_come_quickly(
    last: float, awake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    yields: list[None] = []
    monkeypatch.setattr(os, "sched_yield", lambda: yields.append(None))
    reader, writer = Pipe(duplex=False)
    link = _Link.of(reader, writer)
    later = threading.Timer(0.05, link.put, [b"s"])
    later.start()
    waited = link.await_soon(last)
    assert (link.get(), bool(yields)) == (b"s", awake)
    assert 0.001 < waited < 30  # the next one sleeps
    link.put(b"s")
    link.await_soon(1.0)
    assert link.get() == b"s"
    link.close()


def test_a_worker_notices_the_end_of_its_orders() -> None:
    reader, writer = Pipe(duplex=False)
    link = _Link.of(reader, writer)
    writer.close()
    link.await_soon(0.0)
    assert link.get() == b""
    reader.close()


def test_workers_know_what_a_suites_module_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickled ``partial(gym.make, id)`` names Gymnasium, not the module that registered the environment."""
    (tmp_path / "registering_suite.py").write_text(
        "from functools import partial\n"
        "import gymnasium as gym\n"
        "from mtrl.types import Task\n"
        "gym.register('registered/Pole-v0', 'gymnasium.envs.classic_control.cartpole:CartPoleEnv')\n"
        "class Suite:\n"
        "    name, groups = 'registering', ('all',)\n"
        "    def tasks(self, group):\n"
        "        return [Task('registering/pole', partial(gym.make, 'registered/Pole-v0'), 20)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = registry.tasks("registering_suite:Suite/all")
    with contextlib.closing(MultiTaskVectorEnv(found, 2, workers=1)) as envs:
        envs.reset(seed=0)
        assert not envs.faults


class Locked:
    """Cannot be pickled, and says so in a way of its own."""

    def __reduce__(self) -> tuple[object, ...]:
        raise ValueError("no pickling of me")

    def __call__(self) -> None: ...


def test_why_a_task_cannot_be_sent_is_told_whatever_was_raised() -> None:
    assert "'a/b' cannot be sent to worker processes: no pickling of me" in unsendable(Task("a/b", Locked(), 5))
