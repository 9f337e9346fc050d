"""Atari 2600 games of the Arcade Learning Environment (Bellemare et al., JAIR 2013, https://ale.farama.org).

Groups are lists of games: ``8`` (those of ScaleZero, arXiv:2509.07945, in its order), ``26`` (Atari-100k, Kaiser et
al., ICLR 2020) and ``57`` (the benchmark of the deep Q-network papers). Any of the package's 104 single-player games is
a task by its name: ``atari/Pong``, ``atari/MsPacman``.

The protocol is that of Machado et al. (JAIR 2018): sticky actions, all 18 actions, whole games, raw rewards. Others are
instances of ``Atari`` in a module of yours, say ``variants.py``, and ``variants:minimal/Pong`` names a task::

    minimal = Atari(sticky=0.0, full_actions=False, name="atari-minimal")
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from mtrl.registry import UnknownNameError
from mtrl.types import Task
from mtrl_envs.area_resize import AreaResize
from mtrl_envs.extras import needs

SKIP, STACK, SIZE = 4, 4, 84
"""Frames per decision, screens per observation, and an observed screen's height and width in pixels."""

HORIZON = 27_000
"""Decisions per episode: 108,000 frames, half an hour of play."""

ACTIONS = 18
"""Positions of the joystick with and without its button, in the order of ``ale_py.Action``."""

_TWO_PLAYERS = ("combat", "joust", "maze_craze", "warlords")
_GYMNASIUM_ID = re.compile(r"(?:ALE/)?(\w+?)(?:NoFrameskip|Deterministic)?-v\d+")


class AtariGame(gym.Env[np.ndarray, Any]):
    """One game whose ``reset(seed=...)`` decides the whole episode: its no-ops and which actions stick.

    Observation: the last 4 screens, oldest first, [4, 84, 84] uint8 grey; before there are 4, the first one is
    repeated. A screen is the pixel-wise maximum of a decision's last two frames, shrunk by ``AreaResize``. Action: the
    index of one of 18, or of the game's own minimal set; it is held for 4 frames. An episode begins with 1 to
    ``noop_max`` frames without action, and no fire is pressed for the agent. Reward: change of the game's score, raw.
    The episode terminates when the game is over. Nothing is truncated: that is left to ``Task.horizon``.
    ``info["lives"]`` is the number of lives left; games that do not count them say 0.

    A reset does not load the cartridge again (85 ms, as ``ale_py.AtariEnv`` does with a seed): it restores the machine
    as it was loaded, which alone ale-py 0.12.1 does not do whole (Qbert and Tetris would go on differently:
    Farama-Foundation/Arcade-Learning-Environment#732, #739), and then presses the console's reset, which alone keeps
    memory of earlier episodes in 29 games. Both together take 4 ms and lead to the same bits. The package seeds its
    generator for sticky actions only when it loads, so those are drawn here, from the episode's generator.

    Args:
        game: such as ``"MsPacman"``.
        sticky: probability, per frame, that the console stays with the action of the frame before.
        full_actions: all 18 actions, of which those that a game does not know are no-ops; else its minimal set.
        life_loss_ends: terminate at the decision that costs a life. A reset starts a new game all the same.
        noop_max: most frames without action at the start, at least 1.
        render_mode: ``"rgb_array"`` for frames in colour, [height, 160, 3] uint8; most games have 210 lines.

    Raises:
        ModuleNotFoundError: ale-py is not installed.
        UnknownNameError: no such game.
        ValueError: a Gymnasium id, see ``rom_name``, or an option out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60 // SKIP}

    def __init__(
        self,
        game: str,
        *,
        sticky: float = 0.25,
        full_actions: bool = True,
        life_loss_ends: bool = False,
        noop_max: int = 30,
        render_mode: str | None = None,
    ) -> None:
        if not 0.0 <= sticky <= 1.0:
            raise ValueError(f"sticky is a probability, got {sticky}")
        if noop_max < 1:
            raise ValueError(f"noop_max must be at least 1, got {noop_max}")
        rom = rom_name(game)
        ale_py = _needs("ale_py")
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setInt("frame_skip", 1)
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(_needs("ale_py.roms").get_rom_path(rom))
        self._loaded = self.ale.cloneSystemState()
        self._actions = [ale_py.Action(i) for i in range(ACTIONS)] if full_actions else self.ale.getMinimalActionSet()
        self._noop = ale_py.Action.NOOP
        self._sticky, self._life_loss_ends, self._noop_max = sticky, life_loss_ends, noop_max
        self.render_mode = render_mode
        height, width = self.ale.getScreenDims()
        self._resize = AreaResize(height, width, SIZE)
        self._now, self._before = (np.empty((height, width), np.uint8) for _ in range(2))
        self._screens = np.empty((STACK, SIZE, SIZE), np.uint8)
        self.observation_space = observation_space()
        self.action_space = Discrete(len(self._actions))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        ale = self.ale
        ale.restoreSystemState(self._loaded)
        ale.reset_game()
        for _ in range(self.np_random.integers(1, self._noop_max + 1)):
            ale.act(self._noop)
        self._held, self._lives = self._noop, ale.lives()
        ale.getScreenGrayscale(self._now)
        self._resize(self._now, out=self._screens[-1])
        self._screens[:-1] = self._screens[-1]
        return self._screens.copy(), {"lives": self._lives}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        ale, wanted, reward = self.ale, self._actions[action], 0
        # The emulator stands still once the game is over, so a decision may as well play its frames to the end.
        for frame, stays in enumerate(self._stays()):
            if not stays:
                self._held = wanted
            reward += ale.act(self._held)
            if frame == SKIP - 2:
                ale.getScreenGrayscale(self._before)
        ale.getScreenGrayscale(self._now)
        np.maximum(self._now, self._before, out=self._now)
        self._screens[:-1] = self._screens[1:]
        self._resize(self._now, out=self._screens[-1])
        lives = ale.lives()
        terminated = ale.game_over() or (self._life_loss_ends and lives < self._lives)
        self._lives = lives
        return self._screens.copy(), float(reward), terminated, False, {"lives": lives}

    def render(self) -> np.ndarray:
        return self.ale.getScreenRGB()

    def _stays(self) -> Sequence[bool]:
        """For each frame of a decision, whether the console stays with the action of the frame before."""
        if self._sticky == 0.0:
            return (False,) * SKIP
        return (self.np_random.random(SKIP) < self._sticky).tolist()


def observation_space() -> Box:
    """The observation space of every game: 4 grey screens, [4, 84, 84] uint8."""
    return Box(0, 255, (STACK, SIZE, SIZE), np.uint8)


def rom_name(game: str) -> str:
    """The package's name of a game: ``"MsPacman"`` to ``"ms_pacman"``.

    Raises:
        UnknownNameError: no such game.
        ValueError: a Gymnasium id. Its environment skips frames by itself; so does this suite.
    """
    if match := _GYMNASIUM_ID.fullmatch(game):
        raise ValueError(
            f"{game!r} is a Gymnasium id, which has a frame skip of its own; the suite 'atari' already skips {SKIP} "
            f"frames, and a double frame skip is refused: ask for {match[1]!r}"
        )
    if game not in _roms():
        raise UnknownNameError("game or group of suite 'atari'", game, (*_table()["groups"], *_roms()))
    return _roms()[game]


@functools.cache
def _roms() -> Mapping[str, str]:
    """Names of the single-player games, in the spelling of Gymnasium's ids, and of their cartridges."""
    roms = _needs("ale_py.roms").get_all_rom_ids()
    return {rom.title().replace("_", ""): rom for rom in roms if rom not in _TWO_PLAYERS}


