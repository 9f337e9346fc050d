"""DeepMind Control: names, protocol, seeded episodes, and steps against the package."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from mtrl import registry
from mtrl.config import parse_config
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.testing import check_suite
from mtrl.train import train
from mtrl.types import Suite
from mtrl_envs import dmc
from mtrl_envs.dmc import DMC, SCALEZERO, DMCEnv
from tests.envs.pictures import clean, draw_in_turn

pytest.importorskip("dm_control", reason="needs the extra dmc")

# An ordinary task, the other frame skip, one whose sensors need help, one that changes the model at every reset.
SOME = ("cartpole-balance", "pendulum-swingup", "quadruped-fetch", "point_mass-hard")
ALL = [task.name.removeprefix("dmc/") for task in DMC().tasks("all")]


def slow_but(names: tuple[str, ...]) -> list[Any]:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


def test_groups() -> None:
    suite = registry.suite("dmc")
    assert isinstance(suite, Suite)
    assert {group: len(suite.tasks(group)) for group in suite.groups} == {"18": 18, "benchmark": 28, "all": 48}
    assert tuple(task.name.removeprefix("dmc/") for task in suite.tasks("18")) == SCALEZERO
    names = {group: {task.name for task in suite.tasks(group)} for group in suite.groups}
    assert names["18"] < names["benchmark"] < names["all"]


def test_a_task_is_the_same_in_every_group() -> None:
    suite = DMC()
    everywhere = {task.name: task for task in suite.tasks("all")}
    assert all(everywhere[task.name].protocol == task.protocol for task in suite.tasks("18"))


@pytest.mark.parametrize(
    ("name", "skip", "horizon"), [("walker-walk", 4, 250), ("pendulum-swingup", 8, 125), ("humanoid-run", 2, 500)]
)
def test_frame_skips_are_the_published_ones(name: str, skip: int, horizon: int) -> None:
    (task,) = DMC().tasks(name)
    assert (task.protocol["frame_skip"], task.horizon, task.score) == (str(skip), horizon, (0.0, 1000.0))
    assert task.build().frame_skip == skip


def test_unknown_names_get_the_nearest() -> None:
    for wrong in ("walker-wlak", "walker_walk"):
        with pytest.raises(UnknownNameError, match="did you mean 'walker-walk'"):
            DMC().tasks(wrong)
    for left_out in ("lqr-lqr_2_1", "quadruped-escape"):
        with pytest.raises(UnknownNameError):
            DMC().tasks(left_out)


@pytest.mark.parametrize("skip", [0, 1001])
def test_frame_skips_out_of_range(skip: int) -> None:
    with pytest.raises(ValueError, match=r"frame_skip of suite 'dmc' must lie in 1\.\.1000"):
        DMC(frame_skip=skip)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dm_control", None)
    dmc._groups.cache_clear()
    with pytest.raises(
        ModuleNotFoundError, match=r"^the suite 'dmc' needs dm_control: pip install 'mtrl-suite\[dmc\]'$"
    ):
        DMC().tasks("18")


def test_the_package_is_imported_quietly_without_a_screen() -> None:
    code = "from mtrl_envs.dmc import DMC; DMC().tasks('walker-walk')[0].build().reset(seed=0)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=clean(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", slow_but(SOME))
def test_contract(name: str) -> None:
    report = check_suite(registry.suite("dmc"), name, full=True)
    assert report.ok, report.render()
    assert not report.notes, report.render()


@pytest.mark.filterwarnings("ignore:.*infinity")  # which is the truth
def test_gymnasiums_own_check() -> None:
    check_env(DMCEnv("cartpole-balance"), skip_render_check=True)


@pytest.mark.parametrize("name", ["finger-turn_easy", "manipulator-bring_ball"])
def test_steps_are_those_of_the_package(name: str) -> None:
    """Scalars and matrices are flattened in the specification's order; rewards of held actions are summed."""
    domain, _, task = name.partition("-")
    env = DMCEnv(name, frame_skip=4)
    obs, _ = env.reset(seed=3)
    stream = np.random.RandomState(np.random.default_rng(3).bit_generator)
    stock = dmc._package().load(domain, task, task_kwargs={"random": stream})
    want = stock.reset()
    rng = np.random.default_rng(0)
    for _ in range(20):
        flat = np.concatenate([np.ravel(want.observation[key]) for key in stock.observation_spec()])
        np.testing.assert_array_equal(obs, flat.astype(np.float32), strict=True)
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        total = 0.0
        for _ in range(4):
            want = stock.step(action.astype(np.float64))
            total += want.reward
        assert (reward, terminated, truncated) == (total, False, False)


def test_an_episode_has_1000_control_steps_whatever_divides_it() -> None:
    (task,) = DMC(frame_skip=300, name="dmc-300").tasks("cartpole-balance")
    assert (task.name, task.horizon, task.protocol["frame_skip"]) == ("dmc-300/cartpole-balance", 4, "300")
    env = task.build()
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(4)]
    assert ends == [(False, False)] * 3 + [(False, True)]
    assert env.raw.physics.time() == pytest.approx(10.0)  # the last action is held for 100 steps of 1/100 s


