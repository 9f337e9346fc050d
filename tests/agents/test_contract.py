"""Every built-in agent keeps the contract on the probe tasks."""

from __future__ import annotations

from typing import Any

import pytest

from mtrl import registry
from mtrl.testing import check_agent

CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("random", {}, ("mix", "team")),
    ("ppo", {"rollout": 8, "epochs": 1, "minibatches": 2}, ("mix", "team")),
    ("ppo", {"rollout": 8, "epochs": 1, "minibatches": 2, "chunk": 4, "memory": 8}, ("memory",)),
    ("ppo", {"rollout": 8, "epochs": 1, "minibatches": 2, "matmul": "bf16"}, ("mix", "masked")),
    ("ppo", {"rollout": 8, "epochs": 1, "minibatches": 2, "chunk": 4, "memory": 8, "matmul": "bf16"}, ("memory",)),
    ("sac", {"warmup": 4, "batch_size": 4, "capacity": 100, "log_every": 2}, ("continuous",)),
    ("sac", {"warmup": 4, "batch_size": 4, "capacity": 100, "log_every": 2, "matmul": "bf16"}, ("continuous",)),
    (
        "sac",
        {"warmup": 4, "batch_size": 4, "capacity": 100, "log_every": 2, "matmul": "bf16", "critic": "categorical"},
        ("continuous",),
    ),
    ("sb3-ppo", {"n_steps": 8, "batch_size": 8, "n_epochs": 1}, ("masked", "continuous")),
    ("sb3-sac", {"learning_starts": 4, "batch_size": 4, "buffer_size": 100}, ("continuous",)),
]


@pytest.mark.parametrize(("name", "options", "groups"), CASES)
def test_agents_keep_the_contract(name: str, options: dict[str, Any], groups: tuple[str, ...]) -> None:
    report = check_agent(registry.agent(name), options=options, groups=groups, steps=24)
    assert report.ok, report
    learning = not any(note.what.startswith("update() did not learn") for note in report.notes)
    assert learning == (name != "random"), report
