"""Text games: those that TextWorld makes (Côté et al. 2018, https://arxiv.org/abs/1806.11532) as the suite ``text``,
and any Z-machine game of yours through ``Jericho``.

======================= ============================================================================================
``coin-N``              find the coin in a chain of rooms; N is the level of TextWorld's ``coin_collector``, 1..300:
                        1 + (N - 1) % 100 rooms to the coin, and from 101 (201) on as many (twice as many) dead ends;
                        at most 100 rooms in all
``treasure-N``          take the object that the objective names and not the other one, which loses the game; level N
                        of ``treasure_hunter``, 1..30: 5 rooms, from 11 on 10 with containers, from 21 on 20
``simple-dense``        leave the locked bedroom, find a dish and put it on the stove; also ``simple-balanced`` and
                        ``simple-sparse``, which pay for fewer steps of the way
``cooking-take``        read a recipe, fetch what it names, prepare and eat it (First TextWorld Problems); also
                        ``-cut``, ``-cook`` and ``-all``, with 3 ingredients in 6 rooms
======================= ============================================================================================

Groups are ``coin``, ``treasure``, ``simple``, ``cooking``, ``all`` (these four) and ``easy`` (the easiest of each). A
task is ``games`` games made with these options; an episode's seed picks one. They are made when first played, 2-5 s
each, and kept in the user's cache folder. Other games of the same kinds, say to test on, are an instance in a module of
yours::

    heldout = Text(first=1000, name="text-heldout")  # my_module:heldout/coin are three tasks

What is observed and what an action means: ``mtrl_envs.text.encoding``. ``pip install "mtrl-suite[text]"`` brings
jericho, the interpreter, which is licensed under the GPL-2.0 or later.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Discrete

from mtrl.registry import UnknownNameError
from mtrl.types import Task
from mtrl_envs.extras import needs
from mtrl_envs.text.encoding import observation_space
from mtrl_envs.text.game import TextGame
from mtrl_envs.text.jericho import Jericho
from mtrl_envs.text.textworld import REVISION, Recipe, TextWorldPlayer

__all__ = ["Jericho", "Text"]

# Hands hold few things ("drop"), which also bounds the number of commands.
_KITCHEN = {"recipe": 1, "take": 1, "go": 1, "open": True, "cook": False, "cut": False, "drop": True, "split": "train"}
_COOKING = {
    "cooking-take": _KITCHEN,
    "cooking-cut": _KITCHEN | {"cut": True},
    "cooking-cook": _KITCHEN | {"cook": True},
    "cooking-all": _KITCHEN | {"recipe": 3, "take": 3, "go": 6, "cut": True, "cook": True},
}
_SIMPLE = ("simple-dense", "simple-balanced", "simple-sparse")
_GROUPS = {
    "coin": ("coin-5", "coin-105", "coin-210"),
    "treasure": ("treasure-5", "treasure-15", "treasure-25"),
    "simple": _SIMPLE,
    "cooking": tuple(_COOKING),
}
_GROUPS["easy"] = tuple(names[0] for names in _GROUPS.values())
_GROUPS["all"] = tuple(name for group in ("coin", "treasure", "simple", "cooking") for name in _GROUPS[group])

# Means over 40 episodes (the last three: 16) of the default games.
_SCORES = {
    "coin-5": (0.6, 1.0),
    "coin-105": (0.2, 1.0),
    "coin-210": (0.0, 1.0),
    "treasure-5": (0.5, 1.0),
    "treasure-15": (0.125, 1.0),
    "treasure-25": (0.1, 1.0),
    "simple-dense": (4.15, 8.4),
    "simple-balanced": (0.65, 3.375),
    "simple-sparse": (0.0, 1.0),
    "cooking-take": (0.95, 3.0),
    "cooking-cut": (0.8125, 4.0),
    "cooking-cook": (1.3125, 4.0),
    "cooking-all": (1.4375, 11.0),
}
_MEASURED = "mean returns of random legal commands and of the walkthrough, same seeded episodes, benchmarks/scores.py"


def make(recipe: Recipe, first: int, games: int, actions: int) -> TextGame:
    """One environment of a task."""
    return TextGame(TextWorldPlayer(recipe, first, games), actions)


def recipe(name: str) -> tuple[Recipe, int]:
    """What the games of a task are made from, and its horizon.

    Raises:
        UnknownNameError: no such task.
    """
    kind, _, rest = name.partition("-")
    level = int(rest) if re.fullmatch(r"[1-9]\d*", rest) else 0
    way = 1 + (level - 1) % 100
    if kind == "coin" and 1 <= level <= 300 and way * (1 + (level - 1) // 100) <= 100:  # TextWorld's most rooms
        return Recipe("tw-coin_collector", {"level": level}), max(50, 5 * way)
    if kind == "treasure" and 1 <= level <= 30:
        return Recipe("tw-treasure_hunter", {"level": level}), 50 if level <= 20 else 100
    if name in _SIMPLE:
        return Recipe("tw-simple", {"rewards": rest, "goal": "brief", "test": False}), 100
    if name in _COOKING:
        return Recipe("tw-cooking", _COOKING[name]), 100
    raise UnknownNameError("task or group of suite 'text'", name, (*_GROUPS, *_GROUPS["all"]))


class Walkthrough:
    """Enters the commands of a game's walkthrough, in their order, leaving out those that are not possible now."""

    def __init__(self) -> None:
        self._game: Any = None
        self._left: list[str] = []

    def __call__(self, env: gym.Env[Any, Any], obs: Any) -> int:
        """The action for the present state of ``env``, a (wrapped) ``TextGame``; ``obs`` is not read.

        Raises:
            RuntimeError: the walkthrough is over: the episode did not follow it.
        """
        game: Any = env.unwrapped
        if self._game is not game.player.walkthrough:  # a list of its own for every episode
            self._game, self._left = game.player.walkthrough, list(game.player.walkthrough)
        while self._left:
            command = self._left.pop(0)
            if command in game.table:
                return game.table.index(command)
        raise RuntimeError("the walkthrough is over and the game is not: it must be followed from the start")


