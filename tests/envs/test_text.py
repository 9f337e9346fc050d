"""Text games: words and commands as numbers, games made once and the same everywhere, episodes, Jericho."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from mtrl import registry
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.testing import check_suite
from mtrl.types import Suite
from mtrl.vector import MultiTaskVectorEnv, replay
from mtrl_envs.text import Jericho, Text, recipe
from mtrl_envs.text.encoding import COMMAND, SECTIONS, TEXT, Scene, encode, place, word_id, words
from mtrl_envs.text.game import TextGame
from mtrl_envs.text.textworld import Recipe

needs_textworld = pytest.mark.skipif(find_spec("textworld") is None, reason="needs the extra text")
THE_END = r"\*\*\* The End \*\*\*"
EVERY = (
    "coin-5", "coin-105", "coin-210", "treasure-5", "treasure-15", "treasure-25", "simple-dense", "simple-balanced",
    "simple-sparse", "cooking-take", "cooking-cut", "cooking-cook", "cooking-all",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Games made in this module: making one takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def scene(*commands: str, text: tuple[str, str, str, str] = ("", "", "", ""), **rest: Any) -> Scene:
    return Scene(text, commands, **{"score": 0.0, "won": False, "lost": False} | rest)


class TestEncoding:
    def test_words(self):
        assert words("-= King-size Bed =-\nYou can't take 3 (red) apples.") == [
            "king-size", "bed", "you", "can't", "take", "3", "red", "apples",
        ]  # fmt: skip

    def test_ids_are_the_same_everywhere(self):
        assert (
            (word_id("coin"), word_id("take")) == (1 + crc32(b"coin") % 8191, 1 + crc32(b"take") % 8191) == (704, 3445)
        )

    def test_sections_and_commands_have_their_places(self):
        shown = encode(scene("take coin", text=("find it", "", "A room.", "nothing")), 8)
        assert shown.tokens.shape == (TEXT + 8 * COMMAND,)
        action = shown.table.index("take coin")
        starts = [0, *itertools.accumulate(SECTIONS.values())]
        expected = {
            0: word_id("find"),
            1: word_id("it"),
            starts[2]: word_id("a"),
            starts[2] + 1: word_id("room"),
            starts[3]: word_id("nothing"),
            TEXT + action * COMMAND: word_id("take"),
            TEXT + action * COMMAND + 1: word_id("coin"),
        }
        assert {int(i): int(shown.tokens[i]) for i in np.flatnonzero(shown.tokens)} == expected
        assert np.flatnonzero(shown.legal).tolist() == [action]
        assert shown.cut == 0

    def test_what_is_too_long_is_cut_and_counted(self):
        shown = encode(scene("one two three four five six seven", text=("word " * 40, "", "", "")), 4)
        assert shown.cut == 1 + 40 - SECTIONS["objective"]
        assert (shown.tokens[: SECTIONS["objective"]] == word_id("word")).all()
        assert not shown.tokens[SECTIONS["objective"] : TEXT].any()
        last = TEXT + (shown.table.index("one two three four five six seven") + 1) * COMMAND - 1
        assert shown.tokens[last] == word_id("six")

    def test_a_command_keeps_its_action(self):
        alone = place(["go east"], 64).index("go east")
        assert alone == crc32(b"go east") % 64
        for others in (["go west"], ["look", "inventory"], ["take coin", "go north"]):
            assert place([*others, "go east"], 64)[alone] == "go east"

    def test_a_taken_action_gives_way_to_the_next_free_one(self):
        commands = [f"push {number}" for number in range(8)]
        table = place(reversed(commands), 8)
        assert sorted(table) == commands
        assert table == place(commands, 8)

    def test_more_commands_than_actions_are_refused(self):
        with pytest.raises(ValueError, match=r"3 commands are possible and there are 2 actions.*commands=4"):
            place(["a", "b", "c", "c"], 2)


class Corridor:
    """Two rooms; "go" and "go" again wins with 3 points, "jump" loses."""

    def start(self, random: np.random.Generator) -> Scene:
        self.rooms = 0
        return scene("go", "jump")

    def enter(self, command: str) -> Scene:
        self.rooms += command == "go"
        won = self.rooms == 2
        return scene("go", "jump", score=self.rooms + float(won), won=won, lost=command == "jump")

    def close(self) -> None: ...


class TestGame:
    def test_a_win(self):
        env = TextGame(Corridor(), 4)
        _, info = env.reset(seed=0)
        assert info == {"success": False, "cut_words": 0}
        steps = [env.step(env.table.index("go")) for _ in range(2)]
        assert [step[1:4] for step in steps] == [(1.0, False, False), (2.0, True, False)]
        assert [step[4]["success"] for step in steps] == [False, True]

    def test_a_loss(self):
        env = TextGame(Corridor(), 4)
        env.reset(seed=0)
        _, reward, terminated, truncated, info = env.step(env.table.index("jump"))
        assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, False)

    def test_an_action_without_a_command_is_refused(self):
        env = TextGame(Corridor(), 4)
        env.reset(seed=0)
        with pytest.raises(ValueError, match=r"action \d stands for no command now; legal: {.*'jump'"):
            env.step(env.table.index(""))


class TestSuite:
    def test_levels_are_names(self):
        coin, horizon = recipe("coin-120")
        assert (coin.challenge, dict(coin.settings), horizon) == ("tw-coin_collector", {"level": 120}, 100)
        assert recipe("treasure-30")[1] == 100
        assert recipe("simple-sparse")[0].settings["rewards"] == "sparse"
        assert recipe("cooking-all")[0].settings["recipe"] == 3

    @pytest.mark.parametrize("name", ["coin-0", "coin-301", "coin-300", "treasure-31", "coin-05", "coin", "simple-x"])
    def test_an_unknown_name_gets_the_nearest_one(self, name: str):
        with pytest.raises(UnknownNameError, match=r"of suite 'text'.*did you mean"):
            recipe(name)

    @needs_textworld
    def test_games_are_kept_by_version_and_options(self, cache: Path):
        folders = {recipe(name)[0].folder() for name in ("coin-5", "coin-6", "simple-dense", "simple-sparse")}
        assert len(folders) == 4
        assert {folder.parents[2] for folder in folders} == {cache / "mtrl"}

    @needs_textworld
    def test_without_xdg_the_cache_is_in_the_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert recipe("coin-5")[0].folder().is_relative_to(tmp_path / ".cache" / "mtrl" / "text")

    def test_importing_the_suite_imports_no_environment(self):
        code = (
            "import sys; from mtrl_envs.text import Text; Text().groups;"
            "assert not {'textworld', 'jericho', 'spacy'} & {name.split('.')[0] for name in sys.modules}"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_a_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "textworld", None)
        with pytest.raises(
            ModuleNotFoundError, match=r"'text' needs textworld .*GPL.*pip install 'mtrl-suite\[text\]'"
        ):
            Text().tasks("coin")
        monkeypatch.setitem(sys.modules, "jericho", None)
        with pytest.raises(ModuleNotFoundError, match=r"'text' needs jericho .*GPL.*pip install 'mtrl-suite\[text\]'"):
            Jericho({"a": "a.z5"}).tasks("a")


@needs_textworld
class TestTextWorld:
    def test_groups(self):
        suite = registry.suite("text")
        assert isinstance(suite, Suite)
        assert list(suite.groups) == ["coin", "treasure", "simple", "cooking", "easy", "all"]
        assert [task.name for task in suite.tasks("easy")] == [
            "text/coin-5", "text/treasure-5", "text/simple-dense", "text/cooking-take",
        ]  # fmt: skip
        assert [len(suite.tasks(group)) for group in suite.groups] == [3, 3, 3, 4, 4, 13]
        assert len(make_spec(suite.tasks("all")).groups) == 1

    def test_scores_belong_to_the_measured_games(self):
        for task in Text().tasks("all"):
            assert 0 <= task.score[0] < task.score[1], task.name
            assert "benchmarks/scores.py" in task.score_source
        (other,) = Text(first=1000, name="text-heldout").tasks("coin-5")
        assert (other.name, other.score) == ("text-heldout/coin-5", (0, 1))
        assert other.protocol["games"].startswith("1000..1007")

    @pytest.mark.parametrize("name", ["coin-5", "treasure-5"])
    def test_the_contract(self, name: str):
        report = check_suite(Text(games=2), name, full=True)
        assert report.findings == (), report

    @pytest.mark.slow
    @pytest.mark.parametrize("group", ["coin", "treasure", "simple", "cooking"])
    def test_the_contract_of_all(self, group: str):
        report = check_suite(Text(games=2), group, seeds=(1, 2, 3), full=True)
        assert report.findings == (), report

    def test_a_game_is_the_same_wherever_it_is_made(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        """TextWorld alone makes another kitchen of this seed where sets have another order."""
        kitchen = recipe("cooking-take")[0]
        here = kitchen.game(0)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("PYTHONHASHSEED", "1")
        there = kitchen.game(0)
        assert there != here
        assert there.with_suffix(".json").read_bytes() == here.with_suffix(".json").read_bytes()
        assert program(there) == program(here)

    def test_a_game_is_made_once(self):
        coin = recipe("coin-5")[0]
        path = coin.game(0)
        before = path.stat()
        assert coin.game(0) == path
        assert path.stat() == before
        assert sorted(one.name for one in path.parent.iterdir()) == ["game.json", "game.z8"]

    def test_a_failure_leaves_nothing_behind(self):
        bad = Recipe("tw-coin_collector", {"level": 999})
        with pytest.raises(RuntimeError, match=r"(?s)cannot make game 3 of .*level to be within"):
            bad.game(3)
        assert list(bad.folder().iterdir()) == []

    def test_of_two_makers_the_first_one_stays(self, monkeypatch: pytest.MonkeyPatch):
        other = Recipe("tw-coin_collector", {"level": 7})
        home = other.folder() / "4"

        def run(command: list[str], **rest: Any) -> subprocess.CompletedProcess[str]:
            part = Path(json.loads(command[-1])["path"])
            for end in (".z8", ".json", ".ni"):
                part.with_suffix(end).write_text("late")
            home.mkdir()  # meanwhile, in another process
            (home / "game.z8").write_text("early")
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        assert other.game(4).read_text() == "early"
        assert [one.name for one in other.folder().iterdir()] == ["4"]

    def test_play_does_not_depend_on_the_order_of_sets(self):
        code = """
