"""Adroit and the Franka kitchen: names, scores, seeded episodes, and steps against the package."""

from __future__ import annotations

import json
import pickle
import sys
from importlib import import_module, resources
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from mtrl import registry
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.testing import check_suite
from mtrl.types import Suite
from mtrl_envs.robotics import ADROIT, GOALS, KITCHEN, AdroitEnv, KitchenEnv, Robotics
from tests.envs.pictures import draw_in_turn

pytest.importorskip("gymnasium_robotics", reason="needs the extra robotics")

SOME = ("adroit-door", "adroit-relocate-sparse")
ALL = [task.name.removeprefix("robotics/") for task in Robotics().tasks("all")]


def completed(env: KitchenEnv, goal: str) -> None:
    """Put what a sub-task is about where it should be, without touching the rest."""
    module = sys.modules[type(env.raw).__module__]
    env.raw.data.qpos[module.OBS_ELEMENT_INDICES[goal]] = module.OBS_ELEMENT_GOALS[goal]
    env.raw.data.qvel[:] = 0.0


def test_groups() -> None:
    suite = registry.suite("robotics")
    assert isinstance(suite, Suite)
    counts = {group: len(suite.tasks(group)) for group in suite.groups}
    assert counts == {"adroit": 4, "adroit-sparse": 4, "kitchen": 7, "all": 18}
    assert [task.name for task in suite.tasks("adroit")] == [
        "robotics/adroit-door", "robotics/adroit-hammer", "robotics/adroit-pen", "robotics/adroit-relocate",
    ]  # fmt: skip
    assert {task.horizon for task in suite.tasks("adroit")} == {200}
    assert {task.horizon for task in suite.tasks("kitchen")} == {280}


def test_goals_are_the_packages() -> None:
    goals = import_module("gymnasium_robotics.envs.franka_kitchen.kitchen_env").OBS_ELEMENT_GOALS
    assert list(GOALS.items()) == [(name, len(goal)) for name, goal in goals.items()]


def test_tasks_of_the_kitchen_share_a_group_and_those_of_the_hand_do_not() -> None:
    (kitchen,) = make_spec([Robotics().tasks(name)[0] for name in KITCHEN]).groups
    assert kitchen.leaves["vector"].shape == (100,)
    assert [group.tasks for group in make_spec(Robotics().tasks("adroit")).groups] == [(0,), (1,), (2,), (3,)]


def test_unknown_names_get_the_nearest() -> None:
    for wrong, near in (("adroit-dor", "adroit-door"), ("kitchen-microvawe", "kitchen-microwave")):
        with pytest.raises(UnknownNameError, match=f"did you mean '{near}'"):
            Robotics().tasks(wrong)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    line = r"^the suite 'robotics' needs gymnasium_robotics: pip install 'mtrl-suite\[robotics\]'$"
    for make in (lambda: Robotics().tasks("adroit"), lambda: AdroitEnv("door"), lambda: KitchenEnv(["kettle"])):
        with pytest.raises(ModuleNotFoundError, match=line):
            make()


