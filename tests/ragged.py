"""A small problem for SAC whose two groups have nothing in common."""

from __future__ import annotations

import numpy as np
from gymnasium.spaces import Box

from mtrl.types import Actor, Decision, Group, Layout, Obs, Spec, Step, TaskInfo
from mtrl_agents.sac import SAC


def ragged_spec() -> Spec:
    """Two continuous groups whose observations, actions and bounds all differ; their tasks interleave."""
    wide = Box(np.array([0.0, -4.0], np.float32), np.array([5.0, 2.0], np.float32))
    groups = (
        Group("arm", {"vector": Box(-1.0, 1.0, (3,), np.float32)}, wide, (0, 2)),
        Group("eye", {"image": Box(0, 255, (3, 8, 8), np.uint8)}, Box(-1.0, 1.0, (1,), np.float32), (1,)),
    )
    infos = tuple(TaskInfo(f"probe/{i}", name, 5) for i, name in enumerate(("arm", "eye", "arm")))
    return Spec(infos, groups)


RAGGED_LAYOUT = Layout({"arm": slice(0, 2), "eye": slice(2, 3)}, 3)


def ragged_obs(rng: np.random.Generator) -> Obs:
    leaves = {
        "arm": {"vector": rng.normal(size=(2, 3)).astype(np.float32)},
        "eye": {"image": rng.integers(0, 256, (1, 3, 8, 8), np.uint8)},
    }
    return Obs(leaves, np.array([0, 2, 1]), np.zeros(3, bool))


def ragged_run(agent: SAC, actor: Actor, steps: int, seed: int = 0, terminated: bool = False) -> list[Decision]:
    """Feed the agent random observations, with its own decisions and reward 1."""
    rng = np.random.default_rng(seed)
    decisions = []
    obs = ragged_obs(rng)
    for _ in range(steps):
        decisions.append(actor(obs))
        agent.update()
        following = ragged_obs(rng)
        ends, no = np.full(3, terminated), np.zeros(3, bool)
        agent.observe(Step(obs, decisions[-1], np.ones(3), ends, ~ends, no, following, np.ones(3, bool)))
        obs = following
    return decisions
