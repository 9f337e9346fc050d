"""Your own Z-machine games through Jericho (Hausknecht et al. 2020, https://arxiv.org/abs/1909.05398)."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete

from mtrl.registry import MissingPackageError, UnknownNameError
from mtrl.types import Task
from mtrl_envs.extras import needs
from mtrl_envs.text.encoding import Scene, observation_space
from mtrl_envs.text.game import TextGame

_NOTE = "licence: GPL-2.0 or later"


@dataclass(frozen=True)
class Rules:
    """What Jericho does not know about a game that it does not support.

    Args:
        commands: offered at every step; none: those that Jericho finds, for games that it supports.
        won: a regular expression; the game is won, and pays 1, when an answer holds it.
        lost: the same for a game that is lost, which pays nothing.
    """

    commands: tuple[str, ...] = ()
    won: str = ""
    lost: str = ""


class JerichoPlayer:
    """Plays one game file. An episode's generator decides the interpreter's: dice and moods of the game.

    Games that Jericho supports give points, valid commands, victory and defeat; of the others it knows what they print,
    and ``rules`` say the rest.

    Raises:
        ModuleNotFoundError: jericho, or for valid commands spaCy's ``en_core_web_sm``, is not installed.
        FileNotFoundError: no such file.
        ValueError: a game that Jericho does not support, and ``rules`` names no commands.
    """

    def __init__(self, path: str, rules: Rules) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no game file {path!r}")
        self._jericho = needs("jericho", extra="text", suite="text", note=_NOTE)
        self._rules = rules
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._jericho.UnsupportedGameWarning)  # answered below
            self._env = self._jericho.FrotzEnv(path)
        self._supported = bool(self._env.is_fully_supported and self._env.act_gen)
        if not rules.commands:
            if not self._supported:
                raise ValueError(
                    f"Jericho does not support {path!r}: say what can be entered, Jericho(..., commands=...)"
                )
            if find_spec("en_core_web_sm") is None:
                raise MissingPackageError(
                    "Jericho finds valid commands with spaCy's model: python -m spacy download en_core_web_sm",
                    name="en_core_web_sm",
                )
        self._points = 0.0

    def start(self, random: np.random.Generator) -> Scene:
        """Begin an episode."""
        self._env.seed(int(random.integers(1, 2**15)))  # 0 and -1 mean something else
        self._points = 0.0
        text, _ = self._env.reset()
        return self._scene(text)

    def enter(self, command: str) -> Scene:
        """Enter a command."""
        text, points, _, _ = self._env.step(command)
        self._points += points
        return self._scene(text)

    def close(self) -> None:
        """Nothing to do: the interpreter's library is unloaded with its environment."""

    def _scene(self, text: str) -> Scene:
        rules, env = self._rules, self._env
        won = bool(env.victory()) or bool(rules.won and re.search(rules.won, text))
        lost = not won and (bool(env.game_over()) or bool(rules.lost and re.search(rules.lost, text)))
        if won or lost:  # a game that is over answers no questions
            room = inventory = ""
            commands: Sequence[str] = ()
        else:
            room, inventory = self._ask("look"), self._ask("inventory")
            commands = rules.commands or env.get_valid_actions(use_parallel=False)
        feedback = text.partition("\n>")[0].replace(room, "")
        points = self._points if self._supported else float(won)
        return Scene(("", feedback, room, inventory), commands, points, won, lost)

    def _ask(self, command: str) -> str:
        """What a command would answer; the game goes on as if it had not been entered."""
        state = self._env.get_state()
        text, _, _, _ = self._env.step(command)
        self._env.set_state(state)
        return text.partition("\n>")[0].strip()


def make(path: str, rules: Rules, actions: int) -> TextGame:
    """One environment of a game file."""
    return TextGame(JerichoPlayer(path, rules), actions)


@dataclass
class Jericho:
    """A suite of your own game files; no games come with it. An instance in a module of yours, say ``games.py``, makes
    ``games:zork/zork1`` a task::

        zork = Jericho({"zork1": "/games/zork1.z5"}, scores={"zork1": (0, 350)}, name="zork")

    A game that Jericho does not support needs to be told what can be entered and when it is over; see ``Rules``::

        mine = Jericho({"maze": "maze.z8"}, commands=("north", "south", "take coin"), won=r"You have won")

    Args:
        games: name -> file.
        commands, won, lost: see ``Rules``.
        scores: name -> (return of a random policy, best points), for normalised scores.
        horizon: steps per episode.
        actions: most commands that can be possible at once.
        name: starts task names.
    """

    games: Mapping[str, str]
    commands: tuple[str, ...] = ()
    won: str = ""
    lost: str = ""
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    horizon: int = 400
    actions: int = 96
    name: str = "jericho"

    @property
    def groups(self) -> Sequence[str]:
        return ("all", *self.games)

    def tasks(self, group: str) -> Sequence[Task]:
        """All games, or the one of that name.

        Raises:
            ModuleNotFoundError: jericho is not installed.
            UnknownNameError: ``group`` is neither.
        """
        needs("jericho", extra="text", suite="text", note=_NOTE)
        if group not in self.groups:
            raise UnknownNameError(f"game of suite {self.name!r}", group, self.groups)
        return tuple(self._task(name) for name in (self.games if group == "all" else (group,)))

    def _task(self, name: str) -> Task:
        rules = Rules(self.commands, self.won, self.lost)
        return Task(
            name=f"{self.name}/{name}",
            build=functools.partial(make, str(self.games[name]), rules, self.actions),
            horizon=self.horizon,
            score=self.scores.get(name, (0.0, 1.0)),
            score_source="given with the suite" if name in self.scores else "none (raw points)",
            spaces=(observation_space(self.actions), Discrete(self.actions)),
            protocol={"jericho": version("jericho"), "file": Path(self.games[name]).name} | _written(rules),
        )


def _written(rules: Rules) -> dict[str, Any]:
    return {"commands": ", ".join(rules.commands) or "valid", "won": rules.won, "lost": rules.lost}