@dataclass
class Text:
    """The suite ``text``; see the module.

    Args:
        games: games per task.
        first: number of the first one; game n is the same in every instance.
        commands: most commands that can be possible at once, the number of actions. The most of the named tasks are
            93: in the kitchen of ``simple-*``, carrying all there is.
        name: starts task names.
    """

    games: int = 8
    first: int = 0
    commands: int = 96
    name: str = "text"

    @property
    def groups(self) -> Sequence[str]:
        return tuple(_GROUPS)

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of a group or the single one of that name.

        Raises:
            ModuleNotFoundError: textworld is not installed.
            UnknownNameError: ``group`` is neither.
        """
        needs("textworld", extra="text", suite="text", note="its interpreter, jericho, is licensed under the GPL-2.0+")
        return tuple(self._task(name) for name in _GROUPS.get(group, (group,)))

    @staticmethod
    def expert(task: str) -> Walkthrough:
        """The walkthrough as a policy: called with (environment, observation), it gives the action.

        Raises:
            UnknownNameError: no such task.
        """
        recipe(task.removeprefix("text/"))
        return Walkthrough()

    def _task(self, name: str) -> Task:
        made, horizon = recipe(name)
        measured = _SCORES.get(name) if (self.games, self.first) == (8, 0) else None
        return Task(
            name=f"{self.name}/{name}",
            build=functools.partial(make, made, self.first, self.games, self.commands),
            horizon=horizon,
            score=measured or (0.0, 1.0),
            score_source=_MEASURED if measured else "none (raw returns): not measured for these games",
            spaces=(observation_space(self.commands), Discrete(self.commands)),
            protocol={
                "textworld": version("textworld"),
                "challenge": made.challenge,
                "settings": str(dict(made.settings)),
                "games": f"{self.first}..{self.first + self.games - 1}, revision {REVISION}",
                "actions": str(self.commands),
            },
        )
