"""Networks that follow others slowly: target critics, and the policy that acts when nothing is to be explored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn

_PREFIX = "average."
Net = TypeVar("Net", bound=nn.Module)


def follow(slow: nn.Module, fast: nn.Module, share: float) -> None:
    """Move ``slow``'s parameters towards ``fast``'s by this share of the way."""
    with torch.no_grad():  # or they would remember every update in an ever longer graph
        torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), share)


class Average(Generic[Net]):
    """A network and its exponential moving average over updates, as DDPG's and TD3's target policy is one.

    After a step, a policy fits the batch of that step: an actor that learns on as it acts corrects itself within an
    episode, one that is only looked at does not. The average lies in the middle of the ground that steps wander over
    (Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; Izmailov et al. 2018, https://arxiv.org/abs/1803.05407).

    Args:
        net: learns.
        share: of itself that the average keeps at every update; 0: it is ``net``.

    Attributes:
        slow: the average.
    """

    def __init__(self, net: Net, share: float) -> None:
        self.net, self.share = net, share
        self.slow: Net = copy.deepcopy(net).requires_grad_(False) if share else net

    def restart(self) -> None:
        """Begin the average anew, with ``net`` as it is."""
        self.slow.load_state_dict(self.net.state_dict())

    def follow(self) -> None:
        """To be called after every update."""
        if self.share:
            follow(self.slow, self.net, 1 - self.share)

    def state_dict(self) -> dict[str, Any]:
        """That of ``net``, and the average under names of its own."""
        slow = self.slow.state_dict() if self.share else {}
        return {**self.net.state_dict(), **{f"{_PREFIX}{name}": value for name, value in slow.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.net.load_state_dict({name: value for name, value in state.items() if not name.startswith(_PREFIX)})
        if self.share:
            self.slow.load_state_dict({name: state[_PREFIX + name] for name in self.slow.state_dict()})
