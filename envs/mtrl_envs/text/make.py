"""Makes one TextWorld game: ``python -m mtrl_envs.text.make JSON`` with a challenge, settings, seed and path.

A program of its own, because what TextWorld makes of a seed depends on the order of sets of strings, which Python fixes
only for processes that are started with PYTHONHASHSEED.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

ATTEMPTS = 20


def make(challenge: str, settings: dict[str, Any], seed: int, path: str) -> None:
    """Write ``path`` (.z8) and the .json beside it.

    Some seeds give a map without a quest of the wanted length: then the next of ``ATTEMPTS`` is tried.
    """
    textworld, generator = import_module("textworld"), import_module("textworld.generator")
    _, build, _ = import_module("textworld.challenges").CHALLENGES[challenge]
    for number in range(seed * ATTEMPTS, (seed + 1) * ATTEMPTS):
        textworld.g_rng.set_seed(number)
        options = textworld.GameOptions()
        options.seeds = number
        options.path = path
        options.grammar.only_last_action = True  # the objective names the goal, not the way to it
        recipe = {"recipe_seed": number + 1} if "recipe" in settings else {}  # 0 would be the same dish every time
        try:
            game = build({**settings, **recipe}, options)
        except generator.QuestGenerationError:
            continue
        generator.compile_game(game, options)
        return
    raise RuntimeError(f"{challenge} {settings}: none of {ATTEMPTS} seeds from {seed * ATTEMPTS} on gives a game")


if __name__ == "__main__":
    make(**json.loads(sys.argv[1]))
