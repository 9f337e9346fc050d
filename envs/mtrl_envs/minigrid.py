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

from mtrl.registry import UnknownNameError
from mtrl.types import Task

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
"""Length of the ``tokens`` leaf; the longest missions (BossLevel) have about 40 words."""

# Every word that a mission of minigrid 3.2.0 can hold, taken from its sources. Append only: the position is the id.
WORDS = tuple(
    """
    a after and at avoid back ball behind blue box can character corner cross direction door end find first front fetch
    get go goal green grey hallway in it key lava left locked match matching must near next north object of on one open
    opening or pick purple put rainbow red right room solve square tag the then through to toggle towards traverse turn
    unlock up wall walls with yellow you your yellows
    """.split()
)
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


class MiniGridAdapter(gym.Env[dict[str, np.ndarray], int]):
    """One MiniGrid or BabyAI environment as the leaves of the contract.

    Observation: ``image`` [3, 7, 7] uint8 of ids (object 0-10, colour 0-5, state 0-2), ``direction`` [4] float32
    one-hot and, where the mission varies between episodes, ``tokens`` [64] int32. ``info["success"]`` is true at the
    terminating step that pays. Truncation is the environment's own (its ``max_steps``, which also scales the reward).

    Args:
        env_id: a Gymnasium id such as ``"MiniGrid-DoorKey-6x6-v0"``.
        render_mode: ``"rgb_array"`` for frames.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, env_id: str, render_mode: str | None = None) -> None:
        self.stock = make_stock(env_id, render_mode)
        self.render_mode = render_mode
        self.has_tokens = mission_varies(self.stock)
        self.observation_space = observation_space(self.has_tokens)
        self.action_space = self.stock.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        obs, _ = self.stock.reset(seed=seed, options=options)
        self._tokens = encode_mission(self.stock.mission) if self.has_tokens else None
        return self._leaves(obs), {"success": False}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = self.stock.step(int(action))
        return self._leaves(obs), float(reward), terminated, truncated, {"success": terminated and reward > 0}

    def render(self) -> Any:
        return self.stock.render()

    def close(self) -> None:
        self.stock.close()

    def _leaves(self, obs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        leaves = {"image": obs["image"].transpose(2, 0, 1), "direction": _ONE_HOT[int(obs["direction"])]}
        if self._tokens is not None:
            leaves["tokens"] = self._tokens
        return leaves


_ONE_HOT = np.eye(4, dtype=np.float32)
_ONE_HOT.flags.writeable = False
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
    _import_minigrid()
    spec = gym.spec(env_id)
    entry = spec.entry_point
    make = load_env_creator(entry) if isinstance(entry, str) else entry
    assert make is not None, f"{env_id} is registered without an entry point"
    return make(**spec.kwargs, render_mode=render_mode)


def mission_varies(stock: Any) -> bool:
    """Whether the mission text can differ between episodes: BabyAI, and missions with placeholders."""
    return hasattr(stock, "gen_mission") or bool(stock.observation_space["mission"].ordered_placeholders)


@functools.cache
def _import_minigrid() -> None:
    """Register minigrid's ids and send what BabyAI prints while it draws a mission to this module's log."""
    import minigrid  # noqa: F401 (registers the ids)
    from minigrid.envs.babyai.core import roomgrid_level

    # A module-level name hides the builtin for that module alone; redirecting sys.stdout would hit other threads.
    vars(roomgrid_level)["print"] = lambda *parts: log.debug(" ".join(map(str, parts)))


@functools.cache
def _ids() -> Mapping[str, str]:
    """Short name to Gymnasium id of every usable task, in the package's order."""
    _import_minigrid()
    ids = [one for one in gym.registry if one.startswith(("MiniGrid-", "BabyAI-"))]
    return {_short(one): one for one in ids if not one.startswith("MiniGrid-WFC-")}


def _short(env_id: str) -> str:
    """``MiniGrid-LavaGapS7-v0`` to ``LavaGapS7``; BabyAI keeps its prefix since both have, say, ``Unlock``."""
    return env_id.removeprefix("MiniGrid-").removesuffix("-v0")


@functools.cache
def _facts(env_id: str) -> tuple[int, bool, int]:
    """(horizon, whether there are tokens, number of actions) of an id, read off one instance."""
    stock = make_stock(env_id)
    if stock.max_steps == 0:  # BabyAI sets it at reset
        stock.reset(seed=0)
    horizon = _NAVIGATIONS.get(_short(env_id), 0) * getattr(stock, "room_size", 0) ** 2
    horizon *= getattr(stock, "num_rows", 0) * getattr(stock, "num_cols", 0)
    return max(horizon, stock.max_steps), mission_varies(stock), int(stock.action_space.n)


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


class MiniGrid:
    """The suite ``minigrid``; see the module."""

    name = "minigrid"
    groups = (*_MOORE, "babyai")

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of ``mt3``, ``mt5``, ``mt7``, ``babyai`` or of one id or short name.

        Raises:
            UnknownNameError: ``group`` is none of these.
            ValueError: one of the WFC ids, which cannot be built.
        """
        if group in _MOORE:
            return tuple(_task(name) for name in _MOORE[group])
        ids = _ids()
        if group == "babyai":
            return tuple(_task(name) for name in ids if name.startswith("BabyAI-"))
        if group.removeprefix("MiniGrid-").startswith("WFC-"):
            raise ValueError(
                f"{group!r} cannot be built: the pattern images that the MiniGrid-WFC ids read are missing from the "
                "minigrid wheel (FileNotFoundError)"
            )
        name = _short(group)
        if name not in ids:
            raise UnknownNameError("task or group of suite 'minigrid'", group, (*self.groups, *ids))
        return (_task(name),)


def _task(name: str) -> Task:
    env_id = _ids()[name]
    horizon, has_tokens, num_actions = _facts(env_id)
    return Task(
        name=f"minigrid/{name}",
        build=functools.partial(MiniGridAdapter, env_id),
        horizon=horizon,
        score=(0.0, _BEST.get(name, 1.0)),
        score_source=_BEST_SOURCE if name in _BEST else "0 is no success, 1 the bound of the reward",
        spaces=(observation_space(has_tokens), Discrete(num_actions)),
        protocol={"minigrid": version("minigrid"), "env_id": env_id},
    )
