"""Comparisons that say where: values against their space, and recorded episodes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


def outside(space: gym.Space[Any], value: Any, where: str) -> str | None:
    """Why ``value`` is not in ``space``, naming the place, or None if it is."""
    if isinstance(space, gym.spaces.Dict):
        if not isinstance(value, Mapping) or set(value) != set(space.spaces):
            found = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            return f"{where} has {found}, the space has {sorted(space.spaces)}"
        reasons = (outside(inner, value[key], f"{where}[{key!r}]") for key, inner in space.spaces.items())
        return next((reason for reason in reasons if reason is not None), None)
    if not isinstance(space, Box):
        return None if space.contains(value) else f"{where} = {value!r} is not in {space}"
    if not isinstance(value, np.ndarray | np.generic):
        return f"{where} is a {type(value).__name__}, not a numpy array"
    if value.shape != space.shape:
        return f"{where} has shape {value.shape}, the space {space.shape}"
    if not np.can_cast(value.dtype, space.dtype):
        return f"{where} is {value.dtype}, the space {space.dtype}"
    bad = np.argwhere(~((value >= space.low) & (value <= space.high)))  # also true for NaN
    if not len(bad):
        return None
    at = tuple(int(i) for i in bad[0])
    bounds = f"[{space.low[at]}, {space.high[at]}]"
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return f"{where}{list(at) if at else ''} = {np.asarray(value)[at]} is not in {bounds}{more}"


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two nested values are not bit-equal, or None. Lists are episodes: step by step."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if set(a) != set(b):
            return f"{where}: keys {sorted(a)} and {sorted(b)}"
        return next((d for key in a if (d := difference(a[key], b[key], f"{where}[{key!r}]"))), None)
    if isinstance(a, list):
        for number, pair in enumerate(zip(a, b, strict=False)):
            found = difference(*pair, where="reset(), observation" if number == 0 else f"step {number}")
            if found:
                return found
        return None if len(a) == len(b) else f"the episode's length, {len(a) - 1} and {len(b) - 1} steps"
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        parts = ("observation", "reward", "terminated", "truncated", "success") if len(a) == 5 else range(len(a))
        found = (difference(x, y, f"{where}, {part}") for part, x, y in zip(parts, a, b, strict=True))
        return next((d for d in found if d), None)
    if isinstance(a, np.ndarray | np.generic) or isinstance(b, np.ndarray | np.generic):
        x, y = np.asarray(a), np.asarray(b)
        if x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes():
            return None
        if x.shape != y.shape:
            return f"{where}: shapes {x.shape} and {y.shape}"
        at = tuple(int(i) for i in np.argwhere(x != y)[0]) if (x != y).any() else ()
        return f"{where}{list(at) if at else ''}: {x[at]} and {y[at]}"
    same = a == b or (a != a and b != b)
    return None if type(a) is type(b) and same else f"{where}: {a!r} and {b!r}"
