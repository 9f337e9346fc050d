"""The random agent: legal, within bounds, uniform, resumable."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete

from mtrl.types import Group, Layout, Obs, Spec, TaskInfo
from mtrl_agents.random import Random

LEGAL: Any = Box(0, 1, (4,), np.bool_)  # pyright: ignore[reportCallIssue, reportArgumentType]
SPEC = Spec(
    (TaskInfo("a/x", "a", 5), TaskInfo("b/y", "b", 5)),
    (
        Group(
            "a",
            {"vector": Box(-1, 1, (2,)), "legal": LEGAL},
            Discrete(4),
            (0,),
        ),
        Group(
            "b", {"vector": Box(-1, 1, (3,))}, Box(np.array([-2, 5], np.float32), np.array([-1, 7], np.float32)), (1,)
        ),
    ),
)
N = 3000
LAYOUT = Layout({"a": slice(0, N), "b": slice(N, 2 * N)}, 2 * N)


def obs() -> Obs:
    legal = np.tile([True, False, True, False], (N, 1))
    leaves = {
        "a": {"vector": np.zeros((N, 2), np.float32), "legal": legal},
        "b": {"vector": np.zeros((N, 3), np.float32)},
    }
    return Obs(leaves, np.repeat([0, 1], N), np.ones(2 * N, bool))


def test_actions_are_legal_within_bounds_and_uniform() -> None:
    action = Random(SPEC, Random.Config(), seed=1).actor(LAYOUT, explore=True)(obs()).action
    assert action["a"].dtype == np.int64
    assert set(action["a"]) == {0, 2}
    assert abs((action["a"] == 0).mean() - 0.5) < 0.05
    assert action["b"].dtype == np.float32
    assert action["b"].shape == (N, 2)
    assert SPEC.groups[1].action.contains(action["b"].min(0))
    assert SPEC.groups[1].action.contains(action["b"].max(0))
    np.testing.assert_allclose(action["b"].mean(0), [-1.5, 6.0], atol=0.05)


def test_a_loaded_actor_continues_the_same_stream() -> None:
    agent = Random(SPEC, Random.Config(), seed=1)
    actor = agent.actor(LAYOUT, explore=True)
    actor(obs())
    other = agent.actor(LAYOUT, explore=False)
    other.load_state_dict(actor.state_dict())
    mine, theirs = actor(obs()).action, other(obs()).action
    for group in mine:
        np.testing.assert_array_equal(mine[group], theirs[group])