@pytest.mark.parametrize("name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_contract(name: str) -> None:
    report = check_suite(Robotics(), name, full=True)
    assert report.ok, report.render()
    assert not report.notes, report.render()


def test_contract_of_the_kitchen_for_some_steps() -> None:
    report = check_suite(Robotics(), "kitchen-mixed", steps=25)
    assert report.ok, report.render()
    assert not report.notes, report.render()


@pytest.mark.filterwarnings("ignore:.*infinity")  # which is the truth
def test_gymnasiums_own_check() -> None:
    check_env(AdroitEnv("pen"), skip_render_check=True)


def test_tasks_are_picklable() -> None:
    for name in ("adroit-hammer-sparse", "kitchen-complete"):
        task = pickle.loads(pickle.dumps(Robotics().tasks(name)[0]))  # noqa: S301
        env = task.build()
        assert task.spaces == (env.observation_space, env.action_space)
        env.close()


# The hand


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", list(ADROIT))
def test_steps_of_the_hand_are_those_of_the_package(name: str, sparse: bool) -> None:
    env = AdroitEnv(name, sparse=sparse)
    stock = type(env.raw)("sparse" if sparse else "dense")
    want, _ = stock.reset(seed=5)
    np.testing.assert_array_equal(want.astype(np.float32), env.reset(seed=5)[0], strict=True)
    for _ in range(10):
        action = env.np_random.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        want, reward, _, _, said = stock.step(action)
        obs, got, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(want.astype(np.float32), obs, strict=True)
        assert (got, terminated, truncated) == (reward, False, False)
        assert info == {"success": bool(said["success"]), "simulator_faults": 0}


def test_an_open_door_is_a_success() -> None:
    env = AdroitEnv("door", sparse=True)
    env.reset(seed=0)
    assert env.step(np.zeros(28, np.float32))[1:] == (-0.1, False, False, {"success": False, "simulator_faults": 0})
    env.raw.data.qpos[env.raw.door_hinge_addrs] = 1.5
    _, reward, terminated, _, info = env.step(np.zeros(28, np.float32))
    assert (reward, terminated, info["success"]) == (10.0, False, True)


def test_unstable_steps_are_counted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning to a file where it runs
    env = AdroitEnv("relocate")
    env.reset(seed=0)
    env.raw.data.qvel[:] = np.nan
    obs, _, _, _, info = env.step(np.zeros(30, np.float32))
    assert info["simulator_faults"] == 1
    assert np.isfinite(obs).all()
    assert env.step(np.zeros(30, np.float32))[4]["simulator_faults"] == 1
    env.reset(seed=0)
    assert env.step(np.zeros(30, np.float32))[4]["simulator_faults"] == 0


def test_the_callers_precision_does_not_matter() -> None:
    env = AdroitEnv("pen")
    seen = []
    for dtype in (np.float32, np.float64):
        env.reset(seed=1)
        seen.append(env.step(np.full(24, 0.3, np.float32).astype(dtype)))
    np.testing.assert_array_equal(seen[0][0], seen[1][0], strict=True)
    assert seen[0][1] == seen[1][1]


# The kitchen


def test_observations_of_the_kitchen() -> None:
    """Measurements, achieved goals, desired goals, what is left; zeros where nothing is asked for."""
    asked = ("microwave", "light switch")
    env = KitchenEnv(asked)
    stock = type(env.raw)(list(asked))
    want, _ = stock.reset(seed=2)
    obs, _ = env.reset(seed=2)
    measured, achieved, desired, left = np.split(obs, [59, 59 + 17, 59 + 34])
    np.testing.assert_array_equal(measured, want["observation"].astype(np.float32))
    place = 0
    for index, (goal, size) in enumerate(GOALS.items()):
        for got, kind in ((achieved, "achieved_goal"), (desired, "desired_goal")):
            expected = want[kind][goal] if goal in asked else np.zeros(size)
            np.testing.assert_array_equal(got[place : place + size], np.asarray(expected, np.float32))
        assert left[index] == (goal in asked)
        place += size
    assert np.abs(desired).sum() == pytest.approx(0.75 + 0.69 + 0.05)
    env.close()
    stock.close()


def test_sub_tasks_pay_once_and_the_last_one_ends_the_episode() -> None:
    env = KitchenEnv(("microwave", "slide cabinet"))
    env.reset(seed=0)
    still = np.zeros(9, np.float32)
    _, reward, terminated, _, info = env.step(still)
    assert (reward, terminated) == (0.0, False)
    assert info == {"success": False, "completed": 0, "simulator_faults": 0}
    completed(env, "microwave")
    obs, reward, terminated, truncated, info = env.step(still)
    assert (reward, terminated, truncated, info["success"], info["completed"]) == (1.0, False, False, False, 1)
    assert dict(zip(GOALS, obs[-7:], strict=True)) == {goal: float(goal == "slide cabinet") for goal in GOALS}
    assert env.step(still)[1] == 0.0
    completed(env, "slide cabinet")
    obs, reward, terminated, truncated, info = env.step(still)
    assert (reward, terminated, truncated, info["success"], info["completed"]) == (1.0, True, False, True, 2)
    assert not obs[-7:].any()
    obs, _ = env.reset(seed=0)
    assert obs[-7:].sum() == 2
    env.close()


# Scores and pictures


def test_scores_have_sources() -> None:
    table = json.loads(resources.files("mtrl_envs").joinpath("robotics.json").read_text())
    assert list(table["scores"]) == ALL
    tasks = {task.name.removeprefix("robotics/"): task for task in Robotics().tasks("all")}
    assert all("benchmarks/robotics_scores.py" in task.score_source for task in tasks.values())
    assert tasks["adroit-door"].score[1] == 2880.57
    assert "D4RL" in tasks["adroit-door"].score_source
    assert tasks["adroit-door-sparse"].score == (-20.0, 2000.0)
    assert tasks["kitchen-complete"].score[1] == 4.0


def test_rendering_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    env = AdroitEnv("door")
    with pytest.raises(RuntimeError, match="render_mode"):
        env.render()
    env = AdroitEnv("door", render_mode="rgb_array")

    def no_driver(mode: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(env.raw.mujoco_renderer, "_get_viewer", no_driver)
    with pytest.raises(RuntimeError, match="MUJOCO_GL=egl"):
        env.render()


@pytest.mark.slow
def test_environments_that_render_in_turn_keep_their_own_pictures() -> None:
    draw_in_turn(
        "from mtrl_envs.robotics import AdroitEnv, KitchenEnv",
        '[(AdroitEnv, "door"), (KitchenEnv, ("kettle",)), (AdroitEnv, "pen")]',
    )
