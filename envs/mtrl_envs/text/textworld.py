"""Games that TextWorld makes (Côté et al. 2018, https://arxiv.org/abs/1806.11532): made once, kept on disk, played."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mtrl_envs.extras import needs
from mtrl_envs.text.encoding import Scene

REVISION = 1
"""Of how games are made here (``make.py``): raise it when other games come out of the same options."""


@dataclass(frozen=True)
class Recipe:
    """What games of one kind are made from: a challenge of TextWorld and its settings."""

    challenge: str
    settings: Mapping[str, Any]

    def folder(self) -> Path:
        """Where games of this kind are kept, by versions and options."""
        text = json.dumps([self.challenge, dict(self.settings), REVISION], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cache_folder() / f"textworld-{version('textworld')}" / f"{self.challenge}-{digest}"

    def game(self, number: int) -> Path:
        """The .z8 file of game ``number`` (its .json lies beside it), made now (2-5 s) if it was never asked for.

        Raises:
            RuntimeError: TextWorld cannot make it; the message holds its words.
        """
        home = self.folder() / str(number)
        if not home.is_dir():
            _make(self, number, home)
        return home / "game.z8"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mtrl/text``, by default ``~/.cache/mtrl/text``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtrl" / "text"


def _make(recipe: Recipe, number: int, home: Path) -> None:
    """Make a game beside its place and move it there whole: whoever comes second finds it done."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".making-") as folder:
        part = Path(folder) / "game"
        part.mkdir()
        order = {
            "challenge": recipe.challenge,
            "settings": dict(recipe.settings),
            "seed": number,
            "path": str(part / "game.z8"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "mtrl_envs.text.make", json.dumps(order)],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"TextWorld cannot make game {number} of {recipe}:\n{done.stderr.strip()}")
        (part / "game.ni").unlink()  # the source, which nobody reads
        try:
            part.rename(home)
        except OSError:
            if not home.is_dir():  # else another process was first, and its game is the same
                raise


class TextWorldPlayer:
    """Plays the games ``first .. first + games - 1`` of a recipe; the episode's generator picks one.

    A game itself is deterministic. It is loaded afresh for every episode (15 ms), so that nothing is left of earlier
    ones.

    Attributes:
        walkthrough: commands that win the present game, from its start.

    Raises:
        ModuleNotFoundError: textworld is not installed.
    """

    def __init__(self, recipe: Recipe, first: int, games: int) -> None:
        self.recipe, self.first, self.games = recipe, first, games
        self.walkthrough: list[str] = []
        self._textworld = needs("textworld", extra="text", suite="text")
        self._asked = self._textworld.EnvInfos(
            objective=True, description=True, inventory=True, admissible_commands=True, score=True, won=True, lost=True
        )
        self._env: Any = None

    def start(self, random: np.random.Generator) -> Scene:
        """Begin an episode."""
        self.close()
        path = self.recipe.game(self.first + int(random.integers(self.games)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Jericho does not know the game; TextWorld does
            self._env = self._textworld.start(str(path), self._asked)
        self._env.unwrapped.seed(1)  # of the interpreter, which else takes the time
        state = self._env.reset()
        self.walkthrough = list(state["extra.walkthrough"])
        return _scene(state, feedback="")  # a banner, the objective and the room

    def enter(self, command: str) -> Scene:
        """Enter a command."""
        state, _, _ = self._env.step(command)
        # The prompt and the status line follow; a new room is described once more in its own section.
        feedback = state.feedback.partition("\n>")[0].replace(state.description, "")
        return _scene(state, feedback)

    def close(self) -> None:
        """End the present game, if there is one."""
        if self._env is not None:
            self._env.close()
            self._env = None


def _scene(state: Any, feedback: str) -> Scene:
    return Scene(
        (state.objective, feedback, state.description, state.inventory),
        state.admissible_commands,
        float(state.score),
        bool(state.won),
        bool(state.lost),
    )
