"""Cheap teams on grids: level-based foraging (lbforaging) and the robotic warehouse (rware), as the benchmark of
Papoudakis et al. (2021, https://arxiv.org/abs/2006.07869) plays them.

``lbf`` (``Foraging-8x8-2p-2f-coop``): players with levels collect food by loading it together, if their levels suffice;
``2s`` in a name limits sight to 2 cells. ``rware`` (``rware-tiny-2ag``): robots bring requested shelves to a goal and
get the next request. Groups are ``lbf-easy``, ``lbf``, ``rware`` and ``all``. Any other id of the packages is a task by
its name, with or without the version: ``marl/Foraging-2s-15x15-4p-4f-v3``, ``marl/rware-large-8ag-hard``.

The packages report their time limit as the end of the game, and a reset of lbforaging lets players of the episode
before block cells of the new one; here a limit truncates and ``reset(seed)`` decides the episode.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import gymnasium as gym

from mtrl.registry import UnknownNameError
from mtrl.types import Task
from mtrl_envs.extras import needs

if TYPE_CHECKING:
    from mtrl_envs.marl.team import Team

Reward = Literal["sum", "own"]

_GROUPS = {
    "lbf-easy": ("Foraging-5x5-2p-1f", "Foraging-6x6-2p-2f", "Foraging-8x8-2p-2f"),
    "lbf": (
        "Foraging-8x8-2p-2f-coop",
        "Foraging-2s-8x8-2p-2f-coop",
        "Foraging-10x10-3p-3f",
        "Foraging-2s-10x10-3p-3f",
        "Foraging-15x15-3p-4f",
        "Foraging-15x15-4p-3f",
    ),
    "rware": ("rware-tiny-2ag", "rware-tiny-4ag", "rware-small-4ag"),
}
_GROUPS["all"] = tuple(name for names in _GROUPS.values() for name in names)

_PACKAGES = {"Foraging": "lbforaging", "rware": "rware"}
"""The beginning of an id, and whose it is."""

_RANDOM = {
    "Foraging-5x5-2p-1f": 0.4225,
    "Foraging-6x6-2p-2f": 0.3158,
    "Foraging-8x8-2p-2f": 0.1888,
    "Foraging-8x8-2p-2f-coop": 0.0037,
    "Foraging-2s-8x8-2p-2f-coop": 0.0037,
    "Foraging-10x10-3p-3f": 0.0970,
    "Foraging-2s-10x10-3p-3f": 0.0970,
    "Foraging-15x15-3p-4f": 0.0403,
    "Foraging-15x15-4p-3f": 0.0757,
}
_MEASURED = "0: mean team return of random actions in 400 episodes, benchmarks/scores.py"


@dataclass
class MARL:
    """The suite ``marl``; see the module.

    Args:
        reward: ``"sum"``: every player gets the team's reward, so that a return is the team's; ``"own"``: what it
        earned
            itself, so that a return is the mean over players.
        name: starts task names.
    """

    reward: Reward = "sum"
    name: str = "marl"

    @property
    def groups(self) -> Sequence[str]:
        return tuple(_GROUPS)

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of a group or of one id, with or without its version.

        Raises:
            ModuleNotFoundError: one of the packages is not installed.
            UnknownNameError: ``group`` is neither.
        """
        return tuple(self._task(name) for name in _GROUPS.get(group, (_short(group),)))

    def _task(self, name: str) -> Task:
        if name not in _ids():
            raise UnknownNameError("task or group of suite 'marl'", name, (*_GROUPS, *_ids()))
        env_id = _ids()[name]
        kwargs, package = gym.spec(env_id).kwargs, _package(name)
        foraging = package == "lbforaging"
        agents = kwargs["players" if foraging else "n_agents"]
        low, high, source = _score(name, self.reward, agents)
        return Task(
            name=f"{self.name}/{name}",
            build=functools.partial(build, env_id, self.reward),
            horizon=kwargs["max_episode_steps" if foraging else "max_steps"],
            score=(low, high),
            score_source=source,
            agents=agents,
            protocol={package: version(package), "env_id": env_id, "reward": self.reward},
        )


def build(env_id: str, reward: Reward = "sum") -> Team:
    """A PettingZoo ``ParallelEnv`` of one of the packages' ids.

    Raises:
        ModuleNotFoundError: one of the packages is not installed.
    """
    _ids()
    from mtrl_envs.marl.team import Foraging, Team, Warehouse

    return Team((Foraging if _package(env_id) == "lbforaging" else Warehouse)(env_id), reward)


def _score(name: str, reward: Reward, agents: int) -> tuple[float, float, str]:
    """Returns of random play and, for foraging, with all food collected; and where they come from."""
    if name.startswith("rware"):
        return 0.0, 1.0, "none (raw returns): one requested shelf delivered"
    share = 1.0 if reward == "sum" else 1.0 / agents
    low = _RANDOM.get(name, 0.0) * share
    source = _MEASURED if name in _RANDOM else "0: nothing collected"
    return low, share, f"{source}; 1: all food collected, the bound"


@functools.cache
def _ids() -> Mapping[str, str]:
    """Short name to Gymnasium id of every task, in the packages' order. Importing the packages registers their ids."""
    for package in ("pettingzoo", *_PACKAGES.values()):
        needs(package, extra="marl", suite="marl")
    return {_short(one): one for one in gym.registry if one.startswith(tuple(_PACKAGES))}


def _package(name: str) -> str:
    return next(package for start, package in _PACKAGES.items() if name.startswith(start))


def _short(env_id: str) -> str:
    """``rware-tiny-2ag-v2`` to ``rware-tiny-2ag``."""
    return re.sub(r"-v\d+$", "", env_id)
