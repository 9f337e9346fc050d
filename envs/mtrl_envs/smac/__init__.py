"""Team battles after SMAC (Samvelyan et al. 2019, https://arxiv.org/abs/1902.04043) by the rules of SMAX (Rutherford et
al. 2023, https://arxiv.org/abs/2311.10090), as a suite of teams; ``docs/battles.md`` states the rules.

Groups are ``all`` (the maps of SMAX) and the task sets of ODIS (Zhang et al., ICLR 2023) for transfer to team sizes
that were never trained on: ``marine-easy``, ``marine-hard`` and ``stalker-zealot``, each as ``-train``, ``-test`` (with
the training maps, as published) and ``-heldout`` (without them). Any teams can be named: ``4m``, ``3h_vs_4z``.

Listing tasks imports neither numba nor PettingZoo; building them needs ``pip install "mtrl-suite[smac]"``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from mtrl.types import Task
from mtrl_envs.extras import needs
from mtrl_envs.smac.scenarios import HORIZON, Rules, Scenario, groups, parse

if TYPE_CHECKING:
    from mtrl_envs.smac.battle import Battles
    from mtrl_envs.smac.env import BattleEnv

__all__ = ["SMAC", "Rules"]

VERSION = "smax-0.2.0/1"
"""Of the rules: whose they are, and the revision of their implementation here. Part of every result."""


def _check_extra() -> None:
    for package in ("numba", "pettingzoo"):
        needs(package, extra="smac", suite="smac")


def build(name: str, rules: Rules = Rules(), render_mode: str | None = None) -> BattleEnv:  # noqa: B008 - frozen
    """A PettingZoo ``ParallelEnv`` of the map called ``name``.

    Raises:
        ModuleNotFoundError: the extra ``smac`` is not installed.
    """
    _check_extra()
    from mtrl_envs.smac.env import BattleEnv

    return BattleEnv(parse(name), rules, render_mode=render_mode)


@dataclass(frozen=True)
class BattleMaker:
    """``Task.batch`` of all maps with these rules; equal by value, so that tasks of several suites share a batch."""

    rules: Rules

    def __call__(self, tasks: Sequence[Task], slots: int) -> Battles:
        return SMAC(self.rules).batch(tasks, slots)


class SMAC:
    """The suite ``smac``; see the module.

    Args:
        rules: variants of the game, for all maps.
    """

    name = "smac"
    groups = tuple(groups())

    def __init__(self, rules: Rules = Rules()) -> None:  # noqa: B008 - frozen
        self.rules = rules

    def tasks(self, group: str) -> Sequence[Task]:
        """Tasks of a group or of one map.

        Raises:
            UnknownNameError: ``group`` is neither and names no teams.
        """
        return tuple(self._task(parse(name)) for name in groups().get(group, (group,)))

    def batch(self, tasks: Sequence[Task], slots: int) -> Battles:
        """The batch face: ``slots`` battles stepped together; ``reset`` chooses each one's map among ``tasks``.

        Raises:
            ModuleNotFoundError: the extra ``smac`` is not installed.
            ValueError: tasks whose teams differ in size.
        """
        _check_extra()
        from mtrl_envs.smac.battle import Battles

        return Battles([parse(task.name.partition("/")[2]) for task in tasks], slots, self.rules)

    @staticmethod
    def expert(task: str) -> Callable[[BattleEnv, Any], Mapping[str, int]]:
        """The enemies' scripted policy, mirrored: called with (environment, observations) it gives all allies' actions.

        Raises:
            UnknownNameError: no such map.
        """
        parse(task.removeprefix("smac/"))
        return _scripted

    def _task(self, scenario: Scenario) -> Task:
        measured = _scores().get(scenario.name) if self.rules == Rules() else None
        return Task(
            name=f"smac/{scenario.name}",
            build=functools.partial(build, scenario.name, self.rules),
            horizon=HORIZON,
            score=(measured["random"], measured["scripted"]) if measured else (0.0, 2.0),
            score_source=_MEASURED if measured else "bounds of the return: nobody hurt, every enemy dead",
            agents=len(scenario.allies),
            shared_reward=True,
            protocol={"rules": VERSION, "map": scenario.name} | {k: str(v) for k, v in self.rules._asdict().items()},
            batch=BattleMaker(self.rules),
        )


_MEASURED = "mean returns of random legal actions and of the scripted policy, benchmarks/battles.py --scores"


def _scripted(env: BattleEnv, obs: Any) -> Mapping[str, int]:
    return env.script()


@functools.cache
def _scores() -> Mapping[str, Mapping[str, float]]:
    return json.loads(files("mtrl_envs.smac").joinpath("scores.json").read_text())["maps"]