def test_discount_0_terminates(monkeypatch: pytest.MonkeyPatch) -> None:
    env = DMCEnv("cartpole-balance", frame_skip=4)
    env.reset(seed=0)
    monkeypatch.setattr(env.raw.task, "get_termination", lambda physics: 0.0)
    _, reward, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
    assert (terminated, truncated) == (True, False)
    assert 0.0 < reward <= 1.0  # of one control step: the others are not taken


def test_an_unstable_simulation_terminates() -> None:
    env = DMCEnv("walker-walk", frame_skip=2)
    env.reset(seed=0)
    before, _, _, _, info = env.step(np.ones(6, np.float32))
    assert info == {"simulator_faults": 0}
    env.raw.physics.data.qvel[:] = np.nan
    after, reward, terminated, truncated, info = env.step(np.ones(6, np.float32))
    assert (reward, terminated, truncated, info) == (0.0, True, False, {"simulator_faults": 1})
    np.testing.assert_array_equal(before, after)
    first, _ = env.reset(seed=0)
    np.testing.assert_array_equal(first, DMCEnv("walker-walk").reset(seed=0)[0])


def test_unseeded_resets_continue_the_stream() -> None:
    env = DMCEnv("reacher-easy")
    starts = {env.reset(seed=0)[0].tobytes(), *(env.reset()[0].tobytes() for _ in range(4))}
    assert len(starts) == 5


def test_the_callers_precision_does_not_matter() -> None:
    env = DMCEnv("cheetah-run")
    action = np.array([0.1, -0.7, 0.3, 0.9, -0.2, 0.6], np.float32)
    seen = []
    for dtype in (np.float32, np.float64):
        env.reset(seed=1)
        seen.append(env.step(action.astype(dtype)))
    np.testing.assert_array_equal(seen[0][0], seen[1][0], strict=True)
    assert seen[0][1] == seen[1][1]


def test_balancing_at_rest_pays_nearly_all() -> None:
    """A pole upright over a resting cart: the reward of every control step is close to 1."""
    env = DMCEnv("cartpole-balance", frame_skip=4)
    env.reset(seed=0)
    env.raw.physics.data.qpos[:] = 0.0
    env.raw.physics.data.qvel[:] = 0.0
    assert 3.99 < env.step(np.zeros(1, np.float32))[1] <= 4.0


def test_tasks_are_picklable_and_share_groups_by_body() -> None:
    tasks = DMC().tasks("18")
    assert pickle.loads(pickle.dumps(tasks[-1])).build().observation_space.shape == (24,)  # noqa: S301
    spec = make_spec([task for task in tasks if task.name.startswith(("dmc/walker", "dmc/reacher"))])
    assert [group.tasks for group in spec.groups] == [(0, 1), (2, 3, 4)]


@pytest.mark.parametrize(
    "agent",
    [
        {"kind": "ppo", "rollout": 16, "epochs": 1},
        {"kind": "sac", "trunk": {"widths": [16, 16]}, "warmup": 16, "batch_size": 8, "log_every": 4},
    ],
    ids=["ppo", "sac"],
)
def test_agents_train_on_a_mix_with_metaworld(agent: dict[str, Any], tmp_path: Path) -> None:
    settings = parse_config(
        {
            "suite": "dmc/cartpole-balance+metaworld/reach",
            "agent": agent,
            "steps": 96,
            "workers": 0,
            "threads": 1,
            "eval": {"episodes": 1},
            "log": {"every": 16, "terminal": False, "wandb": "off"},
        }
    )
    summary = train(settings, tmp_path)
    assert summary.steps >= 96
    records = (tmp_path / "metrics.jsonl").read_text()
    assert "loss" in records
    assert summary.evaluation is not None
    found = {result.task.name: result for result in summary.evaluation.results}
    assert found["dmc/cartpole-balance"].success is None
    assert found["metaworld/reach-v3"].success is not None


def test_rendering_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    env = DMCEnv("cartpole-balance")
    with pytest.raises(RuntimeError, match="render_mode"):
        env.render()
    env.render_mode = "rgb_array"

    def no_driver(*args: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr("mujoco.Renderer", no_driver)
    with pytest.raises(RuntimeError, match="MUJOCO_GL=egl"):
        env.render()


@pytest.mark.slow
def test_environments_that_render_in_turn_keep_their_own_pictures() -> None:
    """Beside MetaWorld's, which draws through Gymnasium's renderer: both libraries use OpenGL contexts of their own."""
    draw_in_turn(
        "from mtrl_envs.dmc import DMCEnv\nfrom mtrl_envs.metaworld import MetaWorldEnv",
        '[(DMCEnv, "walker-walk"), (MetaWorldEnv, "reach-v3"), (DMCEnv, "cheetah-run")]',
    )
