"""The best, the worst and the last finished training episode of every task, to be watched later.

An episode is (task, seed, actions), so keeping one costs as much as its actions. They are part of the checkpoint, and
``episodes.json`` in the run's folder is written with it::

    {"metaworld/reach-v3": {"best": {"step": ..., "seed": ..., "return": ..., "actions": [[...], ...], ...}, ...}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtrl.files import write_text
from mtrl.types import Array, Episode, Journal, Spec

KINDS = ("best", "worst", "last")


class Highlight(NamedTuple):
    """A training episode and the environment step at which it ended."""

    episode: Episode
    step: int


class Highlights:
    """Of episodes with equal returns, the first one stays the best or the worst."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._kept: list[dict[str, Highlight]] = [{} for _ in spec.tasks]

    def add(self, episode: Episode, step: int) -> None:
        """Look at an episode that has just finished."""
        mine, new = self._kept[episode.task], Highlight(episode, step)
        if not mine or episode.ret > mine["best"].episode.ret:
            mine["best"] = new
        if "worst" not in mine or episode.ret < mine["worst"].episode.ret:
            mine["worst"] = new
        mine["last"] = new

    def of(self, task: str) -> Mapping[str, Highlight]:
        """The task's episodes by ``KINDS``; empty if it has finished none."""
        return self._kept[[info.name for info in self._spec.tasks].index(task)]

    def write(self, path: Path) -> None:
        """Write them as JSON, atomically."""
        tasks = {
            task: {kind: {**one, "actions": one["actions"].tolist()} for kind, one in mine.items()}
            for task, mine in self.state_dict().items()
        }
        write_text(path, json.dumps(tasks, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path, spec: Spec) -> Highlights:
        """What ``write`` wrote, bit for bit."""
        found = cls(spec)
        found.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain data and arrays."""
        return {
            info.name: {kind: _plain(one) for kind, one in mine.items()}
            for info, mine in zip(self._spec.tasks, self._kept, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; tasks that it lacks have finished no episode."""
        for task, (info, mine) in enumerate(zip(self._spec.tasks, self._kept, strict=True)):
            mine.clear()
            dtype = np.float32 if self._spec.group(info.group).action.shape else np.int64
            for kind, one in state.get(info.name, {}).items():
                mine[kind] = _highlight(task, info.name, one, np.asarray(one["actions"], dtype))


def _plain(kept: Highlight) -> dict[str, Any]:
    episode = kept.episode
    return {
        "step": kept.step,
        "slot": episode.slot,
        "index": episode.index,
        "seed": episode.seed,
        "return": episode.ret,
        "length": episode.length,
        "success": episode.success,
        "success_last": episode.success_last,
        "terminated": episode.terminated,
        "actions": episode.journal.actions,
    }


def _highlight(task: int, name: str, one: Mapping[str, Any], actions: Array) -> Highlight:
    episode = Episode(
        task=task,
        slot=one["slot"],
        index=one["index"],
        seed=one["seed"],
        ret=one["return"],
        length=one["length"],
        success=one["success"],
        success_last=one["success_last"],
        terminated=one["terminated"],
        journal=Journal(name, one["seed"], actions),
    )
    return Highlight(episode, one["step"])
