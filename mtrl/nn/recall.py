"""Acting on views that came before: what a network said about them is looked up until it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtrl.nn.actor_critic import SMALL, Lookup, Rows
from mtrl.types import Group

MOST = 8192
"""Rows that are remembered; with more, all are forgotten."""


class Recall:
    """The features of rows that one version of a network has seen so far, by their bits.

    A policy stands still between two updates, and in a grid world most views of these steps come again: of the 6000
    rows of a rollout of PPO on minigrid/mt3, about 500 differ.

    Args:
        groups: whose rows will come; unless all of them show small pictures, nothing is remembered.
        device: where the network is; on others than the CPU nothing is remembered.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self._pays = device.type == "cpu" and all(_small_picture(group) for group in groups)
        self._version = 0
        self._place: dict[bytes, int] = {}
        self._table = torch.empty(0, 0)

    def lookup(self, version: int) -> Lookup | None:
        """How to find features of this version of the network, or None if they are best computed."""
        self._follow(version)
        return self._features if self._pays else None

    def state_dict(self, version: int) -> dict[str, Any]:
        """What is remembered of ``version``."""
        self._follow(version)
        keys = list(self._place)
        return {
            "keys": np.frombuffer(b"".join(keys), np.uint8).copy(),
            "lengths": np.array([len(key) for key in keys], np.int64),
            "table": self._table[: len(keys)].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        """Remember it as of ``version``, which the same network may count otherwise."""
        self._version = version
        data, ends = np.asarray(state["keys"]).tobytes(), np.cumsum(state["lengths"]).tolist()
        starts = [0, *ends[:-1]]
        self._place = {data[a:b]: i for i, (a, b) in enumerate(zip(starts, ends, strict=False))}
        self._table = state["table"].cpu().clone()

    def _follow(self, version: int) -> None:
        if version != self._version:
            self._version, self._place = version, {}

    def _features(self, rows: Rows, compute: Callable[[Rows], Tensor]) -> Tensor:
        """Features [1, n, D] of one step's rows; ``compute`` makes those [1, m, D] of rows not seen yet."""
        if len(self._place) > MOST:
            self._place = {}
        place, start, known = self._place, 0, len(self._place)
        found: list[int] = []
        new: list[int] = []
        picked: dict[str, list[int]] = {}
        for group, leaves in rows.leaves.items():
            flat = [x[0].flatten(1) if x.ndim > 2 else x[0, :, None] for x in leaves.values()]  # alive is a number
            bits = [x.contiguous().view(torch.uint8) for x in flat]
            task = rows.task[0, start : start + len(bits[0])]
            table = torch.cat([task[:, None].view(torch.uint8), *bits], 1).numpy()
            data, width = table.tobytes(), table.shape[1]
            for row in range(len(table)):
                key = data[row * width : (row + 1) * width]
                if key not in place:
                    place[key] = len(place)
                    picked.setdefault(group, []).append(row)
                    new.append(start + row)
                found.append(place[key])
            start += len(table)
        if new:
            leaves = {g: {leaf: x[:, at] for leaf, x in rows.leaves[g].items()} for g, at in picked.items()}
            features = compute(Rows(leaves, rows.task[:, new], rows.first[:, new]))[0]
            if known == 0:
                self._table = features[:0]
            if len(place) > len(self._table):
                grown = features.new_empty(2 * len(place), features.shape[1])
                grown[:known] = self._table[:known]
                self._table = grown
            self._table[known : len(place)] = features
        return self._table[found][None]


def _small_picture(group: Group) -> bool:
    size = sum(int(np.prod(box.shape)) for box in group.leaves.values())
    return "image" in group.leaves and size <= SMALL
