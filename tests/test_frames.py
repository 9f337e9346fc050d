"""Frames stored once against whole stacks: the same bits from both memories, whatever befalls the rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from mtrl import checkpoint, make_spec, registry
from mtrl.frames import Frames
from mtrl.replay import Replay
from mtrl.rollout import Items, Rollout
from mtrl.sampler import Sampled, SamplerConfig
from mtrl.spaces import SpaceError
from mtrl.types import Decision, Group, Obs, Spec, Step, Task, TaskInfo
from mtrl.vector import MultiTaskVectorEnv

K, COLOURS, SIDE = 3, 2, 5
PICTURE = Box(0, 255, (K * COLOURS, SIDE, SIDE), np.uint8)
LINE = Box(-np.inf, np.inf, (4,), np.float32)
FLAG = Box(0, 1, (), np.bool_)  # type: ignore[call-overload]
LENGTH = 12


def specs(tasks: int = 3) -> tuple[Spec, Spec]:
    """The same spec without and with declared frames: tasks 0 .. n - 2 in "eye" (two stacks, a plain leaf), the last in
    "arm"."""
    leaves = {"image": PICTURE, "vector": LINE, "alive": FLAG, "state": LINE}
    eye = Group("eye", leaves, Discrete(3), tuple(range(tasks - 1)))
    arm = Group("arm", {"vector": LINE}, Box(-1.0, 1.0, (2,), np.float32), (tasks - 1,))
    infos = tuple(TaskInfo(f"t{i}", "eye" if i < tasks - 1 else "arm", 10) for i in range(tasks))
    return Spec(infos, (eye, arm)), Spec(infos, (replace(eye, frames={"image": K, "vector": 2}), arm))


class Rows:
    """Rows that play episodes of stacked frames, change tasks in between, pause, die, and end in both ways.

    ``start``: how the first stack is filled: "repeat", "zeros" or "random" (which is no stack of earlier frames).
    ``end``, ``pause``: how probable it is, at every step, that an episode ends and that a row is inactive or dead.
    """

    def __init__(self, seed: int, tasks: int = 3, start: str = "repeat", end: float = 0.2, pause: float = 0.1) -> None:
        self.rng, self.tasks, self.start = np.random.default_rng(seed), tasks, start
        self.end, self.pause = end, pause
        self.n = 4
        self.first = np.ones(self.n + 2, bool)
        self.task = np.array([*self.rng.integers(tasks - 1, size=self.n), tasks - 1, tasks - 1])
        self.image = self.begin((self.n, K, COLOURS, SIDE, SIDE))
        self.line = self.begin((self.n, 2, 2))

    def frame(self, shape: tuple[int, ...]) -> Any:
        return self.rng.choice(np.array([0, 1, 255]), shape)  # few values: whole frames happen to repeat

    def begin(self, shape: tuple[int, ...]) -> Any:
        found = self.frame(shape)
        if self.start == "repeat":
            found[:, :-1] = found[:, -1:]
        elif self.start == "zeros":
            found[:, :-1] = 0
        return found

    def obs(self) -> Obs:
        line = self.line.reshape(self.n, 4).astype(np.float32)
        line[line == 255] = np.nan
        line[line == 1] = -0.0
        leaves = {
            "image": self.image.reshape(self.n, *PICTURE.shape).astype(np.uint8),
            "vector": line,
            "alive": self.rng.random(self.n) >= self.pause,
            "state": self.rng.normal(size=(self.n, 4)).astype(np.float32),
        }
        arm = self.rng.normal(size=(2, 4)).astype(np.float32)
        return Obs({"eye": leaves, "arm": {"vector": arm}}, self.task.copy(), self.first.copy())

    def step(self) -> Step:
        before, rng, n = self.obs(), self.rng, self.n + 2
        self.image = np.concatenate((self.image[:, 1:], self.frame((self.n, 1, COLOURS, SIDE, SIDE))), 1)
        self.line = np.concatenate((self.line[:, 1:], self.frame((self.n, 1, 2))), 1)
        after = self.obs()
        ended = rng.random(n) < self.end
        terminated = ended & (rng.random(n) < 0.5)
        active = rng.random(n) >= self.pause
        decision = Decision(
            {"eye": rng.integers(3, size=self.n), "arm": rng.uniform(-1, 1, (2, 2)).astype(np.float32)},
            {"log_prob": rng.normal(size=n)},
        )
        found = Step(before, decision, rng.normal(size=n), terminated, ended & ~terminated, ended, after, active)
        over = np.flatnonzero(ended[: self.n])
        self.first = ended
        self.image[over] = self.begin((len(over), K, COLOURS, SIDE, SIDE))
        self.line[over] = self.begin((len(over), 2, 2))
        self.task[over] = rng.integers(self.tasks - 1, size=len(over))
        return found


def assert_same(one: Any, other: Any) -> None:
    """Equal in structure, dtype and every bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def every_minibatch(roll: Rollout, steps: int) -> list[tuple[Any, ...]]:
    items = Items(roll, steps=steps, columns={}, action=roll.action, memory={}, device=torch.device("cpu"))
    drawn = items.minibatches(3, torch.Generator().manual_seed(0))
    return [(batch.leaves, batch.action, batch.columns, batch.memory) for batch in drawn]