import numpy as np, zlib
from mtrl_envs.text import Text
env = Text(games=1).tasks("cooking-take")[0].build()
obs, _ = env.reset(seed=0)
rng, digest = np.random.default_rng(0), 0
for _ in range(40):
    digest = zlib.crc32(obs["tokens"].tobytes(), digest)
    obs, reward, over, _, _ = env.step(int(rng.choice(np.flatnonzero(obs["legal"]))))
    if over:
        obs, _ = env.reset()
print(digest)
"""
        runs = [
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        ]
        assert runs[0] == runs[1] != ""

    @pytest.mark.parametrize("name", ["coin-5", "treasure-5", "simple-dense", "cooking-take"])
    def test_the_walkthrough_wins(self, name: str):
        win(name, games=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", EVERY)
    def test_the_walkthrough_wins_all(self, name: str):
        win(name, games=8)

    def test_a_walkthrough_that_was_left_is_refused(self):
        env: Any = Text(games=1).tasks("coin-5")[0].build()
        obs, _ = env.reset(seed=0)
        expert = Text.expert("coin-5")
        assert expert(env, obs) == env.table.index(env.player.walkthrough[0])
        with pytest.raises(RuntimeError, match="followed from the start"):
            [expert(env, obs) for _ in env.player.walkthrough]  # the game stands still
        env.close()

    def test_what_is_seen_is_what_the_game_says(self):
        env: Any = Text(games=1).tasks("coin-5")[0].build()
        obs, info = env.reset(seed=0)
        objective, feedback, room, inventory = env.scene.text
        assert "coin" in words(objective)
        assert (feedback, inventory) == ("", "You are carrying nothing.")
        assert room.startswith("-= ")
        seen = [word_id(word) for word in words(room)]
        start = SECTIONS["objective"] + SECTIONS["feedback"]
        assert obs["tokens"][start : start + len(seen)].tolist() == seen
        assert info["cut_words"] == 0
        legal = [env.table[action] for action in np.flatnonzero(obs["legal"])]
        assert {"look", "inventory", env.player.walkthrough[0]} <= set(legal)
        _, _, _, _, _ = env.step(env.table.index("inventory"))
        assert words(env.scene.text[1]) == ["you", "are", "carrying", "nothing"]  # no prompt, no status line
        env.close()

    def test_a_journal_replays(self):
        (task,) = Text(games=2).tasks("treasure-5")
        envs = MultiTaskVectorEnv([task], seed=1)
        rng, episodes = np.random.default_rng(0), []
        try:
            envs.reset()
            while len(episodes) < 2:
                (legal,) = envs.obs.leaves["text"]["legal"]
                envs.step({"text": rng.choice(np.flatnonzero(legal), 1)})
                episodes += envs.episodes
        finally:
            envs.close()
        for episode in episodes:
            again = replay(task, episode.journal)
            assert (again.ret, again.success) == (episode.ret, episode.success)


@needs_textworld
class TestJericho:
    @pytest.fixture
    def coin(self) -> tuple[str, tuple[str, ...]]:
        """A game that Jericho does not support, and the commands that win it."""
        env: Any = Text(games=1).tasks("coin-5")[0].build()
        env.reset(seed=0)
        commands = tuple(env.player.walkthrough)
        env.close()
        return str(recipe("coin-5")[0].game(0)), commands

    def test_the_contract(self, coin: tuple[str, tuple[str, ...]]):
        path, commands = coin
        suite = Jericho({"coin": path}, commands=tuple(set(commands)) + ("look",), won=THE_END, horizon=30)
        report = check_suite(suite, "all", full=True)
        assert report.errors == (), report
        assert {note.what for note in report.notes} <= {"every seed starts with the same observation"}

    def test_a_win_pays_one(self, coin: tuple[str, tuple[str, ...]]):
        path, commands = coin
        (task,) = Jericho({"coin": path}, commands=tuple(sorted(set(commands))), won=THE_END).tasks("coin")
        env: Any = task.build()
        env.reset(seed=0)
        steps = [env.step(env.table.index(command)) for command in commands]
        assert [step[1:3] for step in steps] == [(0.0, False)] * (len(steps) - 1) + [(1.0, True)]
        assert steps[-1][4]["success"]
        assert not steps[-1][0]["legal"].any()
        env.close()

    def test_room_and_inventory_are_asked_for_without_playing(self, coin: tuple[str, tuple[str, ...]]):
        path, commands = coin
        env: Any = Jericho({"coin": path}, commands=commands).tasks("coin")[0].build()
        env.reset(seed=0)
        room, inventory = env.scene.text[2:]
        assert room.startswith("-= ")
        assert words(inventory)[:3] == ["you", "are", "carrying"]
        state = env.player._env.get_state()
        env.player._ask("inventory")
        np.testing.assert_array_equal(env.player._env.get_state()[0], state[0])  # the machine's memory
        env.player._env.step("inventory")
        assert not np.array_equal(env.player._env.get_state()[0], state[0])
        env.close()

    def test_an_instance_in_a_module_is_a_suite(
        self, coin: tuple[str, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        module = (
            f"from mtrl_envs.text import Jericho\nmine = Jericho({{'maze': {coin[0]!r}}}, ('look',), name='mine')\n"
        )
        (tmp_path / "my_games.py").write_text(module)
        monkeypatch.syspath_prepend(str(tmp_path))
        (task,) = registry.tasks("my_games:mine/maze")
        assert (task.name, task.protocol["file"], task.horizon) == ("mine/maze", "game.z8", 400)
        assert task.score_source == "none (raw points)"
        with pytest.raises(UnknownNameError, match=r"game of suite 'mine'.*did you mean 'maze'"):
            registry.tasks("my_games:mine/mazes")

    def test_a_game_without_support_needs_commands(self, coin: tuple[str, tuple[str, ...]]):
        with pytest.raises(ValueError, match=r"does not support .*game.z8'.*commands=\.\.\."):
            Jericho({"coin": coin[0]}).tasks("coin")[0].build()

    def test_a_missing_file_is_named(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"no game file .*nothing.z5"):
            Jericho({"none": str(tmp_path / "nothing.z5")}).tasks("none")[0].build()


def win(name: str, games: int) -> None:
    """Each of the first games is won by its walkthrough, with the most points."""
    task = Text(games=games).tasks(name)[0]
    env: Any = task.build()
    expert, played = Text.expert(task.name), set()
    for seed in range(100):
        obs, _ = env.reset(seed=seed)
        total, terminated, info = 0.0, False, {}
        for _ in range(task.horizon):
            obs, reward, terminated, _, info = env.step(expert(env, obs))
            total += reward
            if terminated:
                break
        assert terminated
        assert info["success"]
        played.add(tuple(env.player.walkthrough))
        if len(played) == games:
            break
    env.close()
    assert played


def program(path: Path) -> bytes:
    """A Z-machine file but for what its header says about the day it was compiled: serial number and checksum."""
    data = path.read_bytes()
    return data[:18] + data[24:28] + data[30:]
