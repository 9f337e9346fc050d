"""MiniGrid and BabyAI (Chevalier-Boisvert et al., 2023, https://minigrid.farama.org) as a suite of small, partially
observed, sparsely rewarded tasks.

Groups are the three multi-task sets of MOORE (Hendawy et al., ICLR 2024; ``mt3``, ``mt5``, ``mt7`` in its order) and
``babyai``, every BabyAI level. Single tasks are asked for by id (``MiniGrid-DoorKey-6x6-v0``) or short name
(``DoorKey-6x6``, ``BabyAI-GoToRedBall``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box, Discrete
from minigrid.core.actions import Actions
from minigrid.envs.babyai.core import roomgrid_level
from minigrid.utils.baby_ai_bot import BabyAIBot

from mtrl.registry import UnknownNameError
from mtrl.types import Task
from mtrl_envs.minigrid_view import EXACT_VERSIONS, FastView

log = logging.getLogger(__name__)

_MOORE = {
    "mt3": ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11"),
    "mt5": ("DoorKey-6x6", "LavaGapS7", "RedBlueDoors-6x6", "DistShift1", "MemoryS11"),
    "mt7": (
        "DoorKey-6x6",
        "DistShift1",
        "RedBlueDoors-6x6",
        "LavaGapS7",
        "MemoryS11",
        "SimpleCrossingS9N2",
        "MultiRoom-N2-S4",
    ),
}
"""MOORE's task lists, in the order of its code: MemoryS11 plays pickup as toggle, which minigrid does by itself."""

_BEST = {
    "DoorKey-6x6": 0.9725,
    "DistShift1": 0.9607,
    "RedBlueDoors-6x6": 0.9900,
    "LavaGapS7": 0.9633,
    "MemoryS11": 0.9777,
    "SimpleCrossingS9N2": 0.9583,
    "MultiRoom-N2-S4": 0.8875,
}
_BEST_SOURCE = "best returns of 'Sparsity-Driven Plasticity in Multi-Task RL' (TMLR 2025); 0 is no success"

TOKENS = 64
"""Length of the ``tokens`` leaf. BossLevel's missions have up to about 40 words; its grammar's longest sentence, 72,
needs eight objects "in front of you" and is not met in practice."""

# Every word that a mission of minigrid 3.2.0 can hold. Append only: a word's position is its id.
_VOCABULARY = """
    a after and at avoid ball behind blue box door end fetch find from front get go goal green grey hallway in key lava
    left matching must near next object of on open opening pick purple put reach red right room rooms square the then to
    traverse unlock up use yellow you your
"""
WORDS = tuple(_VOCABULARY.split())
_IDS = {word: index for index, word in enumerate(WORDS, start=1)}


def encode_mission(mission: str) -> np.ndarray:
    """Word ids of a mission, [64] int32, padded with 0. Case and punctuation are dropped.

    Raises:
        ValueError: a word outside ``WORDS`` or more than 64 words.
    """
    words = mission.lower().replace(",", " ").replace(".", " ").split()
    if len(words) > TOKENS:
        raise ValueError(f"mission of {len(words)} words; the tokens leaf holds {TOKENS}: {mission!r}")
    tokens = np.zeros(TOKENS, np.int32)
    for place, word in enumerate(words):
        if word not in _IDS:
            raise ValueError(
                f"word {word!r} of mission {mission!r} is not in mtrl_envs.minigrid.WORDS: append it there"
            )
        tokens[place] = _IDS[word]
    return tokens


def decode_tokens(tokens: np.ndarray) -> str:
    """The words behind ``tokens`` [64]: the mission in lower case, without punctuation."""
    return " ".join(WORDS[token - 1] for token in tokens if token > 0)


