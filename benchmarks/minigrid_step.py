"""Microseconds per MiniGrid step: the package as ``gym.make`` gives it, its bare class, and mtrl's adapter.

    python benchmarks/minigrid_step.py [--tasks mt7 BabyAI-GoToRedBall] [--steps 2000] [--rounds 5]

All three play the same seeded episodes with the same random actions and must collect the same reward. Rounds are
interleaved, so that a slow moment of the machine hits all alike; the median round counts. Resets are not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import gymnasium as gym
import numpy as np

from mtrl.types import Task
from mtrl_envs.minigrid import MiniGrid, make_stock

DEFAULT = ["mt7", "Dynamic-Obstacles-8x8", "KeyCorridorS6R3", "BabyAI-GoToRedBall", "BabyAI-BossLevel"]


def play(env: Any, steps: int, seed: int) -> tuple[float, float]:
    """(seconds inside ``step``, sum of rewards) of ``steps`` random steps."""
    actions = np.random.default_rng(seed).integers(env.action_space.n, size=steps).tolist()
    env.reset(seed=seed)
    spent, total = 0.0, 0.0
    for action in actions:
        start = time.perf_counter()
        _, reward, terminated, truncated, _ = env.step(action)
        spent += time.perf_counter() - start
        total += float(reward)
        if terminated or truncated:
            seed += 1
            env.reset(seed=seed)
    return spent, total


def measure(task: Task, steps: int, rounds: int) -> list[float]:
    """Median microseconds per step of (gym.make, bare class, adapter)."""
    env_id = task.protocol["env_id"]
    envs = [gym.make(env_id), make_stock(env_id), task.build()]
    for env in envs:
        play(env, 200, seed=0)  # fills caches
    results = [[play(env, steps, seed) for env in envs] for seed in range(rounds)]
    for row in results:
        assert len({total for _, total in row}) == 1, f"{task.name}: rewards differ: {row}"
    return [statistics.median(row[i][0] for row in results) / steps * 1e6 for i in range(len(envs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=DEFAULT, help="groups or names of the suite minigrid")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{'task':40}{'gym.make':>10}{'class':>10}{'adapter':>10}{'class / adapter':>17}")
    ratios = []
    for task in (task for group in args.tasks for task in MiniGrid().tasks(group)):
        made, bare, adapter = measure(task, args.steps, args.rounds)
        ratios.append(bare / adapter)
        print(f"{task.name:40}{made:10.1f}{bare:10.1f}{adapter:10.1f}{bare / adapter:16.1f}x", flush=True)
    print(f"median {statistics.median(ratios):.1f}x")


if __name__ == "__main__":
    main()
