"""Mean returns of random legal actions, and of the expert where a suite has one, for every task of a mix.

What ``Task.score`` of the suites ``text`` and ``marl`` was measured with, random and expert over the same episodes.

    python benchmarks/scores.py text/all [--episodes 40]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from mtrl import registry
from mtrl.types import Task

Act = Callable[[Any, Any, np.random.Generator], Any]


def random_action(env: Any, obs: Any, rng: np.random.Generator) -> Any:
    """One of the legal actions, or for each agent any action."""
    if hasattr(env, "possible_agents"):
        return {agent: int(rng.integers(env.action_space(agent).n)) for agent in env.agents}
    return int(rng.choice(np.flatnonzero(obs["legal"])))


def play(task: Task, env: Any, seed: int, act: Act) -> tuple[float, float]:
    """Return (a team's: mean over agents) and success of one episode."""
    rng, ret, success = np.random.default_rng(seed), 0.0, False
    obs, _ = env.reset(seed=seed)
    for _ in range(task.horizon):
        obs, reward, terminated, _, info = env.step(act(env, obs, rng))
        team = isinstance(reward, dict)
        ret += float(np.mean(list(reward.values()))) if team else reward
        success |= any(one.get("success", False) for one in (info.values() if team else [info]))
        if np.any(list(terminated.values()) if team else terminated):
            break
    return ret, float(success)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mix", help="such as text/all")
    parser.add_argument("--episodes", type=int, default=40)
    args = parser.parse_args()
    for part in args.mix.split("+"):
        suite = registry.suite(part.partition("/")[0])
        for task in registry.tasks(part):
            env = task.build()
            policies: dict[str, Act] = {"random": random_action}
            if hasattr(suite, "expert"):
                expert = suite.expert(task.name)  # type: ignore[attr-defined]
                policies["expert"] = lambda env, obs, _, expert=expert: expert(env, obs)
            for name, act in policies.items():
                runs = np.array([play(task, env, seed, act) for seed in range(args.episodes)])
                print(
                    f"{task.name:36s} {name:8s} return {runs[:, 0].mean():.4f} success {runs[:, 1].mean():.3f}",
                    flush=True,
                )
            env.close()


if __name__ == "__main__":
    main()