@functools.cache
def _table() -> dict[str, Any]:
    """``atari.json``: the games of every group, and (random, human) scores with their source."""
    return json.loads(resources.files("mtrl_envs").joinpath("atari.json").read_text())


def _needs(module: str) -> Any:
    return needs(module, extra="atari", suite="atari", note="licence: GPL-2.0")


@dataclass(frozen=True)
class Atari:
    """The suite ``atari``; see the module. The options are those of ``AtariGame``; ``name`` starts task names."""

    sticky: float = 0.25
    full_actions: bool = True
    life_loss_ends: bool = False
    name: str = "atari"

    @property
    def groups(self) -> Sequence[str]:
        return tuple(_table()["groups"])

    def tasks(self, group: str) -> Sequence[Task]:
        """Games of ``8``, ``26``, ``57`` or the single game of that name.

        Raises:
            ModuleNotFoundError: ale-py is not installed.
            UnknownNameError: ``group`` is neither.
            ValueError: a Gymnasium id, see ``rom_name``.
        """
        return tuple(self._task(game, rom_name(game)) for game in _table()["groups"].get(group, (group,)))

    def _task(self, game: str, rom: str) -> Task:
        # Published returns are those of whole games, not of one life.
        score = None if self.life_loss_ends else _table()["scores"].get(game)
        return Task(
            name=f"{self.name}/{game}",
            build=functools.partial(
                AtariGame,
                game,
                sticky=self.sticky,
                full_actions=self.full_actions,
                life_loss_ends=self.life_loss_ends,
            ),
            horizon=HORIZON,
            score=tuple(score) if score else (0.0, 1.0),
            score_source=_table()["score_source"] if score else "none (raw returns): no published human score",
            frames={"image": STACK},
            # The size of a minimal set is known once its cartridge is loaded: the vector builds one game to look.
            spaces=(observation_space(), Discrete(ACTIONS)) if self.full_actions else None,
            protocol={
                "ale-py": version("ale-py"),
                "rom": rom,
                "sticky": str(self.sticky),
                "actions": "full" if self.full_actions else "minimal",
                "life_loss_ends": str(self.life_loss_ends),
                "noops": "1-30",
                "frames": f"skip {SKIP}, maximum of the last 2, grey {SIZE}x{SIZE} by area, stack {STACK}",
            },
        )
