"""Optimiser state that survives a checkpoint bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's moments by parameter number, as nested plain data; hyperparameters belong to the config."""
    return {str(key): dict(value) for key, value in optimizer.state_dict()["state"].items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from ``optimizer_state``.

    Moments take the memory layout of their parameter: torch's fused Adam pairs the numbers of a channels-last weight
    with those of a contiguous moment by position, silently wrong (seen with torch 2.13).
    """
    moments = {int(key): value for key, value in state.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
