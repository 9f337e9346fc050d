"""Watching: the right episodes, whole, each task in its own tile and as if it were alone in the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image, ImageSequence

from mtrl import doctor, registry, runs, watch
from mtrl.config import load_config, parse_config
from mtrl.evaluate import evaluate
from mtrl.highlights import Highlight, Highlights
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.train import train
from mtrl.types import Episode, Journal, Task
from mtrl.vector import RenderError, moments, replay
from mtrl.watch import Reel, WatchError, film, pick, played, select, training
from tests.vector.probes import tasks

ALL = "tests.vector.probes:Probes/all"
PICTURE = "tests.vector.probes:Probes/picture"


def episode(journal: Journal, ret: float = 0.0, success: bool | None = None, task: int = 0) -> Episode:
    return Episode(task, 0, 0, journal.seed, ret, len(journal.actions), success, success, False, journal)


def pictures(length: int) -> Journal:
    """An episode of the probe whose picture shows the step."""
    return Journal("probe/picture", 0, np.zeros(length, np.int64))


def colours(path: Path, row: int, column: int) -> list[int]:
    """Red of one pixel in every frame of a gif, frames that are held counted as often as they are."""
    with Image.open(path) as image:
        found = []
        for frame in ImageSequence.Iterator(image):
            pixel = frame.convert("RGB").getpixel((column, row))
            assert isinstance(pixel, tuple)
            found += [pixel[0]] * round(image.info["duration"] / 100)
    return found


# Pictures


def test_an_episode_is_drawn_from_its_start_to_its_end_whatever_is_left_out() -> None:
    (task,) = tasks("picture")
    for every, steps in ((1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (3, [0, 3, 5]), (9, [0, 5])):
        seen = list(moments(task, pictures(5), every=every))
        assert [moment.step for moment in seen] == steps
        assert [int(moment.picture[0, 0, 0]) for moment in seen] == steps


def test_pictures_come_one_by_one_and_the_environment_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = tasks("picture")
    env = task.build(render_mode="rgb_array")
    drawn, closed = [], []
    render = type(env).render
    monkeypatch.setattr(type(env), "render", lambda self: (drawn.append(1), render(self))[1])
    monkeypatch.setattr(type(env), "close", lambda self: closed.append(1))
    playing = moments(task, pictures(50))
    assert [next(playing).step, next(playing).step] == [0, 1]
    assert len(drawn) == 2
    before = len(closed)  # one was made to look at its spaces
    playing.close()
    assert (len(drawn), len(closed)) == (2, before + 1)


def test_tiles_follow_their_episodes_and_hold_the_last_picture_darkened(tmp_path: Path) -> None:
    (task,) = tasks("picture")
    reels = [Reel(task, [episode(pictures(30))]), Reel(task, [episode(pictures(20)), episode(pictures(4))])]
    path = film(reels, tmp_path / "x.gif", fps=10, height=32)
    with Image.open(path) as image:
        width, height = image.size
    left = [*range(31), *[15] * 5]
    right = [*range(21), *[10] * 5, *range(5), *[2] * 5]
    assert colours(path, height - 8, width // 4) == left
    assert colours(path, height - 8, 3 * width // 4) == right


def test_max_frames_bounds_every_episode(tmp_path: Path) -> None:
    (task,) = tasks("picture")
    done: list[tuple[int, int]] = []
    path = tmp_path / "x.gif"
    film(
        [Reel(task, [episode(pictures(50))])],
        path,
        fps=10,
        height=32,
        max_frames=11,
        progress=lambda n, of: done.append((n, of)),
    )
    with Image.open(path) as image:
        height = image.size[1]
    assert colours(path, height - 8, 16) == [*range(0, 51, 5), *[25] * 5]
    assert done == [(n, 16) for n in range(1, 17)]


def test_an_episode_that_plays_otherwise_is_not_shown(tmp_path: Path) -> None:
    (task,) = tasks("picture")
    with pytest.raises(WatchError, match=r"probe/picture, seed 0: the recorded return is 7\.5, played again it is"):
        film([Reel(task, [episode(pictures(5), ret=7.5)])], tmp_path / "x.mp4")
    assert list(tmp_path.iterdir()) == []


class Blank(gym.Env):
    """Renders what the test says."""

    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, found: Any = None, render_mode: str | None = None) -> None:
        self.found = found

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"task 'x/y' cannot render: render\(\) gave None, not \[h, w, 3\] uint8"),
        (np.zeros((4, 4, 3)), r"cannot render: render\(\) gave \('float64', \(3,\)\)"),
        (np.zeros((4, 4), np.uint8), r"cannot render: render\(\) gave \('uint8', \(\)\)"),
        (RuntimeError("no OpenGL"), r"task 'x/y' cannot render: RuntimeError\('no OpenGL'\)"),
    ],
)
def test_what_cannot_render(found: Any, message: str) -> None:
    task = Task("x/y", lambda **render: Blank(found, **render), 5)
    with pytest.raises(RenderError, match=message):
        next(moments(task, Journal("x/y", 0, np.zeros(1, np.int64))))


def test_a_build_without_render_mode() -> None:
    (task,) = tasks("counter")
    with pytest.raises(RenderError, match="task 'probe/counter' cannot render: its build takes no render_mode"):
        next(moments(task, Journal(task.name, 0, np.zeros(1, np.int64))))


def test_a_task_that_cannot_be_drawn_has_an_empty_tile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn, blind = (tasks(name)[0] for name in ("picture", "counter"))
    undrawn = Reel(blind, [episode(Journal(blind.name, 0, np.zeros(1, np.int64)))])
    path = film([undrawn, Reel(drawn, [episode(pictures(5))])], tmp_path / "x.gif", fps=10, height=32)
    with Image.open(path) as image:
        width, height = image.size
    assert colours(path, height - 8, width // 4) == [40] * 11
    assert colours(path, height - 8, 3 * width // 4) == [*range(6), *[2] * 5]
    assert [record.getMessage() for record in caplog.records] == [
        "task 'probe/counter' cannot render: its build takes no render_mode"
    ]
    with pytest.raises(RenderError, match="task 'probe/counter' cannot render"):
        film([undrawn, undrawn], tmp_path / "y.gif")
    assert not (tmp_path / "y.gif").exists()


# Which episodes


def test_selecting_tasks() -> None:
    found = registry.tasks("minigrid/mt3")
    assert select(found, ()) == found
    assert [task.name for task in select(found, ("MemoryS11", "minigrid/LavaGapS7"))] == [
        "minigrid/LavaGapS7",
        "minigrid/MemoryS11",
    ]
    with pytest.raises(UnknownNameError, match="unknown task 'MemoryS1'; did you mean 'minigrid/MemoryS11'"):
        select(found, ("MemoryS1",))


def test_picks() -> None:
    config = load_config(suite=PICTURE, agent="random")
    policy = runs.untrained(config)
    found = evaluate(policy.agent, policy.tasks, spec=policy.spec, episodes=6, seed=config.eval.seed)
    (result,) = found.results
    shown = {which: list(pick(found, which)[0].episodes) for which in watch.PICKS}
    assert shown["all"] == list(result.episodes)
    assert [one.ret for one in shown["best"]] == [max(result.returns)]
    assert [one.ret for one in shown["worst"]] == [min(result.returns)]
    assert shown["last"] == [result.episodes[-1]]
    with pytest.raises(UnknownNameError, match="did you mean 'best'"):
        pick(found, "bset")


def test_some_tasks_of_an_evaluation_are_the_same_episodes() -> None:
    suite = "minigrid/mt3+mtrl.testing:Probes/team"
    seeds = [[one.seed for one in reel.episodes] for reel in played(load_config(suite=suite, agent="random"))]
    some = played(load_config(suite=suite, agent="random"), names=["team", "MemoryS11"])
    assert [reel.task.name for reel in some] == ["minigrid/MemoryS11", "probe/team"]
    assert [[one.seed for one in reel.episodes] for reel in some] == seeds[2:]


def settings(**changes: Any) -> Any:
    raw: dict[str, Any] = {
        "suite": "mtrl.testing:Probes/mix",
        "agent": {"kind": "ppo", "rollout": 16, "epochs": 2},
        "steps": 800,
        "copies": 2,
        "workers": 0,
        "threads": 1,
        "eval": {"episodes": 4},
        "checkpoint": {"every": 300, "keep": 9},
        "log": {"terminal": False, "wandb": "off"},
    }
    return parse_config({**raw, **changes})


def test_a_runs_evaluation_can_be_watched_again(tmp_path: Path) -> None:
    train(settings(), tmp_path / "x")
    summary = json.loads((tmp_path / "x" / runs.SUMMARY).read_text())["evaluation"]["tasks"]
    for reel in played(tmp_path / "x", episodes=4):
        again = [{"seed": one.seed, "return": one.ret, "length": one.length} for one in reel.episodes]
        assert again == [{key: one[key] for key in again[0]} for one in summary[reel.task.name]["episodes"]]
    for reel in played(tmp_path / "x", "best"):
        assert reel.episodes[0].ret == max(one["return"] for one in summary[reel.task.name]["episodes"])


# Training episodes


def test_best_worst_and_last_are_kept() -> None:
    spec = make_spec(tasks("picture"))
    kept = Highlights(spec)
    assert kept.of("probe/picture") == {}
    given = [
        episode(Journal("probe/picture", seed, np.zeros(2, np.int64)), ret) for seed, ret in enumerate((2, 5, 5, 1, 3))
    ]
    for step, one in enumerate(given):
        kept.add(one, step)
    assert kept.of("probe/picture") == {
        "best": Highlight(given[1], 1),
        "worst": Highlight(given[3], 3),
        "last": Highlight(given[4], 4),
    }


@pytest.mark.parametrize(
    "suite", ["mtrl.testing:Probes/mix", "mtrl.testing:Probes/team", ALL], ids=["mix", "team", "all"]
)
def test_training_episodes_play_again_bit_for_bit(suite: str, tmp_path: Path) -> None:
    config = settings(suite=suite, agent={"kind": "random"}, steps=900)
    train(config, tmp_path / "x")
    found = {task.name: task for task in registry.tasks(suite)}
    rets: dict[str, dict[str, float]] = {name: {} for name in found}
    for which in ("best", "worst", "last"):
        for reel in training(tmp_path / "x", which):
            (one,) = reel.episodes
            again = replay(reel.task, one.journal)
            assert (again.ret, again.length, again.success) == (one.ret, one.length, one.success)
            rets[reel.task.name][which] = one.ret
    assert all(mine["worst"] <= mine["last"] <= mine["best"] for mine in rets.values())


def test_training_episodes_are_the_same_after_a_resume_and_with_workers(tmp_path: Path) -> None:
    long, short = settings(), settings(steps=500)
    train(long, tmp_path / "whole")
    train(short, tmp_path / "parts")
    train(long, tmp_path / "parts", resume=True)
    train(settings(workers=2), tmp_path / "workers")
    files = [(tmp_path / name / runs.EPISODES).read_bytes() for name in ("whole", "parts", "workers")]
    assert files[0] == files[1] == files[2]


def test_watching_the_training_of_a_run(tmp_path: Path) -> None:
    train(settings(suite="mtrl.testing:Probes/discrete", steps=60), tmp_path / "x")
    reels = training(tmp_path / "x", "worst", ["action"])
    assert [reel.task.name for reel in reels] == ["probe/action"]
    with pytest.raises(UnknownNameError, match="choice of episodes 'worse'; did you mean 'worst'"):
        training(tmp_path / "x", "worse")
    train(settings(suite="minigrid/Empty-5x5", agent={"kind": "random"}, steps=2), tmp_path / "y")
    with pytest.raises(WatchError, match="no training episode has ended yet: minigrid/Empty-5x5"):
        training(tmp_path / "y", "best")
    (tmp_path / "x" / runs.EPISODES).unlink()
    with pytest.raises(WatchError, match="holds no training episodes"):
        training(tmp_path / "x", "best")


# Several renderers in one process

_SIDE_BY_SIDE = """
import hashlib, sys
import numpy as np
import gymnasium as gym
from mtrl import registry
from mtrl.types import Journal, Task
from mtrl.vector import moments

