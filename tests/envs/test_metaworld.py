"""The MetaWorld suite against the package: goals, spaces, rewards, and every bit of the fast steps."""

import json
import pickle
from collections.abc import Callable
from importlib import resources
from typing import Any

import metaworld
import metaworld.env_dict
import numpy as np
import pytest

import mtrl_envs.metaworld as suite_module
from mtrl import registry
from mtrl.registry import UnknownNameError
from mtrl_envs.metaworld import MetaWorld, MetaWorldEnv, draw_goals, make_raw
from mtrl_envs.metaworld_fast import _compiled
from tests.envs.pictures import draw_in_turn

MT3 = ["reach-v3", "window-open-v3", "drawer-close-v3"]
MT10 = list(metaworld.env_dict.MT10_V3)
MT50 = list(metaworld.env_dict.MT50_V3)
STOCK = metaworld.env_dict.ALL_V3_ENVIRONMENTS


def some(few: list[str]) -> Any:
    """A few tasks in the default run, all the others as slow ones."""
    every = [pytest.param(name, marks=[] if name in few else pytest.mark.slow) for name in MT50]
    return pytest.mark.parametrize("task", every)


def play(
    env: MetaWorldEnv, seed: int, steps: int, act: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Observations [1 + steps, 39] and rewards [steps] of ``act``, or else of seeded random actions."""
    rng = np.random.default_rng(seed)
    found, rewards = [env.reset(seed=seed)[0]], []
    for _ in range(steps):
        obs, reward, *_ = env.step(act(found[-1]) if act else rng.uniform(-1, 1, 4).astype(np.float32))
        found.append(obs)
        rewards.append(reward)
    return np.array(found), np.array(rewards)


def global_stream() -> np.ndarray:
    """The state of NumPy's global generator, which nobody here may touch."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return np.append(state["state"]["key"], state["state"]["pos"])


# The suite


def test_groups_are_those_of_the_package() -> None:
    package = metaworld.env_dict
    want = {
        "mt3": MT3,
        "mt5": [*MT3, "window-close-v3", "button-press-topdown-v3"],
        "mt10": package.MT10_V3,
        "mt25": package.MT25_V3,
        "mt50": package.MT50_V3,
        "ml10-train": package.ML10_V3["train"],
        "ml10-test": package.ML10_V3["test"],
        "ml45-train": package.ML45_V3["train"],
        "ml45-test": package.ML45_V3["test"],
    }
    suite = MetaWorld()
    assert list(suite.groups) == list(want)
    for group, names in want.items():
        assert [task.name for task in suite.tasks(group)] == [f"metaworld/{name}" for name in names]


def test_single_tasks_with_and_without_version() -> None:
    (long,), (short,) = registry.tasks("metaworld/reach-v3"), registry.tasks("metaworld/reach")
    assert long.name == short.name == "metaworld/reach-v3"


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'window-open-v3'"):
        MetaWorld().tasks("windw-open-v3")
    with pytest.raises(UnknownNameError, match="did you mean 'mt10'"):
        MetaWorld().tasks("mt11")
    with pytest.raises(UnknownNameError, match="goals of suite"):
        MetaWorld(goals="fiftyy")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="did you mean 'reach-v3'"):
        MetaWorld.expert("reech")


def test_scores_are_known_for_every_task_and_the_usual_horizons() -> None:
    for horizon in (150, 200, 500):
        for task in MetaWorld(horizon=horizon).tasks("mt50"):
            assert task.score[0] < task.score[1] <= 10 * horizon
            assert "benchmarks/metaworld_scores.py" in task.score_source
    for suite in (MetaWorld(horizon=123), MetaWorld(reward_version="v1")):
        (task,) = suite.tasks("reach")
        assert task.score == (0.0, 1.0)
        assert "not measured" in task.score_source


def test_a_variant_reaches_the_environment() -> None:
    (task,) = MetaWorld(horizon=3, goals="free", reward_version="v1", fast=False).tasks("reach")
    assert task.protocol["goals"] == "free"
    assert task.protocol["reward"] == "v1"
    env = pickle.loads(pickle.dumps(task.build))()  # noqa: S301 (our own)
    assert env.goals is None
    assert env.raw.reward_function_version == "v1"
    assert type(env.raw) is STOCK["reach-v3"]
    env.close()


def test_only_environments_that_draw_load_what_is_drawn() -> None:
    plain, drawing = make_raw("reach-v3", fast=True), make_raw("reach-v3", fast=True, render_mode="rgb_array")
    assert plain.model.nbuffer < drawing.model.nbuffer / 4
    plain.close()
    drawing.close()


# Episodes


def test_environments_of_a_task_write_to_models_of_their_own() -> None:
    """The task is compiled once; a reset moves its window within the model."""
    envs = [MetaWorldEnv("window-open-v3") for _ in range(2)]
    windows = [env.raw.model.body("window").pos for env in envs]
    for env, seed in zip(envs, (1, 2), strict=True):
        env.reset(seed=seed)
    assert not np.array_equal(*windows)
    before, compiled = windows[0].copy(), _compiled.cache_info().misses
    MetaWorldEnv("window-open-v3").reset(seed=2)
    assert np.array_equal(windows[0], before)
    assert _compiled.cache_info().misses == compiled


