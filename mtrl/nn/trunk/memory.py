"""Memory behind any trunk, for tasks that must be remembered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LONGEST = 64
"""Steps: the GRU's units start with time constants spread up to about this."""


class Memory(nn.Module):
    """What was seen since the episode began, [out]: half of it a GRU, half the largest values so far.

    A GRU (Cho et al. 2014, https://arxiv.org/abs/1406.1078; gates as ``nn.GRUCell``) forgets by halves from step to
    step when it starts, and policies that explore blur it further. Two remedies: its units start with time constants
    spread from 2 to ``LONGEST`` steps (chrono initialisation, Tallec & Ollivier 2018,
    https://arxiv.org/abs/1804.11188), and beside it the maximum over time of what was seen, through which neither value
    nor gradient decays (as the aggregators of AMRL, Beck et al. 2020, https://openreview.net/forum?id=Bkl7bREtDr; here
    of the features, with the maximum's own gradient).

    ``norm`` and ``loudness`` bring what is seen and what is remembered to one scale, whatever the trunk and the widths:
    what to do often depends on both together, and a head that hardly hears one of them hardly learns that.

    Args:
        width: of the features.
        out: of what is remembered.
        learned: whether features come from layers, which can say everything at any scale; the scale of raw observations
            may mean something, and is kept.
    """

    def __init__(self, width: int, out: int, *, learned: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if learned else nn.Identity()
        self.loudness = (width / out) ** 0.5 if learned else 1.0
        self.out, self.peaks = out, out // 2
        gru = out - self.peaks
        self.input = nn.Linear(width, 3 * gru + self.peaks)
        self.hidden = nn.Linear(gru, 3 * gru)
        self.keep = nn.Parameter(torch.empty(gru).uniform_(1, LONGEST - 1).log_())

    def read(self, features: Tensor) -> Tensor:
        """Features [..., width], normalised -> what ``forward`` takes in of each row, [..., 3 * gru + peaks]."""
        read = self.input(features)
        return read.to(torch.promote_types(read.dtype, torch.float32))  # under autocast, too: rounding would add up

    def forward(self, read: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """From ``read`` [t, n, ...], first [t, n] bool, state [n, out] -> outputs [t, n, out], last state [n, out].

        The state is cleared where an episode starts.
        """
        sizes = (self.out - self.peaks, self.peaks)
        gates, seen = read.split((3 * sizes[0], self.peaks), 2)
        kept = (~first).to(read.dtype)[..., None]
        outputs = []
        for gate, sight, keep in zip(gates.unbind(0), seen.tanh().unbind(0), kept.unbind(0), strict=True):
            short, peak = (state * keep).split(sizes, 1)
            reset_x, update_x, new_x = gate.chunk(3, 1)
            reset_h, update_h, new_h = self.hidden(short).chunk(3, 1)
            update = torch.sigmoid(update_x + update_h + self.keep)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            state = torch.cat((new + update * (short - new), torch.maximum(peak, sight)), 1)
            outputs.append(state)
        return torch.stack(outputs), state
