"""What a critic says about a whole rollout: the values to bootstrap from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtrl.nn.actor_critic import Body, ValueNet, fold, to_rows
from mtrl.nn.heads import Shared
from mtrl.rollout import Rollout, Successors
from mtrl.types import Array

BLOCK = 2048
"""Rows in one forward pass: bounds the memory that a rollout of pictures takes."""


class Judged(NamedTuple):
    """``value`` [t, n] float64 of the stored observations, and ``end_value`` [m] of those whose value does not stand
    one step later: what transition (``end_t[i]``, ``end_row[i]``) led to. ``memory`` [t, n, H] is the critic's before
    each step, ``memory_after`` [n, H] behind the last; None without one."""

    value: Array
    end_t: Array
    end_row: Array
    end_value: Array
    memory: Tensor | None
    memory_after: Tensor | None


@torch.no_grad()
def judge_rollout(
    critic: ValueNet, body: Body, roll: Rollout, memory: Tensor | None, device: torch.device | str
) -> Judged:
    """One pass over a full rollout.

    Args:
        body: the critic's, or the policy's if they share one.
        memory: [n, H] before the first step; None for a body without memory, which computes repeated rows once.
    """
    out, states = list[Tensor](), list[Tensor]()
    state, n = memory, roll.task.shape[1]
    block = max(1, BLOCK // n)
    for start in range(0, roll.length, block):
        at = slice(start, start + block)
        leaves = {group: {leaf: x[at] for leaf, x in own.items()} for group, own in roll.leaves.items()}
        rows, before = to_rows(leaves, roll.task[at], roll.first[at], device), state
        folded = fold(rows) if before is None else None
        unique = rows if folded is None else folded.rows
        features, state = body(unique, state)
        values = critic(features, unique)
        out.append(values if folded is None else values[0][folded.place])
        if before is not None and body.memory is not None:
            heard = features.rest if isinstance(features, Shared) else features[..., -before.shape[1] :]
            states.append(torch.cat((before[None], heard[:-1] / body.memory.loudness)))
    value, stored = torch.cat(out).double().cpu().numpy(), torch.cat(states) if states else None
    ends = roll.successors()
    return Judged(value, ends.t, ends.row, _end_values(critic, body, roll, ends, stored, device), stored, state)


def _end_values(
    critic: ValueNet, body: Body, roll: Rollout, ends: Successors, stored: Tensor | None, device: torch.device | str
) -> Array:
    """Values [m] of the observations behind truncations and behind the last step."""
    parts, start = [np.zeros(0)], 0
    for group, leaves in ends.leaves.items():
        m = len(next(iter(leaves.values())))
        t, row = ends.t[start : start + m], ends.row[start : start + m]
        start += m
        task, memory = roll.task[t, row][None], None
        if stored is not None:
            # The memory before a successor is the one after its predecessor: one step further than the stored one.
            local = row - roll.rows[group].start
            before = {group: {leaf: x[t, local][None] for leaf, x in roll.leaves[group].items()}}
            memory = body(to_rows(before, task, roll.first[t, row][None], device), stored[t, row])[1]
        found = {group: {leaf: x[None] for leaf, x in leaves.items()}}
        rows = to_rows(found, task, np.zeros((1, m), bool), device)
        parts.append(critic(body(rows, memory)[0], rows)[0].double().cpu().numpy())
    return np.concatenate(parts)
