"""Optimiser state: a restored optimiser takes the very same steps."""

from __future__ import annotations

import pytest
import torch

from mtrl.nn.optim import load_optimizer_state, optimizer_state


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_restored_adam_steps_alike(fused: bool, layout: torch.memory_format) -> None:
    torch.manual_seed(0)

    def gradient() -> torch.Tensor:
        return torch.randn(4, 3, 2, 2).contiguous(memory_format=layout)

    one = torch.nn.Parameter(gradient())
    first = torch.optim.Adam([one], lr=0.1, fused=fused)
    for _ in range(3):
        one.grad = gradient()
        first.step()
    two = torch.nn.Parameter(one.detach().clone())
    second = torch.optim.Adam([two], lr=0.1, fused=fused)
    # A checkpoint stores every tensor contiguously.
    stored = {
        key: {name: value.clone().contiguous() for name, value in values.items()}
        for key, values in optimizer_state(first).items()
    }
    load_optimizer_state(second, stored)
    for _ in range(3):
        one.grad = gradient()
        two.grad = one.grad.clone()
        first.step()
        second.step()
        assert torch.equal(one, two)
