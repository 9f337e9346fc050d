"""Trunks know the task exactly when they say so; the memory equals torch's GRU and forgets at episode starts."""

from __future__ import annotations

import torch
from torch import nn

from mtrl.nn.trunk import Memory, TrunkConfig, make_trunk


def test_the_shared_trunk_tells_tasks_apart_and_the_multi_head_trunk_does_not() -> None:
    x = torch.randn(1, 6).repeat(2, 1)
    task = torch.tensor([0, 2])
    shared = make_trunk(TrunkConfig(kind="shared", widths=(8,)), 6, 3)
    multi = make_trunk(TrunkConfig(kind="multi_head", widths=(8,)), 6, 3)
    assert (shared.per_task, multi.per_task) == (False, True)
    assert shared(x, task).shape == multi(x, task).shape == (2, 8)
    assert not torch.allclose(*shared(x, task))
    torch.testing.assert_close(*multi(x, task))


def test_without_layers_a_trunk_hands_on_the_latents() -> None:
    x, task = torch.randn(2, 6), torch.tensor([0, 2])
    multi, shared = (make_trunk(TrunkConfig(kind=kind), 6, 3) for kind in ("multi_head", "shared"))  # type: ignore[arg-type]
    torch.testing.assert_close(multi(x, task), x)
    torch.testing.assert_close(shared(x, task), torch.cat((x, torch.tensor([[1.0, 0, 0], [0, 0, 1]])), 1))
    assert (multi.out, shared.out) == (6, 9)


def test_the_memory_equals_the_gru_of_torch_between_resets() -> None:
    memory, gru = Memory(3, 5), nn.GRUCell(3, 5)
    gru.load_state_dict(
        {
            "weight_ih": memory.input.weight,
            "bias_ih": memory.input.bias,
            "weight_hh": memory.hidden.weight,
            "bias_hh": memory.hidden.bias,
        }
    )
    x, state = torch.randn(6, 2, 3), torch.randn(2, 5)
    first = torch.zeros(6, 2, dtype=torch.bool)
    first[3, 0] = first[0, 1] = True
    out, last = memory(x, first, state)
    for t in range(6):
        state = gru(x[t], torch.where(first[t][:, None], torch.zeros(()), state))
        torch.testing.assert_close(out[t], state)
    torch.testing.assert_close(last, state)