class MiniGridAdapter(gym.Env[Any, Any]):
    """One MiniGrid or BabyAI environment as the leaves of the contract.

    Observation: ``image`` [3, 7, 7] uint8 of ids (object 0-10, colour 0-5, state 0-2; channel, column, row),
    ``direction`` [4] float32 one-hot and, where the mission varies between episodes, ``tokens`` [64] int32.
    ``info["success"]`` is true at the terminating step that pays. Truncation is the environment's own (its
    ``max_steps``, which also scales the reward); a step that does both counts as terminated.

    Args:
        env_id: a Gymnasium id such as ``"MiniGrid-DoorKey-6x6-v0"``.
        fast: observe through ``FastView``: the same bits, several times sooner. Off for versions of minigrid that it
            was not compared with.
        render_mode: ``"rgb_array"`` for frames.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, env_id: str, *, fast: bool = True, render_mode: str | None = None) -> None:
        self.stock = make_stock(env_id, render_mode)
        self.render_mode = render_mode
        self._has_tokens = mission_varies(self.stock)
        self.observation_space = observation_space(self._has_tokens)
        self.action_space = self.stock.action_space
        self._view = FastView(self.stock) if fast and _fast_is_exact() else None
        if self._view is not None:
            self.stock.gen_obs = self._view.gen_obs
        self._tokens: np.ndarray | None = None  # of the running episode, if the mission varies

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        if self._view is not None:
            self._view.clear()
        obs, _ = self.stock.reset(seed=seed, options=options)
        if self._has_tokens:
            self._tokens = encode_mission(self.stock.mission)
        return self._leaves(obs), {"success": False}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = self.stock.step(action)
        success = bool(terminated and reward > 0)
        return self._leaves(obs), float(reward), bool(terminated), truncated and not terminated, {"success": success}

    def render(self) -> Any:
        return self.stock.render()

    def close(self) -> None:
        self.stock.close()

    def _leaves(self, obs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        leaves = {"image": obs["image"].transpose(2, 0, 1), "direction": _ONE_HOT[obs["direction"]].copy()}
        if self._tokens is not None:
            leaves["tokens"] = self._tokens.copy()
        return leaves


_ONE_HOT = np.eye(4, dtype=np.float32)
_MAX_ID = np.array([10, 5, 2], np.uint8)  # object, colour, state


def observation_space(has_tokens: bool) -> gym.spaces.Dict:
    """The adapter's observation space, with or without the mission's ``tokens``."""
    high = np.broadcast_to(_MAX_ID[:, None, None], (3, 7, 7))
    leaves: dict[str, gym.Space[Any]] = {
        "image": Box(np.zeros_like(high), high.copy(), dtype=np.uint8),
        "direction": Box(0, 1, (4,), np.float32),
    }
    if has_tokens:
        leaves["tokens"] = Box(0, len(WORDS), (TOKENS,), np.int32)
    return gym.spaces.Dict(leaves)


def make_stock(env_id: str, render_mode: str | None = None) -> Any:
    """The package's own environment, without the wrappers of ``gym.make``: its checkers cost time at every step."""
    _quiet_babyai()
    spec = gym.spec(env_id)
    assert isinstance(spec.entry_point, str), f"{env_id} is registered without a named entry point"
    return load_env_creator(spec.entry_point)(**spec.kwargs, render_mode=render_mode)


def mission_varies(stock: Any) -> bool:
    """Whether the mission text can differ between episodes: BabyAI, and missions with placeholders."""
    return isinstance(stock, roomgrid_level.RoomGridLevel) or bool(
        stock.observation_space["mission"].ordered_placeholders
    )


@functools.cache
def _quiet_babyai() -> None:
    """Send what BabyAI prints while it draws a mission ("Sampling rejected: ...") to this module's log.

    A name in the module that prints hides the builtin there and nowhere else; swapping ``sys.stdout`` would also hit
    other threads, such as a live display.
    """
    module: Any = roomgrid_level
    module.print = lambda *parts: log.debug(" ".join(map(str, parts)))


@functools.cache
def _fast_is_exact() -> bool:
    installed = version("minigrid")
    if installed in EXACT_VERSIONS:
        return True
    log.warning(
        "minigrid %s was not compared with the fast observation (known: %s): using the package's own, several times "
        "slower",
        installed,
        ", ".join(EXACT_VERSIONS),
    )
    return False


@functools.cache
def _ids() -> Mapping[str, str]:
    """Short name to Gymnasium id of every usable task, in the package's order."""
    ids = [one for one in gym.registry if one.startswith(("MiniGrid-", "BabyAI-"))]
    return {_short(one): one for one in ids if not one.startswith("MiniGrid-WFC-")}


def _short(env_id: str) -> str:
    """``MiniGrid-LavaGapS7-v0`` to ``LavaGapS7``; BabyAI keeps its prefix since both have, say, ``Unlock``."""
    return env_id.removeprefix("MiniGrid-").removesuffix("-v0")


# Levels whose max_steps follows the drawn instruction: (navigations of the longest instruction) x (steps to cross the
# maze), RoomGridLevel.reset. A sequence joins at most two pairs of actions, and PutNext counts as two navigations.
_NAVIGATIONS = {
    "BabyAI-GoToSeq": 4,
    "BabyAI-GoToSeqS5R2": 4,
    "BabyAI-Synth": 2,
    "BabyAI-SynthS5R2": 2,
    "BabyAI-SynthLoc": 2,
    "BabyAI-SynthSeq": 8,
    "BabyAI-MiniBossLevel": 8,
    "BabyAI-BossLevel": 8,
    "BabyAI-BossLevelNoUnlock": 8,
}


