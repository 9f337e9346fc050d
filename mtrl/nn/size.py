"""Numbers of parameters: counted, and made equal so that networks are compared at the same size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers in ``module``, each counted once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def networks(agent: object) -> dict[str, nn.Module]:
    """The networks that an agent holds as attributes and trains: {"policy": ..., ...}.

    Frozen networks (targets) and parts of others are left out.
    """
    found = {name: value for name, value in vars(agent).items() if isinstance(value, nn.Module)}
    inner = {id(part) for net in found.values() for part in net.modules() if part is not net}
    return {name: net for name, net in found.items() if id(net) not in inner and count_parameters(net)}


def network_sizes(agent: object) -> dict[str, int]:
    """Trainable numbers in each of an agent's ``networks``: {"policy": 417403, ...}."""
    return {name: count_parameters(net) for name, net in networks(agent).items()}


def match_width(build: Callable[[int], nn.Module], target: int) -> int:
    """The width whose network comes closest to ``target`` parameters.

    Networks are built without memory or random numbers, so this takes milliseconds.

    Args:
        build: a network of that width; more width must mean more parameters.
        target: count to match.

    Raises:
        ValueError: even width 1 has more than twice as many.
    """

    def size(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(build(width))

    if size(1) > 2 * target:
        raise ValueError(f"the narrowest network has {size(1)} parameters already; {target} are asked for")
    high = 1
    while size(high) < target:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < target else (low, middle)
    return min((width for width in (low, high) if width), key=lambda width: abs(size(width) - target))
