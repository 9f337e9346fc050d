"""Atari: names, protocol, seeded episodes, and screens against the package and Gymnasium's preprocessing."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from mtrl import registry
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.testing import check_suite
from mtrl.types import Suite
from mtrl.vector import MultiTaskVectorEnv, replay
from mtrl_envs import atari
from mtrl_envs.area_resize import AreaResize
from mtrl_envs.atari import Atari, AtariGame

ale_py = pytest.importorskip("ale_py", reason="needs the extra atari")

NOOP, FIRE = 0, 1
# Beyond Pong: games whose saved states are not whole, and games whose console remembers earlier episodes.
REMEMBERING = ("Qbert", "Tetris", "Hero", "Krull")


def play(env: AtariGame, seed: int, steps: int, first: int = 0) -> list[Any]:
    """All that an episode shows, the machine's memory included, under actions that the seed decides."""
    actions = np.random.default_rng(seed + first).integers(env.action_space.n, size=steps)  # type: ignore[attr-defined]
    obs, info = env.reset(seed=seed)
    seen: list[Any] = [(obs.tobytes(), env.ale.getRAM().tobytes(), info)]
    for action in actions:
        obs, *rest = env.step(int(action))
        seen.append((obs.tobytes(), env.ale.getRAM().tobytes(), rest))
        if rest[1]:
            break
    return seen


