"""Unit types, maps and rules of the battles; all numbers are SMAX 0.2.0's (https://arxiv.org/abs/2311.10090,
Apache-2.0).

A map's name says its teams: ``3s5z_vs_3s6z`` is 3 stalkers and 5 zealots against 3 stalkers and 6 zealots, ``3m`` is 3
marines on each side, ``smacv2_5_units`` draws 5 units and their places anew in every battle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mtrl.registry import UnknownNameError
from mtrl.types import Array

HORIZON = 100
"""Steps after which a battle is truncated."""
MAX_TEAM = 100


class UnitType(NamedTuple):
    """Lengths in map units (the map is 32 x 32), times in seconds (a step is half a second)."""

    name: str
    letters: str  # in the names of maps
    velocity: float
    damage: float
    range: float
    sight: float
    radius: float
    health: float
    cooldown: float


TYPES = (
    UnitType("marine", "m", 3.15, 9, 5, 9, 0.375, 45, 0.61),
    UnitType("marauder", "M", 2.25, 10, 6, 10, 0.5625, 125, 1.07),
    UnitType("stalker", "s", 4.13, 13, 6, 10, 0.625, 160, 1.87),
    UnitType("zealot", "z", 3.15, 8, 2, 9, 0.5, 150, 0.86),
    UnitType("zergling", "zg", 4.13, 5, 2, 8, 0.375, 35, 0.5),
    UnitType("hydralisk", "h", 3.15, 12, 5, 9, 0.625, 80, 0.59),
)


def stats() -> Array:
    """[6, 7] float32: velocity, damage, range, sight, radius, health, cooldown of every type."""
    return np.array([one[2:] for one in TYPES], np.float32)


class Rules(NamedTuple):
    """What may differ between variants of the game; the defaults are SMAX's.

    Attributes:
        walls_cause_death: a unit that touches the border of the map dies.
        see_enemy_actions: observations show the last moves and attacks of visible enemies too.
        enemy_shoots: false makes the scripted enemies walk about without ever attacking.
        enemy_random_target: they pick a random target in range instead of the closest one.
    """

    walls_cause_death: bool = True
    see_enemy_actions: bool = True
    enemy_shoots: bool = True
    enemy_random_target: bool = False


@dataclass(frozen=True)
class Scenario:
    """A map. ``allies`` and ``enemies`` are indices into ``TYPES``, in the order of the units. ``random`` (SMACv2):
    only their lengths count, types and places are drawn at every reset."""

    name: str
    allies: tuple[int, ...]
    enemies: tuple[int, ...]
    random: bool = False


NAMED = (
    "3m",
    "8m",
    "25m",
    "2s3z",
    "3s5z",
    "5m_vs_6m",
    "10m_vs_11m",
    "27m_vs_30m",
    "3s5z_vs_3s6z",
    "3s_vs_5z",
    "6h_vs_8z",
    "smacv2_5_units",
    "smacv2_10_units",
    "smacv2_20_units",
)
"""The maps of SMAX."""

# The task sets of ODIS (https://openreview.net/forum?id=53FyUAdP7d): (train, test), in its order.
_ODIS = {
    "marine-easy": (("3m", "5m", "10m"), tuple(f"{n}m" for n in range(3, 13))),
    "marine-hard": (
        ("3m", "5m_vs_6m", "9m_vs_10m"),
        (
            *("3m", "4m", "5m", "10m", "12m", "5m_vs_6m", "7m_vs_8m", "8m_vs_9m"),
            *("9m_vs_10m", "10m_vs_11m", "10m_vs_12m", "13m_vs_15m"),
        ),
    ),
    "stalker-zealot": (
        ("2s3z", "2s4z", "3s5z"),
        (
            *("1s3z", "1s4z", "1s5z", "2s3z", "2s4z", "2s5z", "3s3z", "3s4z", "3s5z"),
            *("4s3z", "4s4z", "4s5z", "4s6z"),
        ),
    ),
}


def groups() -> Mapping[str, Sequence[str]]:
    """Names of maps by group: ``all`` of SMAX's; for each set of ODIS ``-train``, ``-test`` (which repeats the training
    maps, as published) and ``-heldout`` (the test maps that are not trained on)."""
    found: dict[str, Sequence[str]] = {"all": NAMED}
    for name, (train, test) in _ODIS.items():
        found[f"{name}-train"] = train
        found[f"{name}-test"] = test
        found[f"{name}-heldout"] = tuple(one for one in test if one not in train)
    return found


_PART = re.compile(r"([1-9]\d*)(zg|[mMszh])")
_TEAM = re.compile(rf"(?:{_PART.pattern})+")
_SMACV2 = re.compile(r"smacv2_([1-9]\d*)_units")


def parse(name: str) -> Scenario:
    """The map called ``name``: ``<number><letters>...`` with an optional ``_vs_<number><letters>...``, or
    ``smacv2_<number>_units``. Letters: m marine, M marauder, s stalker, z zealot, zg zergling, h hydralisk.

    Raises:
        UnknownNameError: the name does not follow this pattern, or a team has more than 100 units.
    """
    smacv2 = _SMACV2.fullmatch(name)
    if smacv2 and int(smacv2[1]) <= MAX_TEAM:
        units = (0,) * int(smacv2[1])
        return Scenario(name, units, units, random=True)
    allies, versus, enemies = name.partition("_vs_")
    teams = [_team(allies), _team(enemies if versus else allies)]
    if not all(0 < len(team) <= MAX_TEAM for team in teams):
        choices = (*groups(), *NAMED)
        hint = "- or name any teams, as in 4m, 2s4z, 3h_vs_4z (letters: " + ", ".join(
            f"{one.letters} {one.name}" for one in TYPES
        )
        raise UnknownNameError("task or group of suite 'smac'", name, choices, f"{hint}; at most {MAX_TEAM} a side)")
    return Scenario(name, teams[0], teams[1])


def _team(text: str) -> tuple[int, ...]:
    """Types of one team's units; empty if ``text`` is no team."""
    if not _TEAM.fullmatch(text):
        return ()
    index = {one.letters: i for i, one in enumerate(TYPES)}
    parts = [(min(int(count), MAX_TEAM + 1), index[letters]) for count, letters in _PART.findall(text)]
    return tuple(kind for count, kind in parts for _ in range(count))