STEPS = {"metaworld/reach-v3": 2, "metaworld/window-open-v3": 4, "Hopper-v5": 5, "metaworld/drawer-close-v3": 3}
STEPS |= {"minigrid/LavaGapS7": 3, "smac/3m": 3, "atari/Pong": 3}

def build(**render):
    return gym.make("Hopper-v5", width=60, height=60, **render)

def play(name):
    task = Task(name, build, 9) if name == "Hopper-v5" else registry.tasks(name)[0]
    rng = np.random.default_rng(0)
    shape = {"metaworld": (4,), "Hopper-v5": (3,), "smac": (3,)}.get(name.partition("/")[0], ())
    actions = np.zeros((STEPS[name], *shape), np.int64)
    if len(shape) and name != "smac/3m":
        actions = rng.uniform(-1, 1, actions.shape).astype(np.float32)
    elif name == "smac/3m":
        actions += 1
    for moment in moments(task, Journal(name, 3, actions)):
        yield moment.picture

def digest(frames):
    assert min(int(frame.max()) for frame in frames) > 50, "a picture is black"
    return hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()

names = sys.argv[1:]
seen = {name: [] for name in names}
playing = {name: play(name) for name in names}
while playing:
    for name in list(playing):
        frame = next(playing[name], None)
        if frame is None:
            del playing[name]  # its environment is closed while the others go on
        else:
            seen[name].append(frame)
for name in names:
    print(name, digest(seen[name]))
"""


@pytest.fixture
def drawn() -> Callable[..., dict[str, str]]:
    """Digests of the pictures of episodes that play in turns in one fresh process."""

    def run(backend: str, *names: str) -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", _SIDE_BY_SIDE, *names],
            env={**os.environ, "MUJOCO_GL": backend},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return dict(line.split() for line in done.stdout.splitlines())

    return run


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_renderers_do_not_disturb_each_other(backend: str, drawn: Callable[..., dict[str, str]]) -> None:
    if backend not in doctor.GL_BACKENDS or not doctor.renders(backend):
        pytest.skip(f"no {backend} on this machine")
    mujoco = ["metaworld/reach-v3", "metaworld/window-open-v3", "Hopper-v5", "metaworld/drawer-close-v3"]
    others = ["minigrid/LavaGapS7", "smac/3m", "atari/Pong"]
    together = drawn(backend, *[name for pair in zip(mujoco, [*others, ""], strict=True) for name in pair if name])
    assert together == {**drawn(backend, *others), **{k: v for name in mujoco for k, v in drawn(backend, name).items()}}