def shrink(image: np.ndarray, size: int = 84) -> np.ndarray:
    """Means over areas in integers: pixels are cut until every area holds whole ones; halves go to the even number."""
    cuts = [math.lcm(length, size) // length for length in image.shape]
    fine = image.astype(np.int64).repeat(cuts[0], 0).repeat(cuts[1], 1)
    tall, wide = (length // size for length in fine.shape)
    sums, area = fine.reshape(size, tall, size, wide).sum((1, 3)), tall * wide
    whole, rest = np.divmod(sums, area)
    return (whole + ((2 * rest > area) | ((2 * rest == area) & (whole % 2 == 1)))).astype(np.uint8)


class TestSuite:
    def test_groups(self):
        suite = registry.suite("atari")
        assert isinstance(suite, Suite)
        assert list(suite.groups) == ["8", "26", "57"]
        assert [len(suite.tasks(group)) for group in suite.groups] == [8, 26, 57]
        assert [task.name.removeprefix("atari/") for task in suite.tasks("8")] == [
            "Pong", "MsPacman", "Seaquest", "Boxing", "Alien", "ChopperCommand", "Hero", "RoadRunner",
        ]  # fmt: skip
        assert {task.name for task in suite.tasks("26")} < {task.name for task in suite.tasks("57")}

    def test_every_single_player_game_of_the_package_is_a_task(self):
        ids = [name.removeprefix("ALE/").removesuffix("-v5") for name in gym.registry if name.startswith("ALE/")]
        assert sorted(ids) == sorted(atari._roms())
        assert [Atari().tasks(name)[0].name for name in ids] == [f"atari/{name}" for name in ids]

    def test_human_normalised_scores(self):
        (pong,) = Atari().tasks("Pong")
        assert (pong.normalise(-20.7), pong.normalise(14.6)) == (0.0, 1.0)
        assert all("dqn_zoo" in task.score_source and task.score[0] < task.score[1] for task in Atari().tasks("57"))
        (tetris,) = Atari().tasks("Tetris")
        assert tetris.score == (0.0, 1.0)
        assert tetris.score_source.startswith("none")

    def test_all_games_share_one_group(self):
        assert [group.tasks for group in make_spec(Atari().tasks("57")).groups] == [tuple(range(57))]

    def test_minimal_actions_make_groups(self):
        minimal = Atari(full_actions=False)
        tasks = [minimal.tasks(game)[0] for game in ("Pong", "Freeway", "Qbert")]
        spec = make_spec(tasks)
        assert [group.action.n for group in spec.groups] == [6, 3]  # type: ignore[union-attr]
        assert [group.tasks for group in spec.groups] == [(0, 2), (1,)]

    def test_options_reach_the_game_and_the_result(self):
        (task,) = Atari(sticky=0.0, full_actions=False, life_loss_ends=True, name="plain").tasks("Breakout")
        assert task.name == "plain/Breakout"
        assert (task.protocol["sticky"], task.protocol["actions"]) == ("0.0", "minimal")
        assert task.protocol["life_loss_ends"] == "True"
        env = task.build()
        assert env.action_space.n == 4
        assert (env._sticky, env._life_loss_ends) == (0.0, True)

    @pytest.mark.parametrize("given", ["ALE/Pong-v5", "Pong-v4", "PongNoFrameskip-v4", "PongDeterministic-v4"])
    def test_a_double_frame_skip_is_refused(self, given: str):
        for make in (Atari().tasks, AtariGame):
            with pytest.raises(ValueError, match="a double frame skip is refused: ask for 'Pong'"):
                make(given)

    def test_an_unknown_game_gets_the_nearest_one(self):
        with pytest.raises(UnknownNameError, match="did you mean 'MsPacman'"):
            Atari().tasks("MsPacmann")

    @pytest.mark.parametrize("options", [{"sticky": 1.5}, {"sticky": -0.1}, {"noop_max": 0}])
    def test_options_out_of_range(self, options: dict[str, Any]):
        with pytest.raises(ValueError, match=next(iter(options))):
            AtariGame("Pong", **options)

    def test_a_missing_package_is_named_with_the_command(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "ale_py", None)
        atari._roms.cache_clear()
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'mtrl-suite\[atari\]'"):
            Atari().tasks("Pong")

    def test_tasks_are_picklable(self):
        task = pickle.loads(pickle.dumps(Atari().tasks("Pong")[0]))  # noqa: S301
        env = task.build()
        assert task.spaces == (env.observation_space, env.action_space)
        assert env.observation_space.contains(env.reset(seed=0)[0])


class TestAreaResize:
    @pytest.mark.parametrize("shape", [(210, 160), (250, 160), (214, 160), (84, 168)])
    def test_equals_the_definition(self, shape: tuple[int, int]):
        rng = np.random.default_rng(0)
        resize, out = AreaResize(*shape, 84), np.empty((84, 84), np.uint8)
        for levels in (2, 9, 256):
            image = rng.integers(levels, size=shape, dtype=np.uint8) * np.uint8(255 // (levels - 1))
            resize(image, out)
            assert np.array_equal(out, shrink(image))

    def test_halves_go_to_the_even_number(self):
        resize, out = AreaResize(2, 2, 1), np.empty((1, 1), np.uint8)
        means = []
        for total in (2, 6, 10):  # means 0.5, 1.5, 2.5
            resize(np.array([[total - total // 2, total // 2], [0, 0]], np.uint8), out)
            means.append(int(out[0, 0]))
        assert means == [0, 2, 2]


class TestEpisodes:
    def test_contract(self):
        report = check_suite(registry.suite("atari"), "Breakout", steps=60)
        assert report.ok, str(report)

    def test_gymnasium_approves(self):
        check_env(AtariGame("Pong"), skip_render_check=True)

    @pytest.mark.parametrize("game", REMEMBERING)
    def test_seed_decides_the_episode_whatever_was_played_before(self, game: str):
        used, fresh = AtariGame(game), AtariGame(game)
        first = play(used, 1, 15)
        play(used, 2, 150)
        assert play(used, 3, 15) == play(fresh, 3, 15)
        play(used, 4, 1)
        assert play(used, 1, 15) == first

    @pytest.mark.slow
    def test_seed_decides_the_episode_in_every_game(self):
        for game in atari._roms():
            self.test_seed_decides_the_episode_whatever_was_played_before(game)

    def test_seeds_differ_in_noops_and_in_what_sticks(self):
        env = AtariGame("MsPacman")
        starts = {(env.reset(seed=seed), env.ale.getEpisodeFrameNumber())[1] for seed in range(60)}
        assert starts <= set(range(1, 31))
        assert len(starts) > 15
        one_noop = AtariGame("Boxing", noop_max=1)
        assert play(one_noop, 0, 20) != play(one_noop, 1, 20, first=-1)  # the same start and the same actions

    @pytest.mark.parametrize("sticky", [0.0, 0.25, 1.0])
    def test_equals_the_package_frame_by_frame(self, sticky: float):
        """Against ``ale_py.AtariEnv`` without frame skip and stickiness, both of which are worked out here."""
        ours = AtariGame("Assault", sticky=sticky)
        raw = ale_py.AtariEnv("assault", obs_type="grayscale", frameskip=1, repeat_action_probability=0.0,
                              full_action_space=True)  # fmt: skip
        obs, _ = ours.reset(seed=5)
        frame, _ = raw.reset(seed=0)
        draws = np.random.default_rng(5)
        for _ in range(draws.integers(1, 31)):
            frame, *_ = raw.step(NOOP)
        screens = [shrink(frame)] * 4
        assert np.array_equal(obs, screens)
        held, rewards = NOOP, []
        for action in [FIRE, *np.random.default_rng(0).integers(18, size=25)]:
            obs, reward, terminated, truncated, info = ours.step(int(action))
            frames, total, stock = [], 0.0, {}
            for stays in draws.random(4) < sticky if sticky else [False] * 4:
                held = held if stays else int(action)
                frame, pay, _, _, stock = raw.step(held)
                frames.append(frame)
                total += float(pay)
            screens = [*screens[1:], shrink(np.maximum(frames[2], frames[3]))]
            assert np.array_equal(obs, screens)
            assert (reward, terminated, truncated, info) == (total, False, False, {"lives": stock["lives"]})
            rewards.append(reward)
        assert max(rewards) == (21 if sticky < 1 else 0)  # a hit, not clipped; nothing but no-ops

    def test_equals_gymnasiums_preprocessing(self):
        """A whole episode, where OpenCV is there. Its means may be off by one grey level at exact halves."""
        pytest.importorskip("cv2")
        stock = gym.make("ALE/Asterix-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=True)
        peer = gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(stock, noop_max=1), 4)
        ours = AtariGame("Asterix", sticky=0.0, noop_max=1)
        obs, expected = ours.reset(seed=0)[0], peer.reset(seed=0)[0]
        terminated, steps, total, off = False, 0, 0.0, 0
        for action in np.random.default_rng(0).integers(18, size=1000):
            difference = np.abs(obs.astype(int) - expected)
            assert difference.max() <= 1
            off += np.count_nonzero(difference)
            obs, *rest, _ = ours.step(int(action))
            expected, *others, _ = peer.step(int(action))
            assert rest == others
            total, terminated, steps = total + rest[0], rest[1], steps + 1
            if terminated:
                break
        assert terminated
        assert total > 0
        assert off / (steps * obs.size) < 1e-4

    def test_gymnasiums_preprocessing_does_not_skip_again(self):
        pytest.importorskip("cv2")
        with pytest.raises(ValueError, match="Disable frame-skipping"):
            gym.wrappers.AtariPreprocessing(AtariGame("Pong"))

    def test_a_game_ends_when_it_is_over(self):
        env = AtariGame("Breakout", sticky=0.0)
        _, info = env.reset(seed=0)
        lives, ends = [info["lives"]], []
        while not (ends and ends[-1]):
            _, _, terminated, truncated, info = env.step(FIRE)  # serves, and never moves
            assert not truncated
            lives.append(info["lives"])
            ends.append(terminated)
        assert sorted(set(lives)) == [0, 1, 2, 3, 4, 5]
        assert lives[-1] == 0
        frames = env.ale.getEpisodeFrameNumber()
        _, reward, terminated, _, _ = env.step(FIRE)
        assert (reward, terminated, env.ale.getEpisodeFrameNumber()) == (0.0, True, frames)

    def test_a_lost_life_may_end_the_episode(self):
        env = AtariGame("Breakout", sticky=0.0, life_loss_ends=True)
        for _ in range(2):  # the reset starts a new game
            _, info = env.reset(seed=0)
            assert info["lives"] == 5
            terminated = False
            while not terminated:
                _, _, terminated, _, info = env.step(FIRE)
            assert info["lives"] == 4

    def test_the_vector_resumes_and_replays(self):
        """Mid-episode in a worker and in this process, and a whole episode from its journal; bit for bit."""
        tasks = Atari(life_loss_ends=True).tasks("Breakout")
        rng = np.random.default_rng(0)
        vectors = [MultiTaskVectorEnv(tasks, 2, seed=3, workers=workers) for workers in (1, 0)]
        try:
            vectors[0].reset()
            episodes = []
            for _ in range(60):
                vectors[0].step({"atari": rng.integers(18, size=2)})
                episodes += vectors[0].episodes
            assert episodes
            assert replay(tasks[0], episodes[0].journal)[:2] == (episodes[0].ret, episodes[0].length)
            vectors[1].load_state_dict(vectors[0].state_dict())
            for _ in range(50):
                action = {"atari": rng.integers(18, size=2)}
                steps = [vector.step(action) for vector in vectors]
                assert np.array_equal(steps[0][0]["atari"]["image"], steps[1][0]["atari"]["image"])
                assert all(np.array_equal(a, b) for a, b in zip(steps[0][1:4], steps[1][1:4], strict=True))
        finally:
            for vector in vectors:
                vector.close()

    def test_processes_that_play_do_without_torch(self):
        code = "import sys, mtrl_envs.atari as a; a.AtariGame('Pong').reset(seed=0); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("False\n", "")

    def test_actions_that_a_game_does_not_know_do_nothing(self):
        seen = []
        for action in (NOOP, FIRE):  # Skiing has no button
            env = AtariGame("Skiing", sticky=0.0)
            env.reset(seed=0)
            seen.append([env.step(action)[0].tobytes() for _ in range(5)])
        assert seen[0] == seen[1]

    def test_observations_stay_what_they_were(self):
        env = AtariGame("Pong")
        first, _ = env.reset(seed=0)
        kept = first.copy()
        second, *_ = env.step(FIRE)
        assert np.array_equal(first, kept)
        assert np.array_equal(second[:3], first[1:])
        second[:] = 0  # what a caller does to it is the caller's business
        third, *_ = env.step(FIRE)
        assert third[2].any()

    def test_render(self):
        env = AtariGame("Pong", render_mode="rgb_array")
        env.reset(seed=0)
        frame = env.render()
        assert (frame.shape, frame.dtype) == ((210, 160, 3), np.uint8)
        assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 2

    def test_the_package_keeps_quiet(self, capfd: pytest.CaptureFixture[str]):
        AtariGame("Pong").reset(seed=0)
        assert capfd.readouterr() == ("", "")
