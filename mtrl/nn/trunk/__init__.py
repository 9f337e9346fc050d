"""Trunks: latents [n, width] of any group and the rows' tasks [n] -> features [n, D].

A trunk is chosen by the one field ``kind``. All have ``out`` (D) and ``per_task`` (does every task need a head of its
own, or does the trunk already tell the head which task it is?). Agents never learn which trunk they hold.
"""

from __future__ import annotations

from collections.abc import Callable

from mtrl.nn.perception import View
from mtrl.nn.trunk.config import TrunkConfig
from mtrl.nn.trunk.context import CareTrunk, FilmTrunk
from mtrl.nn.trunk.memory import Memory
from mtrl.nn.trunk.mixture import MixtureTrunk
from mtrl.nn.trunk.paco import PacoTrunk
from mtrl.nn.trunk.plain import MultiHeadTrunk, SharedTrunk, SingleHeadTrunk
from mtrl.nn.trunk.soft_modules import SoftModulesTrunk
from mtrl.nn.trunk.topk import TopKTrunk

__all__ = ["Memory", "Trunk", "TrunkConfig", "make_trunk"]

Trunk = (
    SharedTrunk
    | SingleHeadTrunk
    | MultiHeadTrunk
    | MixtureTrunk
    | TopKTrunk
    | SoftModulesTrunk
    | CareTrunk
    | PacoTrunk
    | FilmTrunk
)

TRUNKS: dict[str, Callable[[TrunkConfig, int, int], Trunk]] = {
    "shared": SharedTrunk,
    "single_head": SingleHeadTrunk,
    "multi_head": MultiHeadTrunk,
    "moe_topk": TopKTrunk,
    "soft_modules": SoftModulesTrunk,
    "care": CareTrunk,
    "paco": PacoTrunk,
    "film": FilmTrunk,
}


def make_trunk(config: TrunkConfig, width: int, num_tasks: int, view: View | None = None) -> Trunk:
    """The trunk that ``config.kind`` names, for latents of ``width`` and task ids below ``num_tasks``.

    ``view`` is ``Perception.view``: where the latents hold a picture as it came, if they do.
    """
    if config.kind in ("moe", "moore"):
        return MixtureTrunk(config, width, num_tasks, view, orthogonal=config.kind == "moore")
    return TRUNKS[config.kind](config, width, num_tasks)