@pytest.mark.parametrize("goals", ["fifty", "free"])
@some([*MT3, "peg-insert-side-v3"])
def test_seeds_decide_episodes(task: str, goals: Any) -> None:
    (declared,) = MetaWorld(horizon=100, goals=goals).tasks(task)
    before = global_stream()
    used, fresh = declared.build(), declared.build()
    assert declared.spaces == (used.observation_space, used.action_space)
    first = play(used, 5, 12)
    other = play(used, 6, 100, MetaWorld.expert(task))  # moves things, which the next reset must put back
    again = play(used, 5, 12)
    third = play(fresh, 5, 12)
    for obs, rewards in (again, third):
        np.testing.assert_array_equal(first[0], obs, strict=True)
        np.testing.assert_array_equal(first[1], rewards, strict=True)
    assert not np.array_equal(first[0][0], other[0][0])
    assert all(used.observation_space.contains(obs) for obs in (*first[0], *other[0]))
    np.testing.assert_array_equal(before, global_stream())
    used.close()
    fresh.close()


def test_unseeded_resets_continue_the_stream() -> None:
    env = MetaWorldEnv("reach-v3", horizon=3)
    goals = set()
    env.reset(seed=0)
    for _ in range(10):
        goals.add(env.reset()[0][36:].tobytes())
    assert len(goals) > 3
    env.close()


def test_truncation_at_the_horizon_and_no_step_beyond() -> None:
    env = MetaWorldEnv("reach-v3", horizon=4)
    env.reset(seed=0)
    ends = [env.step(np.zeros(4, np.float32))[2:4] for _ in range(4)]
    assert ends == [(False, False)] * 3 + [(False, True)]
    with pytest.raises(ValueError, match="must reset"):
        env.step(np.zeros(4, np.float32))
    env.reset(seed=0)
    assert env.step(np.zeros(4, np.float32))[2:4] == (False, False)
    env.close()


def test_the_callers_precision_does_not_matter() -> None:
    env = MetaWorldEnv("push-v3")
    action = np.array([0.1, -0.7, 0.3, 0.9], np.float32)
    env.reset(seed=1)
    single = env.step(action)
    env.reset(seed=1)
    double = env.step(action.astype(np.float64))
    np.testing.assert_array_equal(single[0], double[0], strict=True)
    assert single[1] == double[1]
    env.close()


def test_success_is_reported_at_every_step_and_faults_are_counted(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning to a file where it runs
    env = MetaWorldEnv("reach-v3")
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.zeros(4))
    assert info["success"] == 0.0
    assert info["simulator_faults"] == 0
    env.raw.data.qvel[:] = np.nan
    assert env.step(np.zeros(4))[4]["simulator_faults"] == 1
    assert env.step(np.zeros(4))[4]["simulator_faults"] == 1
    env.reset(seed=0)
    assert env.step(np.zeros(4))[4]["simulator_faults"] == 0
    env.close()


# Goals and rewards


@some(["push-v3", "lever-pull-v3"])
def test_goals_are_those_of_mt1(task: str) -> None:
    want = [pickle.loads(one.data)["rand_vec"] for one in metaworld.MT1(task, seed=7).train_tasks]  # noqa: S301
    for fast in (False, True):
        raw = make_raw(task, fast=fast)
        np.testing.assert_array_equal(draw_goals(raw, 7), np.array(want), strict=True)
        raw.close()


@pytest.mark.parametrize("task", ["reach-v3", pytest.param("push-v3", marks=pytest.mark.slow)])
def test_a_set_goal_plays_as_in_the_package(task: str) -> None:
    benchmark = metaworld.MT1(task, seed=3)
    stock = STOCK[task]()
    env = MetaWorldEnv(task, goal_seed=3)
    obs, _ = env.reset(seed=11)
    index = np.random.default_rng(11).integers(50)
    stock.set_task(benchmark.train_tasks[index])
    np.testing.assert_array_equal(stock.reset()[0].astype(np.float32), obs)
    for _ in range(5):
        action = env.np_random.uniform(-1, 1, 4).astype(np.float32)
        want, got = stock.step(action), env.step(action)
        np.testing.assert_array_equal(want[0].astype(np.float32), got[0])
        assert want[1] == got[1]
    stock.close()
    env.close()


def test_free_goals_are_those_of_the_packages_seeded_mode() -> None:
    env = MetaWorldEnv("pick-place-v3", goals="free")
    stock = make_raw("pick-place-v3")
    stock._freeze_rand_vec, stock.seeded_rand_vec = False, True
    for seed in (4, 9):
        stock.seed(seed)
        np.testing.assert_array_equal(stock.reset()[0].astype(np.float32), env.reset(seed=seed)[0])
    stock.close()
    env.close()


