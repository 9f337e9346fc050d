"""Foraging and the warehouse as teams: names, ends, rewards, and what the packages leave to be mended."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

from mtrl import registry
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.testing import check_suite
from mtrl.types import Suite
from mtrl.vector import MultiTaskVectorEnv, replay
from mtrl_envs import marl
from mtrl_envs.marl import MARL, build

pytest.importorskip("pettingzoo", reason="needs the extra marl")
pytest.importorskip("lbforaging", reason="needs the extra marl")
pytest.importorskip("rware", reason="needs the extra marl")

with warnings.catch_warnings():
    # The package's test tools load a board game through its own deprecated way.
    warnings.simplefilter("ignore", DeprecationWarning)
    from pettingzoo.test import parallel_api_test, parallel_seed_test

NOTHING, NORTH, LOAD = 0, 1, 5  # of foraging; the warehouse's 0 and 1 are "nothing" and "forward"
FORAGING, WAREHOUSE = "Foraging-5x5-2p-1f-v3", "rware-tiny-2ag-v2"


def names(group: str) -> list[str]:
    return [task.name for task in MARL().tasks(group)]


def everyone(env: Any, action: int) -> dict[str, int]:
    return dict.fromkeys(env.agents, action)


class TestSuite:
    def test_groups(self):
        suite = registry.suite("marl")
        assert isinstance(suite, Suite)
        assert list(suite.groups) == ["lbf-easy", "lbf", "rware", "all"]
        assert names("all") == names("lbf-easy") + names("lbf") + names("rware")
        assert names("rware") == ["marl/rware-tiny-2ag", "marl/rware-tiny-4ag", "marl/rware-small-4ag"]

    def test_any_id_is_a_task(self):
        assert names("Foraging-2s-9x9-4p-2f-coop-v3") == names("Foraging-2s-9x9-4p-2f-coop")
        (task,) = MARL().tasks("rware-large-8ag-hard-v2")
        assert (task.name, task.agents, task.horizon) == ("marl/rware-large-8ag-hard", 8, 500)
        (task,) = MARL().tasks("Foraging-10x10-3p-3f")
        assert (task.agents, task.horizon) == (3, 50)

    def test_an_unknown_name_gets_the_nearest_one(self):
        with pytest.raises(UnknownNameError, match="did you mean 'rware-tiny-2ag'"):
            MARL().tasks("rware-tinny-2ag")

    def test_scores(self):
        for task in MARL().tasks("all"):
            assert task.score_source
            if "rware" not in task.name:
                assert 0 < task.score[0] < task.score[1] == 1
        own = MARL("own").tasks("lbf")
        assert [task.score[1] for task in own] == [1 / task.agents for task in own]
        assert [task.score[0] * task.agents for task in own] == pytest.approx(
            [task.score[0] for task in MARL().tasks("lbf")]
        )
        assert own[0].protocol["reward"] == "own"

    def test_tasks_of_one_size_share_a_group(self):
        spec = make_spec(
            [task for name in ("8x8-2p-2f", "6x6-2p-2f", "10x10-3p-3f") for task in MARL().tasks(f"Foraging-{name}")]
        )
        assert [group.tasks for group in spec.groups] == [(0, 1), (2,)]
        assert sorted(spec.groups[0].leaves) == ["alive", "state", "vector"]
        assert spec.groups[0].leaves["state"].shape == (2 * spec.groups[0].leaves["vector"].shape[0],)

    def test_importing_the_suite_imports_no_environment(self):
        code = (
            "import sys; from mtrl_envs.marl import MARL; MARL().groups;"
            "assert not {'lbforaging', 'rware', 'pettingzoo', 'pyglet'} & {name.split('.')[0] for name in sys.modules}"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize("package", ["pettingzoo", "lbforaging", "rware"])
    def test_a_missing_extra_is_named(self, package: str, monkeypatch: pytest.MonkeyPatch):
        marl._ids.cache_clear()
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=rf"'marl' needs {package}: pip install 'mtrl-suite\[marl\]'"):
            MARL().tasks("lbf")


class TestContract:
    @pytest.mark.parametrize("name", ["Foraging-5x5-2p-1f", "Foraging-2s-10x10-3p-3f", "rware-tiny-2ag"])
    def test_kept(self, name: str):
        report = check_suite(MARL(), name, full=True)
        assert report.findings == (), report

    def test_one_robot_is_a_team_of_one(self):
        report = check_suite(MARL(), "rware-tiny-1ag", steps=30)
        assert report.findings == (), report

    @pytest.mark.slow
    @pytest.mark.parametrize("reward", ["sum", "own"])
    def test_kept_by_all(self, reward: Any):
        report = check_suite(MARL(reward), "all", seeds=(1, 2, 3), full=True)
        assert report.findings == (), report

    @pytest.mark.parametrize("env_id", [FORAGING, WAREHOUSE])
    def test_pettingzoos_own(self, env_id: str, capsys: pytest.CaptureFixture[str]):
        parallel_api_test(build(env_id), num_cycles=100)
        parallel_seed_test(lambda: build(env_id), num_cycles=30)
        assert "Passed" in capsys.readouterr().out

    def test_a_journal_replays(self):
        tasks = MARL().tasks("lbf-easy")
        envs = MultiTaskVectorEnv(tasks, seed=3)
        try:
            envs.reset()
            rng, episodes = np.random.default_rng(0), []
            while len(episodes) < 4:
                actions = {name: rng.integers(0, 6, rows.stop - rows.start) for name, rows in envs.layout.rows.items()}
                envs.step(actions)
                episodes += envs.episodes
        finally:
            envs.close()
        for episode in episodes:
            again = replay(tasks[episode.task], episode.journal)
            assert (again.ret, again.success) == (episode.ret, episode.success)


class TestForaging:
    def test_the_limit_truncates(self):
        """The package calls it the end of the game."""
        env: Any = build(FORAGING)
        env.reset(seed=0)
        ends = []
        while env.agents:
            _, rewards, terminated, truncated, infos = env.step(everyone(env, NOTHING))
            ends.append((any(terminated.values()), all(truncated.values()), infos["agent_0"]["success"]))
            assert set(rewards.values()) == {0.0}
        assert ends == [(False, False, False)] * 49 + [(False, True, False)]
        stock = env.game.stock
        stock.reset(seed=0)
        assert [stock.step([NOTHING] * 2)[2:4] for _ in range(50)] == [(False, False)] * 49 + [(True, False)]

    @pytest.mark.parametrize("reward", ["sum", "own"])
    def test_all_food_collected_terminates_with_success(self, reward: Any):
        env: Any = build(FORAGING, reward)
        env.reset(seed=0)
        stock = env.game.stock
        ((row, column),) = np.argwhere(stock.field)
        for player, side in zip(stock.players, (-1, 1), strict=True):
            player.position = (row, column + side)
        stock._gen_valid_moves()
        levels = [player.level for player in stock.players]
        _, rewards, terminated, truncated, infos = env.step(everyone(env, LOAD))
        shares = [level / sum(levels) for level in levels]
        assert list(rewards.values()) == pytest.approx([1.0, 1.0] if reward == "sum" else shares)
        assert (list(terminated.values()), list(truncated.values())) == ([True] * 2, [False] * 2)
        assert [info["success"] for info in infos.values()] == [True] * 2
        assert env.agents == []
        with pytest.raises(ValueError, match="reset first"):
            env.step({})

    def test_players_of_the_last_episode_take_up_no_cells(self):
        """The package draws new positions around the old ones: a used instance starts elsewhere than a fresh one."""
        from mtrl_envs.marl.team import make_stock

        stock, env = make_stock(FORAGING), build(FORAGING)
        differ = 0
        for seed in range(40):
            fresh = make_stock(FORAGING).reset(seed=seed)[0]
            differ += not np.array_equal(fresh, stock.reset(seed=seed)[0])
            np.testing.assert_array_equal(fresh, list(env.reset(seed=seed)[0].values()))
        assert differ > 0

    def test_the_state_is_what_all_see(self):
        env = build(FORAGING)
        observations, _ = env.reset(seed=1)
        np.testing.assert_array_equal(env.state(), np.concatenate(list(observations.values())))
        assert env.state() in env.state_space
        assert all(observations[agent] in env.observation_space(agent) for agent in env.agents)


class TestWarehouse:
    @pytest.mark.parametrize(("reward", "paid"), [("sum", [1.0, 1.0]), ("own", [1.0, 0.0])])
    def test_a_delivered_shelf_pays_and_nothing_ends(self, reward: Any, paid: list[float]):
        from rware.warehouse import Direction

        env: Any = build(WAREHOUSE, reward)
        env.reset(seed=0)
        stock = env.game.stock
        (x, y), shelf, (robot, other) = stock.goals[0], stock.request_queue[0], stock.agents
        robot.x, robot.y, robot.dir, robot.carrying_shelf = x, y - 1, Direction.DOWN, shelf
        shelf.x, shelf.y, other.x, other.y = x, y - 1, 0, 0
        stock._recalc_grid()
        _, rewards, terminated, truncated, infos = env.step({"agent_0": 1, "agent_1": 0})
        assert list(rewards.values()) == paid
        assert not any([*terminated.values(), *truncated.values()])
        assert infos == {"agent_0": {}, "agent_1": {}}
        assert shelf not in stock.request_queue

    def test_the_limit_truncates(self):
        env = build(WAREHOUSE)
        env.reset(seed=0)
        ends = []
        while env.agents:
            _, _, terminated, truncated, _ = env.step(everyone(env, NOTHING))
            ends.append((any(terminated.values()), all(truncated.values())))
        assert ends == [(False, False)] * 499 + [(False, True)]
