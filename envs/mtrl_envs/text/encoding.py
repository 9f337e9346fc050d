"""Text to token ids, and a changing list of commands to a fixed number of actions.

**Words.** A word is a run of letters, digits and apostrophes, with hyphens inside, in lower case. Its id is
``1 + crc32(word) % 8191``: no vocabulary to keep, the same in every process and game, words never seen included. The
price is collisions: of 500 words about 15 pairs share an id. 0 is padding.

**Places.** ``tokens`` is ``[TEXT + commands * COMMAND]``. Its first ``TEXT`` places are four sections, each padded to
its own length: the objective, what the last command did, the room, what the player carries. Then come ``COMMAND``
places for each action: the words of the command that it stands for now, zeros if it stands for none. So a network that
wants to read commands slices ``tokens[:, TEXT:].reshape(n, commands, COMMAND)``.

**Actions.** A command takes the action ``crc32(command) % commands``, or the next free one, commands in alphabetical
order. So a command keeps its action as long as no other lies in its way: "go east" is nearly always the same action, in
every room and game, and a network that ignores the order of tokens (the default of ``PerceptionConfig``) can still
learn what an action does. With 30 of 96 actions in use, about one command in seven is displaced.

**Limits.** A section or command that is longer than its place is cut; ``info["cut_words"]`` counts the words that an
observation lacks. More commands than actions are an error: none is dropped silently, since it might be the one that
wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

IDS = 8191
"""Ids of words are 1..IDS."""

SECTIONS = {"objective": 32, "feedback": 96, "room": 192, "inventory": 64}
"""Words that each section of the text holds. Longest seen in TextWorld's games: 26, 66, 201 and 38."""

TEXT = sum(SECTIONS.values())
COMMAND = 6
"""Words that are shown of a command."""

_WORD = re.compile(r"[a-z0-9']+(?:-[a-z0-9']+)*")


class Scene(NamedTuple):
    """What a game shows after a command.

    Attributes:
        text: one string for each of ``SECTIONS``.
        commands: what may be entered now.
        score: points so far.
        won: the game is over and won.
        lost: the game is over and not won.
    """

    text: tuple[str, str, str, str]
    commands: Sequence[str]
    score: float
    won: bool
    lost: bool


class Encoded(NamedTuple):
    """``tokens`` [TEXT + commands * COMMAND] int32, ``legal`` [commands] int8, the command of each action ("" for
    none), and how many words were cut."""

    tokens: np.ndarray
    legal: np.ndarray
    table: list[str]
    cut: int


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


@lru_cache(maxsize=65536)
def word_id(word: str) -> int:
    """The id of a word in lower case, 1..IDS."""
    return 1 + crc32(word.encode()) % IDS


def place(commands: Iterable[str], actions: int) -> list[str]:
    """The command of each of ``actions`` actions, "" for none.

    Raises:
        ValueError: more commands than actions.
    """
    distinct = sorted(set(commands))
    if len(distinct) > actions:
        raise ValueError(
            f"{len(distinct)} commands are possible and there are {actions} actions: make the suite with "
            f"commands={2 * actions}"
        )
    table = [""] * actions
    for command in distinct:
        action = crc32(command.encode()) % actions
        while table[action]:
            action = (action + 1) % actions
        table[action] = command
    return table


def observation_space(actions: int) -> gym.spaces.Dict:
    """``tokens`` and ``legal``; see the module."""
    return gym.spaces.Dict(
        {"tokens": Box(0, IDS, (TEXT + actions * COMMAND,), np.int32), "legal": Box(0, 1, (actions,), np.int8)}
    )


def encode(scene: Scene, actions: int) -> Encoded:
    """Lay a scene into arrays.

    Raises:
        ValueError: more commands than actions.
    """
    table = place(scene.commands, actions)
    tokens = np.zeros(TEXT + actions * COMMAND, np.int32)
    start = cut = 0
    for text, room in (*zip(scene.text, SECTIONS.values(), strict=True), *((command, COMMAND) for command in table)):
        if text:
            ids = [word_id(word) for word in words(text)]
            cut += max(0, len(ids) - room)
            tokens[start : start + min(room, len(ids))] = ids[:room]
        start += room
    return Encoded(tokens, np.array([bool(command) for command in table], np.int8), table, cut)