def test_rewards_are_of_version_2_unless_said_otherwise() -> None:
    two, one = MetaWorldEnv("reach-v3"), MetaWorldEnv("reach-v3", reward_version="v1")
    assert two.raw.reward_function_version == "v2"
    rewards = play(two, 0, 5)[1], play(one, 0, 5)[1]
    # Version 2 is 10 times a number in 0..1; version 1 pays 1000 per metre approached.
    assert 0 < rewards[0].min() <= rewards[0].max() <= 10
    assert not np.array_equal(*rewards)
    two.close()
    one.close()


# Fast steps


def identical(want: Any, got: Any) -> bool:
    return type(want) is type(got) and np.array_equal(want, got, equal_nan=True)


def compare(task: str, *, steps: int, reward_version: str = "v2", render_mode: str | None = None) -> None:
    """Episodes of random, scripted and mixed actions on both implementations, float64, every bit and type."""
    stock = make_raw(task, reward_version=reward_version)
    fast = make_raw(task, reward_version=reward_version, fast=True, render_mode=render_mode)
    expert = MetaWorld.expert(task)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for env in (stock, fast):
            env._freeze_rand_vec, env.seeded_rand_vec = False, True
            env.np_random = np.random.default_rng(seed)
        (obs, _), (other, _) = stock.reset(), fast.reset()
        assert identical(obs, other)
        for step in range(steps):
            scripted = rng.random() < (0.0, 1.0, 0.7)[seed]
            action = expert(obs) if scripted else rng.uniform(-1, 1, 4).astype(np.float32)
            want, got = stock.step(action), fast.step(action)
            obs = want[0]
            where = f"{task}, seed {seed}, step {step}"
            assert identical(obs, got[0]), where
            assert identical(want[1], got[1]), where
            assert want[2:4] == got[2:4], where
            assert list(want[4]) == list(got[4]), where
            for key in want[4]:
                assert identical(want[4][key], got[4][key]), f"{where}: {key}"
    stock.close()
    fast.close()


@pytest.mark.parametrize("task", MT10)
def test_fast_steps_have_the_same_bits(task: str) -> None:
    compare(task, steps=25)


def test_environments_for_videos_have_the_same_bits() -> None:
    compare("door-open-v3", steps=25, render_mode="rgb_array")


@pytest.mark.slow
@pytest.mark.parametrize(("reward_version", "render_mode"), [("v2", None), ("v2", "rgb_array"), ("v1", None)])
@pytest.mark.parametrize("task", MT50)
def test_fast_steps_have_the_same_bits_everywhere(task: str, reward_version: str, render_mode: str | None) -> None:
    compare(task, steps=250, reward_version=reward_version, render_mode=render_mode)


def test_other_versions_step_as_the_package_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(suite_module, "KNOWN_VERSION", "0.0")
    (task,) = MetaWorld().tasks("reach")
    assert task.spaces is None
    env = task.build()
    assert type(env.raw) is STOCK["reach-v3"]
    assert "the fast path is for 0.0" in caplog.text
    env.close()


# Experts and pictures


@pytest.mark.parametrize(
    ("task", "episodes"),
    [("reach-v3", 2), ("drawer-close-v3", 2), *(pytest.param(name, 10, marks=pytest.mark.slow) for name in MT10)],
)
def test_experts_succeed(task: str, episodes: int) -> None:
    (built,) = MetaWorld().tasks(task)
    env, expert = built.build(), MetaWorld.expert(task)
    # The script of peg-insert-side misses 3 of these 10 goals in the package's own environment too.
    wanted = 0.7 if task == "peg-insert-side-v3" else 0.9
    assert sum(solved(env, expert, seed) for seed in range(episodes)) >= wanted * episodes
    env.close()


def solved(env: MetaWorldEnv, act: Callable[[np.ndarray], np.ndarray], seed: int) -> bool:
    """Whether an episode succeeds at any step."""
    obs, _ = env.reset(seed=seed)
    truncated = False
    while not truncated:
        action = act(obs)
        assert env.action_space.contains(action)
        obs, _, _, truncated, info = env.step(action)
        if info["success"]:
            return True
    return False


def test_rendering_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    env = MetaWorldEnv("reach-v3")
    with pytest.raises(RuntimeError, match="render_mode"):
        env.render()
    env.close()
    env = MetaWorldEnv("reach-v3", render_mode="rgb_array")
    env.reset(seed=0)

    def no_driver(mode: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(env.raw.mujoco_renderer, "_get_viewer", no_driver)
    with pytest.raises(RuntimeError, match="MUJOCO_GL=egl"):
        env.render()
    env.close()


@pytest.mark.slow
def test_frames_are_upright_and_of_their_own_environment() -> None:
    """Two environments render in turn; the floor is light and below, the background dark grey and above."""
    draw_in_turn(
        "from mtrl_envs.metaworld import MetaWorldEnv",
        '[(MetaWorldEnv, "reach-v3"), (MetaWorldEnv, "window-open-v3")]',
        "assert alone[0][-40:].mean() > alone[0][:40].mean()",
    )


def test_the_table_names_no_other_tasks() -> None:
    table = json.loads(resources.files("mtrl_envs").joinpath("metaworld.json").read_text())
    assert list(table["tasks"]) == MT50
