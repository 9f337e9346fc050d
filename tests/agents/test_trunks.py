"""Every trunk serves every agent that has a trunk."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from mtrl.nn.trunk.config import Kind
from mtrl.spaces import make_spec
from mtrl.testing import Probes, drive
from mtrl_agents.ppo import PPO
from mtrl_agents.sac import SAC
from tests.trunks import small


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    ("agent_class", "options", "group"),
    [
        (PPO, {"rollout": 4, "epochs": 1, "minibatches": 2, "head": ()}, "mix"),
        (PPO, {"rollout": 4, "epochs": 1, "minibatches": 2, "head": (), "memory": 4}, "mix"),
        (SAC, {"warmup": 2, "batch_size": 4, "capacity": 50, "log_every": 1}, "continuous"),
    ],
    ids=["ppo", "ppo with memory", "sac"],
)
def test_agents_take_any_trunk(kind: str, agent_class: Any, options: dict[str, Any], group: str) -> None:
    options = {**options, "trunk": small(kind, 16)}
    if kind == "paco":  # refused with a memory: see test_what_would_do_nothing_is_refused
        options.pop("memory", None)
    tasks = Probes().tasks(group)
    agent = agent_class(make_spec(tasks), agent_class.Config(**options), seed=0)
    before = {name: p.clone() for name, p in agent.policy.named_parameters()}
    for _ in drive(agent, tasks, 10, copies=2):
        pass
    moved = [name for name, p in agent.policy.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 2
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())