def compare_rollouts(whole: Rollout, once: Rollout) -> None:
    for group, leaves in whole.leaves.items():
        for leaf, array in leaves.items():
            found = once.leaves[group][leaf]
            assert found.shape == array.shape
            ts, rows = np.array([3, 0, 3]), np.array([1, 0, 0])
            for at in (slice(None), slice(2, 5), 1, -1, (ts, rows), (slice(None), 0)):
                assert_same(array[at], found[at])
    assert_same(tuple(whole.successors()), tuple(once.successors()))
    for steps in (1, 4):
        for mine, theirs in zip(every_minibatch(whole, steps), every_minibatch(once, steps), strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("start", ["repeat", "zeros", "random"])
@pytest.mark.parametrize("seed", range(4))
def test_a_rollout_of_frames_is_a_rollout_of_stacks(seed: int, start: str) -> None:
    rows = Rows(seed, start=start)
    whole, once = (Rollout(spec, LENGTH) for spec in specs())
    for _ in range(3):  # the second one begins in the midst of episodes
        for _ in range(LENGTH):
            step = rows.step()
            for roll in (whole, once):
                roll.add(step)
        compare_rollouts(whole, once)
        for roll in (whole, once):
            roll.clear()


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_rollout_resumes_from_its_frames(done: int, tmp_path: Any) -> None:
    rows = Rows(7)
    plain, framed = specs()
    whole, once, resumed = Rollout(plain, LENGTH), Rollout(framed, LENGTH), Rollout(framed, LENGTH)
    for t in range(LENGTH + done):
        if t == LENGTH:
            whole.clear()
            once.clear()
        step = rows.step()
        whole.add(step)
        once.add(step)
    checkpoint.save(tmp_path, 1, {"rollout": once.state_dict()}, {})
    resumed.load_state_dict(checkpoint.load(tmp_path).state["rollout"])
    if done == 0:
        compare_rollouts(whole, resumed)
    while not whole.full:
        step = rows.step()
        for roll in (whole, once, resumed):
            roll.add(step)
    compare_rollouts(whole, once)
    compare_rollouts(whole, resumed)


def replays(capacity: int, tasks: int = 3) -> Iterator[Replay]:
    return (Replay(spec, capacity, seed=5) for spec in specs(tasks))


def compare_replays(whole: Replay, once: Replay) -> None:
    assert whole.sizes.tolist() == once.sizes.tolist()
    one, other = whole.sample(40), once.sample(40)
    assert_same({name: tuple(batch) for name, batch in one.items()}, {g: tuple(batch) for g, batch in other.items()})


@pytest.mark.parametrize("start", ["repeat", "zeros", "random"])
@pytest.mark.parametrize("capacity", [1, 2, 9, 50])
def test_a_replay_of_frames_is_a_replay_of_stacks(capacity: int, start: str) -> None:
    """Several rows per task, slots that change tasks, rows that pause and die, wrapped rings, tiny episodes."""
    for seed, end in enumerate((0.02, 0.3, 0.9)):
        rows = Rows(seed, start=start, end=end)
        whole, once = replays(capacity)
        for t in range(60):
            step = rows.step()
            whole.add(step)
            once.add(step)
            if t % 4 == 0:
                compare_replays(whole, once)


@pytest.mark.parametrize("steps", [3, 40])
def test_a_replay_resumes_from_its_frames(steps: int, tmp_path: Any) -> None:
    rows = Rows(3)
    whole, once = replays(15)
    for _ in range(steps):
        step = rows.step()
        whole.add(step)
        once.add(step)
    compare_replays(whole, once)
    checkpoint.save(tmp_path, 1, {"replay": once.state_dict()}, {})
    _, resumed = replays(15)
    resumed.load_state_dict(checkpoint.load(tmp_path).state["replay"])
    _, twin = replays(15)
    twin.load_state_dict(copy.deepcopy(once.state_dict()))
    for _ in range(30):
        state = copy.deepcopy(whole.state_dict()["rng"])
        for replay in (once, resumed, twin):
            step_state = replay.state_dict()["rng"]
            assert step_state == state
        step = rows.step()
        for replay in (whole, once, resumed, twin):
            replay.add(step)
        one = {name: tuple(copy.deepcopy(batch)) for name, batch in whole.sample(20).items()}
        for replay in (once, resumed, twin):
            assert_same(one, {name: tuple(batch) for name, batch in replay.sample(20).items()})


def pool(box: Box = PICTURE, k: int = K, size: int = 4) -> Frames:
    return Frames(box, k, size)


def test_each_frame_of_an_episode_is_stored_once() -> None:
    rng = np.random.default_rng(0)
    screens = rng.integers(256, size=(20, 1, COLOURS, SIDE, SIDE), dtype=np.uint8)
    frames = pool(size=20)
    index = frames.put(np.concatenate([screens[0]] * K, 1), np.zeros((1, K), np.int32), 1)
    assert index.tolist() == [[0, 0, 0]]
    for t in range(1, 20):
        stack = np.concatenate([screens[max(0, t - back)] for back in (2, 1, 0)], 1)
        index = frames.put(stack, index, 1)
        np.testing.assert_array_equal(frames.get(index), stack)
    assert frames.used == 20
    assert index.tolist() == [[17, 18, 19]]


def test_frames_that_nobody_needs_make_room() -> None:
    """A ring of 10 transitions of one endless row needs 10 + K frames, however long it goes on."""
    frames, rng = pool(size=4), np.random.default_rng(0)
    stack = np.zeros((1, *PICTURE.shape), np.uint8)
    index, ring = np.zeros((1, K), np.int32), []
    for _ in range(200):
        stack = np.concatenate((stack[:, COLOURS:], rng.integers(256, size=(1, COLOURS, SIDE, SIDE))), 1).astype(
            np.uint8
        )
        index = frames.put(stack, index, 1)
        ring.append((index, stack))
        if len(ring) > 10:
            frames.drop(ring.pop(0)[0])
        for held, whole in ring:
            np.testing.assert_array_equal(frames.get(held), whole)
    assert frames.used <= 10 + K


def test_a_dropped_stack_is_not_continued() -> None:
    """Its bytes still lie in the pool, but the next frame may take their place."""
    frames, stack = pool(size=8), np.ones((1, *PICTURE.shape), np.uint8)
    index = frames.put(stack, np.zeros((1, K), np.int32), 1)
    frames.drop(index)
    again = frames.put(stack, index, 0)
    other = frames.put(stack + np.uint8(1), again, 1)
    np.testing.assert_array_equal(frames.get(again), stack)
    np.testing.assert_array_equal(frames.get(other), stack + np.uint8(1))
    assert frames.used == 2


def test_what_a_full_replay_takes_follows_the_frames() -> None:
    plain, framed = specs()
    whole, once = Replay(plain, 800, seed=0), Replay(framed, 800, seed=0)
    picture, line, rest = PICTURE.shape[0] * SIDE * SIDE, 4 * 4, 2 * (1 + 4 * 4) + 8 + 4 + 1
    arm = 800 * (2 * 16 + 8 + 4 + 1)
    assert whole.nbytes == 1600 * (2 * (picture + line) + rest) + arm
    indices = 2 * 4 * (K + 2)
    assert once.nbytes == 1600 * (indices + rest) + 1801 * (picture // K + line // 2) + arm
    rows = Rows(0, end=0.05, pause=0.0)
    for _ in range(2000):
        once.add(rows.step())
    assert once.sizes.tolist() == [800] * 3
    assert once.state_dict()["rings"]["eye"]["frames"]["image"].shape[0] <= 1801


def small(box: Box, frames: dict[str, int]) -> Task:
    return Task("a/x", build=dict, horizon=5, spaces=(box, Discrete(2)), frames=frames)


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        ({"picture": 4}, "unknown leaf in Task.frames of 'a/x' 'picture'.*valid: image"),
        ({"image": 5}, r"'a/x: |a/x: Task.frames .* 'image' is a stack of 5 frames, but its shape is \(4, 8, 8\)"),
        ({"image": 1}, "give a number from 2 on"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(frames: dict[str, int], what: str) -> None:
    with pytest.raises((SpaceError, registry.UnknownNameError), match=what):
        make_spec([small(Box(0, 255, (4, 8, 8), np.uint8), frames)])


def test_tasks_with_other_frames_are_another_group() -> None:
    box = Box(0, 255, (4, 8, 8), np.uint8)
    tasks = [replace(small(box, frames), name=f"a/{i}") for i, frames in enumerate(({"image": 4}, {}, {"image": 4}))]
    spec = make_spec(tasks)
    assert [(group.tasks, group.frames) for group in spec.groups] == [((0, 2), {"image": 4}), ((1,), {})]


@pytest.mark.parametrize("kind", ["pinned", "uniform"])
def test_real_screens(kind: Any) -> None:
    """Pong and Boxing, two slots each, with time limits short enough to be met; slots that change games."""
    pytest.importorskip("ale_py")
    tasks = [replace(task, horizon=40 + 7 * i) for i, task in enumerate(registry.tasks("atari/Pong+atari/Boxing"))]
    framed = make_spec(tasks)
    plain = replace(framed, groups=tuple(replace(group, frames={}) for group in framed.groups))
    assert framed.groups[0].frames == {"image": 4}
    schedule = None if kind == "pinned" else Sampled(SamplerConfig(kind=kind), framed, (0, 0, 1, 1), 0)
    rolls, memories = [Rollout(spec, 48) for spec in (plain, framed)], [Replay(s, 70, seed=0) for s in (plain, framed)]
    envs, rng = MultiTaskVectorEnv(tasks, 2, seed=0, schedule=schedule, spec=framed), np.random.default_rng(0)
    envs.reset()
    ended = 0
    for _ in range(100):
        decision = Decision({"atari": rng.integers(18, size=4)}, {})
        envs.step_async(decision.action)
        step, _ = envs.step_wait(decision)
        ended += int(step.truncated.sum())
        for memory in (*rolls, *memories):
            memory.add(step)
        if rolls[0].full:
            compare_rollouts(rolls[0], rolls[1])
            for roll in rolls:
                roll.clear()
            compare_replays(memories[0], memories[1])
    envs.close()
    assert ended >= 4
    # One frame per transition and start, the cut stacks of up to 4 slots per task, what a step adds before it drops.
    used = memories[1].state_dict()["rings"]["atari"]["frames"]["image"].shape[0]
    assert used <= 2 * 70 + ended + 2 * 4 * 3 + 4
