"""Which of a run's settings its results depend on, and where two runs' differ in these."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mtrl.config import ConfigError, parse_config

# Fields of a run that its results do not depend on; on the device only as on the machine, by rounding.
FREE = ("seed", "log", "checkpoint", "workers", "patience", "device", "agent.cuda_graph")


def essential(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the fields in ``FREE``."""
    kept = copy.deepcopy(dict(config))
    for place in FREE:
        *above, last = place.split(".")
        holder: Any = kept
        for key in above:
            holder = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(holder, dict):  # a spec may say ``agent: random``
            holder.pop(last, None)
    return kept


def changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Places where settings differ that results depend on. Older ones lack newer fields: the schema says what they
    meant."""
    if essential(ours) == essential(theirs):
        return []
    return [place for place, a, b in leaves(_whole(ours), _whole(theirs)) if a != b]


def _whole(settings: Mapping[str, Any]) -> dict[str, Any]:
    return essential(completed(settings))


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of fields that were not there when the settings were written."""
    try:
        return parse_config(settings).model_dump(mode="json")
    except ConfigError:  # an agent that is not installed here
        return dict(settings)


def leaves(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Two trees of settings side by side: (dotted place, old, new) of every leaf that is in one of them."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from leaves(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
    else:
        yield place, old, new