@functools.cache
def _facts(name: str) -> tuple[int, bool, int]:
    """(horizon, whether there are tokens, number of actions) of a task, read off one instance (about 1 ms)."""
    stock = make_stock(_ids()[name])
    if name in _NAVIGATIONS:
        horizon = _NAVIGATIONS[name] * stock.room_size**2 * stock.num_rows * stock.num_cols
    else:
        stock.reset(seed=0)  # BabyAI sets max_steps here
        horizon = stock.max_steps
    return horizon, mission_varies(stock), int(stock.action_space.n)


class MiniGrid:
    """The suite ``minigrid``; see the module.

    Args:
        fast: see ``MiniGridAdapter``.
    """

    name = "minigrid"
    groups = (*_MOORE, "babyai")

    def __init__(self, fast: bool = True) -> None:
        self.fast = fast

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of ``mt3``, ``mt5``, ``mt7``, ``babyai`` or of one id or short name.

        Raises:
            UnknownNameError: ``group`` is none of these.
            ValueError: one of the WFC ids, which cannot be built.
        """
        if group in _MOORE:
            return tuple(self._task(name) for name in _MOORE[group])
        if group == "babyai":
            return tuple(self._task(name) for name in _ids() if name.startswith("BabyAI-"))
        return (self._task(_resolve(group, self.groups)),)

    @staticmethod
    def expert(task: str, limit: int = 500) -> BotExpert:
        """BabyAI's bot for one environment of a BabyAI level: called with (environment, observation), it gives the
        action. It solves 89 of the 96 levels in five episodes of five.

        Args:
            task: a task name, short name or id.
            limit: steps of an episode after which it answers ``done`` without planning, since the bot can get lost
                in searches that take seconds per step (UnlockToUnlock).

        Raises:
            UnknownNameError: no such task.
            ValueError: a task that the bot cannot play.
        """
        name = _resolve(task.removeprefix("minigrid/"), ())
        if not name.startswith("BabyAI-"):
            raise ValueError(f"no expert for {name!r}: BabyAI's bot needs the instructions of a BabyAI level")
        if name in _BOT_FAILS:
            raise ValueError(f"no expert for {name!r}: the bot fails in each of {', '.join(_BOT_FAILS)}")
        return BotExpert(limit)

    def _task(self, name: str) -> Task:
        env_id = _ids()[name]
        horizon, has_tokens, num_actions = _facts(name)
        return Task(
            name=f"minigrid/{name}",
            build=functools.partial(MiniGridAdapter, env_id, fast=self.fast),
            horizon=horizon,
            score=(0.0, _BEST.get(name, 1.0)),
            score_source=_BEST_SOURCE if name in _BEST else "0 is no success, 1 the upper bound of the reward",
            spaces=(observation_space(has_tokens), Discrete(num_actions)),
            protocol={"minigrid": version("minigrid"), "env_id": env_id},
        )


def _resolve(given: str, groups: Sequence[str]) -> str:
    """The short name behind a short name or id."""
    name = _short(given)
    if name.startswith("WFC-"):
        raise ValueError(
            f"{given!r} cannot be built: the pattern images that the MiniGrid-WFC ids read are missing from the "
            "minigrid wheel"
        )
    if name not in _ids():
        raise UnknownNameError("task or group of suite 'minigrid'", given, (*groups, *_ids()))
    return name


_BOT_FAILS = (
    "BabyAI-KeyInBox",
    "BabyAI-PutNextS5N2Carrying",
    "BabyAI-PutNextS6N3Carrying",
    "BabyAI-PutNextS7N4Carrying",
)
"""Levels that upstream lists as beyond the bot."""


class BotExpert:
    """BabyAI's bot (``minigrid.utils.baby_ai_bot``) as a policy for one environment; it starts anew at each episode.

    It plans on the environment itself, with what the agent has seen so far, hence needs it in the same process.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._bot: Any = None

    def __call__(self, env: gym.Env[Any, Any], obs: Any) -> int:
        """The action for the current state of ``env``, a (wrapped) ``MiniGridAdapter``; ``obs`` is not read."""
        adapter = env.unwrapped
        assert isinstance(adapter, MiniGridAdapter), f"the expert plays MiniGridAdapter, got {adapter}"
        if self._bot is None or adapter.stock.step_count == 0:
            self._bot = BabyAIBot(adapter.stock)
        if adapter.stock.step_count >= self.limit:
            return int(Actions.done)
        return int(self._bot.replan())
