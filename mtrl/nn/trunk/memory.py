"""Memory behind any trunk, for tasks that must be remembered."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """A GRU over time whose state is cleared where an episode starts (Cho et al. 2014; gates as ``nn.GRUCell``)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.input = nn.Linear(width, 3 * out)
        self.hidden = nn.Linear(out, 3 * out)

    def forward(self, features: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Features [t, n, width], first [t, n] bool, state [n, out] -> outputs [t, n, out], last state [n, out]."""
        gates = self.input(features)  # one product for all steps; only the recurrent half is sequential
        keep = (~first).to(features.dtype)[..., None]
        outputs = []
        for now, kept in zip(gates.unbind(0), keep.unbind(0), strict=True):
            state = state * kept
            reset_x, update_x, new_x = now.chunk(3, 1)
            reset_h, update_h, new_h = self.hidden(state).chunk(3, 1)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            state = new + update * (state - new)
            outputs.append(state)
        return torch.stack(outputs), state
