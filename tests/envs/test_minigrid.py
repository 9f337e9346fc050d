"""MiniGrid and BabyAI: names, leaves, episodes, and the fast observation against the package's own."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from minigrid.core.world_object import Ball, Box, Door, Floor, Goal, Key, Lava, Wall

from mtrl import registry
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.types import Suite
from mtrl_envs import minigrid
from mtrl_envs.minigrid import MiniGrid, MiniGridAdapter, decode_tokens, encode_mission, make_stock
from mtrl_envs.minigrid_view import FastView

MT7 = tuple(task.name.removeprefix("minigrid/") for task in MiniGrid().tasks("mt7"))
# Beyond mt7: boxes that open, moving obstacles, a start with something in hand, pickups, see_through_walls.
SPECIAL = (
    "ObstructedMaze-1Dlhb",
    "Dynamic-Obstacles-Random-6x6",
    "LavaCrossingS9N2",
    "Fetch-8x8-N3",
    "BabyAI-PutNextS5N2Carrying",
    "BabyAI-UnlockPickup",
    "BabyAI-GoToObjMazeOpen",
)
VARYING = (
    "GoToSeq",
    "GoToSeqS5R2",
    "Synth",
    "SynthS5R2",
    "SynthLoc",
    "SynthSeq",
    "MiniBossLevel",
    "BossLevel",
    "BossLevelNoUnlock",
)
LEFT, RIGHT, FORWARD, DONE = 0, 1, 2, 6


def one(name: str) -> Any:
    (task,) = MiniGrid().tasks(name)
    return task


def all_names() -> list[str]:
    return list(minigrid._ids())


def play(env: gym.Env[Any, Any], seed: int, steps: int) -> list[Any]:
    """Everything that a seeded episode gives under a fixed random policy that likes to move and to handle objects."""
    rng = np.random.default_rng(seed)
    n = int(env.action_space.n)  # type: ignore[attr-defined]
    weights = np.array([0.15, 0.15, 0.4, 0.1, 0.05, 0.15, 0.0])[:n]
    obs, info = env.reset(seed=seed)
    seen: list[Any] = [obs, info]
    for action in rng.choice(n, size=steps, p=weights / weights.sum()):
        obs, *rest = env.step(int(action))
        seen += [obs, *rest]
        if rest[1] or rest[2]:
            break
    return seen


def same(left: list[Any], right: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if not isinstance(a, dict):
            return type(a) is type(b) and a == b
        return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)

    return len(left) == len(right) and all(map(equal, left, right))


class TestSuite:
    def test_groups_follow_the_order_of_moore(self):
        suite = registry.suite("minigrid")
        assert isinstance(suite, Suite)
        assert list(suite.groups) == ["mt3", "mt5", "mt7", "babyai"]
        names = {group: [task.name for task in suite.tasks(group)] for group in suite.groups}
        assert names["mt3"] == ["minigrid/LavaGapS7", "minigrid/RedBlueDoors-6x6", "minigrid/MemoryS11"]
        assert [name.removeprefix("minigrid/") for name in names["mt5"]] == [
            "DoorKey-6x6", "LavaGapS7", "RedBlueDoors-6x6", "DistShift1", "MemoryS11",
        ]  # fmt: skip
        assert [name.removeprefix("minigrid/") for name in names["mt7"]] == [
            "DoorKey-6x6", "DistShift1", "RedBlueDoors-6x6", "LavaGapS7", "MemoryS11", "SimpleCrossingS9N2",
            "MultiRoom-N2-S4",
        ]  # fmt: skip
        assert len(names["babyai"]) == 96

    def test_horizons_and_scores_of_mt7(self):
        tasks = MiniGrid().tasks("mt7")
        assert [task.horizon for task in tasks] == [360, 252, 720, 196, 605, 324, 40]
        assert [task.score[1] for task in tasks] == [0.9725, 0.9607, 0.99, 0.9633, 0.9777, 0.9583, 0.8875]
        assert all(task.normalise(task.score[1]) == 1 and task.normalise(0) == 0 for task in tasks)
        assert all("TMLR" in task.score_source for task in tasks)

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            ("MiniGrid-DoorKey-6x6-v0", "minigrid/DoorKey-6x6"),
            ("DoorKey-6x6", "minigrid/DoorKey-6x6"),
            ("BabyAI-GoToRedBall-v0", "minigrid/BabyAI-GoToRedBall"),
            ("MiniGrid-ObstructedMaze-1Q-v1", "minigrid/ObstructedMaze-1Q-v1"),
        ],
    )
    def test_a_task_by_id_or_short_name(self, given: str, name: str):
        assert [task.name for task in registry.tasks(f"minigrid/{given}")] == [name]

    def test_names_are_unique(self):
        usable = [one for one in gym.registry if one.startswith(("MiniGrid-", "BabyAI-")) and "WFC" not in one]
        assert len(all_names()) == len(usable) == 172

    def test_an_unknown_name_gets_the_nearest_one(self):
        with pytest.raises(UnknownNameError, match="did you mean 'DoorKey-6x6'"):
            MiniGrid().tasks("DorKey-6x6")

    def test_wfc_is_refused_with_the_reason(self):
        with pytest.raises(ValueError, match="missing from the minigrid wheel"):
            MiniGrid().tasks("MiniGrid-WFC-MazeSimple-v0")

    def test_tasks_fall_into_groups_by_what_they_share(self):
        tasks = [*MiniGrid().tasks("mt3"), one("BabyAI-GoToObj"), one("Dynamic-Obstacles-6x6"), one("Fetch-5x5-N2")]
        spec = make_spec(tasks)
        assert [group.tasks for group in spec.groups] == [(0, 1, 2), (3, 5), (4,)]
        assert [set(group.leaves) for group in spec.groups] == [
            {"image", "vector"},
            {"image", "vector", "tokens"},
            {"image", "vector"},
        ]
        assert [int(group.action.n) for group in spec.groups] == [7, 7, 3]  # type: ignore[union-attr]

    def test_tasks_are_picklable(self):
        task = pickle.loads(pickle.dumps(one("BabyAI-GoToObj")))  # noqa: S301
        env = task.build()
        assert env.observation_space.contains(env.reset(seed=0)[0])


def check_task(name: str, seeds: range) -> None:
    """Spaces are true, a used environment equals a fresh one, the horizon bounds max_steps."""
    task = one(name)
    used = task.build()
    assert task.spaces == (used.observation_space, used.action_space)
    missions = set()
    for seed in seeds:
        seen = play(used, seed, 60)
        assert same(seen, play(task.build(), seed, 60))
        observations = [part for part in seen if isinstance(part, dict) and "image" in part]
        assert all(used.observation_space.contains(obs) for obs in observations)
        assert used.stock.max_steps <= task.horizon
        missions.add(used.stock.mission)
    assert "tokens" in used.observation_space.spaces or len(missions) == 1


class TestEpisodes:
    @pytest.mark.parametrize("name", [*MT7, *SPECIAL])
    def test_seed_decides_the_episode(self, name: str):
        check_task(name, range(2))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", all_names())
    def test_seed_decides_the_episode_everywhere(self, name: str):
        check_task(name, range(5))

    @pytest.mark.parametrize("name", ["LavaGapS7", "MemoryS11", "BabyAI-GoToLocal"])
    def test_seeds_differ(self, name: str):
        env = one(name).build()
        firsts = {env.reset(seed=seed)[0]["image"].tobytes() for seed in range(8)}
        assert len(firsts) > 1

    def test_a_solved_episode_returns_what_minigrid_promises(self):
        env = one("Empty-5x5").build()  # from the top left corner facing right to the goal at the bottom right
        env.reset(seed=0)
        steps = [env.step(action) for action in (FORWARD, FORWARD, RIGHT, FORWARD, FORWARD)]
        assert [step[1] for step in steps] == [0, 0, 0, 0, 1 - 0.9 * 5 / 100]
        assert [step[2] for step in steps] == [False] * 4 + [True]
        assert [step[4]["success"] for step in steps] == [False] * 4 + [True]

    def test_lava_ends_without_success(self):
        env = one("DistShift1").build()
        env.reset(seed=0)
        env.stock.grid.set(*env.stock.front_pos, Lava())
        _, reward, terminated, truncated, info = env.step(FORWARD)
        assert (reward, terminated, truncated, info["success"]) == (0, True, False, False)

    @pytest.mark.parametrize("name", ["LavaGapS7", "BabyAI-GoToObjS4"])
    def test_the_horizon_truncates(self, name: str):
        task = one(name)
        env = task.build()
        env.reset(seed=0)
        ends = [env.step(DONE)[1:4] for _ in range(task.horizon)]
        assert ends == [(0, False, False)] * (task.horizon - 1) + [(0, False, True)]

    def test_success_at_the_last_step_is_a_termination(self):
        env = one("Empty-5x5").build()
        env.reset(seed=0)
        env.stock.max_steps = 5
        *_, last = [env.step(action) for action in (FORWARD, FORWARD, RIGHT, FORWARD, FORWARD)]
        assert last[1] == pytest.approx(0.1)
        assert last[2:4] == (True, False)

    @pytest.mark.parametrize("level", VARYING)
    def test_step_limits_that_vary_stay_within_the_horizon(self, level: str):
        task = one(f"BabyAI-{level}")
        stock = task.build().stock
        limits = set()
        for seed in range(12):
            stock.reset(seed=seed)
            limits.add(stock.max_steps)
        assert len(limits) > 1
        assert max(limits) <= task.horizon
        assert task.horizon % min(limits) == 0  # a whole number of navigations

    def test_pickup_acts_as_toggle_in_memory(self):
        env = one("MemoryS11").build()
        env.reset(seed=0)
        env.stock.grid.set(*env.stock.front_pos, Key("green"))
        env.step(3)
        assert env.stock.carrying is None
        assert env.stock.grid.get(*env.stock.front_pos).type == "key"

    def test_babyai_says_nothing_on_stdout(self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
        env = one("BabyAI-GoTo").build()
        with caplog.at_level(logging.DEBUG, logger="mtrl_envs.minigrid"):
            env.reset(seed=1)
        assert "Sampling rejected" in caplog.text
        assert capsys.readouterr().out == ""

    def test_render(self):
        env = one("DoorKey-6x6").build(render_mode="rgb_array")
        env.reset(seed=0)
        frame = env.render()
        assert frame.shape == (192, 192, 3)
        assert frame.dtype == np.uint8
        assert len(np.unique(frame)) > 2

    @pytest.mark.parametrize("name", ["DoorKey-6x6", "BabyAI-GoToRedBall"])
    def test_gymnasium_approves(self, name: str):
        check_env(one(name).build(), skip_render_check=True)


class TestTokens:
    def test_round_trip(self):
        env = one("BabyAI-GoToSeq").build()
        for seed in range(5):
            obs, _ = env.reset(seed=seed)
            assert decode_tokens(obs["tokens"]) == env.stock.mission.replace(",", "")
            assert np.array_equal(encode_mission(decode_tokens(obs["tokens"])), obs["tokens"])

    def test_words_are_unique_and_zero_is_padding(self):
        assert len(set(minigrid.WORDS)) == len(minigrid.WORDS)
        assert encode_mission("a yellow, your.").tolist() == [1, 51, 53, *[0] * 61]
        assert encode_mission("").tolist() == [0] * 64

    def test_every_word_of_the_placeholder_missions_is_known(self):
        for name in all_names():
            space = make_stock(minigrid._ids()[name]).observation_space["mission"]
            for _ in range(5):
                encode_mission(space.sample())

    def test_an_unknown_word_is_an_error(self):
        with pytest.raises(ValueError, match="'dragon' of mission 'go to the dragon'"):
            encode_mission("go to the dragon")

    def test_too_long_a_mission_is_an_error(self):
        assert np.count_nonzero(encode_mission("go " * 64)) == 64
        with pytest.raises(ValueError, match="65 words; the tokens leaf holds 64"):
            encode_mission("go " * 65)


def check_fast_equals_stock(name: str, seed: int, steps: int) -> None:
    env_id = minigrid._ids()[name]
    fast, slow = MiniGridAdapter(env_id), MiniGridAdapter(env_id, fast=False)
    stock = make_stock(env_id)
    assert same(play(fast, seed, steps), play(slow, seed, steps))
    raw = play(stock, seed, steps)
    again = play(fast, seed, steps)
    images = [part["image"].transpose(1, 2, 0) for part in again if isinstance(part, dict) and "image" in part]
    raw_images = [part["image"] for part in raw if isinstance(part, dict) and "image" in part]
    assert len(images) == len(raw_images) > 1
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(images, raw_images, strict=True))
    assert fast.stock.np_random.bit_generator.state == stock.np_random.bit_generator.state


class TestFastView:
    @pytest.mark.parametrize("name", [*MT7, *SPECIAL])
    def test_equals_the_package(self, name: str):
        for seed in range(2):
            check_fast_equals_stock(name, seed, 150)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", all_names())
    def test_equals_the_package_everywhere(self, name: str):
        for seed in range(5):
            check_fast_equals_stock(name, seed, 300)

    @pytest.mark.parametrize("see_through_walls", [False, True])
    def test_equals_the_package_in_random_worlds(self, see_through_walls: bool):
        """Any object anywhere, the agent at every cell (borders too) and direction, with and without a load."""
        rng = np.random.default_rng(0)
        env = make_stock("MiniGrid-Empty-8x8-v0")
        env.reset(seed=0)
        env.see_through_walls = see_through_walls
        env.grid.width, env.grid.height = 9, 6  # not square: rows and columns must not be confused
        view = FastView(env)
        colors = ("red", "green", "blue", "purple", "yellow", "grey")
        kinds = (
            Wall, Wall, Floor, Key, Ball, Box, Goal, lambda _: Lava(), Door,
            lambda color: Door(color, is_open=True), lambda color: Door(color, is_locked=True),
        )  # fmt: skip

        def draw() -> Any:
            return kinds[rng.integers(len(kinds))](colors[rng.integers(6)])

        for world in range(6):
            view.clear()
            env.grid.grid = [draw() if rng.random() < 0.35 else None for _ in range(9 * 6)]
            for cell in range(9 * 6):
                env.agent_pos = (cell % 9, cell // 9) if world % 2 else np.array((cell % 9, cell // 9))
                env.carrying = Box("purple", contains=Key("red")) if rng.random() < 0.3 else None
                for env.agent_dir in range(4):
                    expected, got = env.gen_obs(), view.gen_obs()
                    assert np.array_equal(expected["image"], got["image"])
                    assert (expected["direction"], expected["mission"]) == (got["direction"], got["mission"])

    def test_follows_doors_and_boxes_without_a_new_episode(self):
        env = make_stock("MiniGrid-Empty-8x8-v0")
        env.reset(seed=0)
        view = FastView(env)
        door, box = Door("red", is_locked=True), Box("blue", contains=Ball("grey"))
        env.grid.set(2, 1, door)
        env.grid.set(2, 2, box)
        images = []
        for change in (lambda: None, lambda: setattr(door, "is_locked", False), lambda: door.toggle(env, (2, 1)),
                       lambda: box.toggle(env, (2, 2)), lambda: env.grid.set(2, 1, None)):  # fmt: skip
            change()
            assert np.array_equal(env.gen_obs()["image"], view.gen_obs()["image"])
            images.append(view.gen_obs()["image"].tobytes())
        assert len(set(images)) == len(images)

    def test_can_be_turned_off(self):
        fast, slow = (MiniGrid(fast=fast).tasks("LavaGapS7")[0].build() for fast in (True, False))
        assert "gen_obs" in vars(fast.stock)
        assert "gen_obs" not in vars(slow.stock)

    def test_an_unknown_version_turns_it_off_with_a_notice(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.setattr(minigrid, "version", lambda _: "99.0")
        minigrid._fast_is_exact.cache_clear()
        try:
            with caplog.at_level(logging.WARNING, logger="mtrl_envs.minigrid"):
                envs = [one("LavaGapS7").build() for _ in range(2)]
        finally:
            minigrid._fast_is_exact.cache_clear()
        assert not any("gen_obs" in vars(env.stock) for env in envs)
        assert [record.message.split(" was ")[0] for record in caplog.records] == ["minigrid 99.0"]


class TestExpert:
    @pytest.mark.parametrize("name", ["BabyAI-GoToRedBall", "BabyAI-UnlockPickup", "BabyAI-PutNextS5N2"])
    def test_solves_levels_and_is_paid_for_the_steps_it_took(self, name: str):
        task = one(name)
        env, expert = task.build(), MiniGrid.expert(task.name)
        for seed in range(3):
            obs, _ = env.reset(seed=seed)
            rewards, terminated, truncated, info = [], False, False, {}
            while not (terminated or truncated):
                obs, reward, terminated, truncated, info = env.step(expert(env, obs))
                rewards.append(reward)
            assert info["success"]
            assert sum(rewards) == 1 - 0.9 * (len(rewards) / env.stock.max_steps)

    def test_stops_planning_at_its_limit(self):
        env, expert = one("BabyAI-GoToRedBall").build(), MiniGrid.expert("BabyAI-GoToRedBall", limit=1)
        obs, _ = env.reset(seed=0)
        assert expert(env, obs) != DONE
        obs, *_ = env.step(LEFT)
        assert expert(env, obs) == DONE

    @pytest.mark.parametrize(
        ("name", "reason"),
        [("DoorKey-6x6", "needs the instructions of a BabyAI level"), ("BabyAI-KeyInBox-v0", "the bot fails")],
    )
    def test_refuses_what_the_bot_cannot_play(self, name: str, reason: str):
        with pytest.raises(ValueError, match=reason):
            MiniGrid.expert(name)
