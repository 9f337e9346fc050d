"""Memory behind any trunk, for tasks that must be remembered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        peaks = out // 2
        gru = out - peaks
        self.input = nn.Linear(width, 3 * gru + peaks)
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
        with torch.autocast(read.device.type, enabled=False):
            outputs = _Remember.apply(read, first, state, self.hidden.weight, self.hidden.bias, self.keep)
        return outputs, outputs[-1]  # type: ignore[index,return-value] # apply is untyped


class _Remember(torch.autograd.Function):
    """All steps at once, and their gradient in closed form (backpropagation through time).

    A step is a dozen small operations; autograd records and runs twice as many again, and adds up the gradient of the
    weights step by step. Here only what depends on the step before is done step by step.
    """

    @staticmethod
    def forward(
        ctx: Any, read: Tensor, first: Tensor, state: Tensor, weight: Tensor, bias: Tensor, keep: Tensor
    ) -> Tensor:
        (t, n), g = first.shape, weight.shape[1]
        kept = (~first).to(read.dtype)[..., None]
        gates_x, new_x, sight = read.split((2 * g, g, read.shape[2] - 3 * g), 2)
        gates_x, sight = gates_x + torch.cat((torch.zeros_like(keep), keep)), sight.tanh()
        # Of each step: the GRU's state before it, what that says [n, 3g], gates, proposal and state after it.
        short, said, gates, new, after = (read.new_empty(t, n, size * g) for size in (1, 3, 2, 1, 1))
        (gates_h, new_h), (reset, update) = said.split((2 * g, g), 2), gates.chunk(2, 2)
        before, peaks = torch.empty_like(sight), torch.empty_like(sight)
        last, peak = state.split((g, state.shape[1] - g), 1)
        steps = (kept, short, said, gates_x, gates_h, gates, new_x, reset, new_h, new, update, after)
        for stay, s, h, x, y, xy, c, r, d, proposal, u, out in zip(*(each.unbind(0) for each in steps), strict=True):
            torch.mul(last, stay, out=s)
            torch.addmm(bias, s, weight.t(), out=h)
            torch.add(x, y, out=xy).sigmoid_()
            torch.addcmul(c, r, d, out=proposal).tanh_()
            last = torch.lerp(proposal, s, u, out=out)
        for stay, seen, old, out in zip(*(each.unbind(0) for each in (kept, sight, before, peaks)), strict=True):
            torch.mul(peak, stay, out=old)
            peak = torch.maximum(old, seen, out=out)
        ctx.save_for_backward(kept, short, gates, new, new_h, sight, before, weight)
        return torch.cat((after, peaks), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, short, gates, new, new_h, sight, before, weight = ctx.saved_tensors
        (t, n), g = kept.shape[:2], weight.shape[1]
        reset, update = gates.chunk(2, 2)
        # What one unit more of the memory after a step changes: before the tanh of the proposal and, [t, n, 3, g],
        # before the gates and in what the step heard.
        to_new = (1 - update) * (1 - new.square())
        to_reset = to_new * new_h * reset * (1 - reset)
        to_update = (short - new) * update * (1 - update)
        to_said = torch.stack((to_reset, to_update, to_new * reset), 2)
        # Where both are equal, each gets half, as torch.maximum has it.
        share = (sight > before).to(grad.dtype) + 0.5 * (sight == before).to(grad.dtype)
        through = (1 - share) * kept

        after, said = torch.empty_like(new), torch.empty_like(to_said)
        back = grad.new_zeros(n, g)
        steps = (grad[..., :g], after, to_said, said, update, kept)
        for d, total, to, h, u, stay in zip(*(each.unbind(0)[::-1] for each in steps), strict=True):
            torch.add(d, back, out=total)
            torch.mul(total[:, None], to, out=h)
            back = torch.addmm(total * u, h.flatten(1), weight).mul_(stay)
        peaks, back_peak = torch.empty_like(sight), torch.zeros_like(sight[0])
        for d, total, on in zip(*(each.unbind(0)[::-1] for each in (grad[..., g:], peaks, through)), strict=True):
            torch.add(d, back_peak, out=total)
            back_peak = total * on
        read = torch.cat((said[:, :, :2].flatten(2), after * to_new, peaks * share * (1 - sight.square())), 2)
        said = said.view(t * n, 3 * g)
        bias = said.sum(0)
        return read, None, torch.cat((back, back_peak), 1), said.t() @ short.view(t * n, g), bias, bias[g : 2 * g]
