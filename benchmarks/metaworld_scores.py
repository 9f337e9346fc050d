"""Measures the score scale of every MetaWorld task and writes it into ``mtrl_envs/metaworld.json``.

Score 0 is the mean undiscounted return of uniformly random actions, score 1 that of the package's scripted policy,
which keeps acting after success. Both over the same seeded episodes of the default suite (50 goals, reward v2). The
shorter horizons that papers use (150: MOORE, 200: BRC) are prefixes of the same episodes. Takes about 5 minutes.

    python benchmarks/metaworld_scores.py [--episodes 10]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np

from mtrl_envs.metaworld import MetaWorld

HORIZONS = (150, 200, 500)


def rewards(env: gym.Env, act: Callable[[np.ndarray], np.ndarray], seed: int) -> np.ndarray:
    """Rewards of one episode, [horizon] float64."""
    obs, _ = env.reset(seed=seed)
    found = []
    truncated = False
    while not truncated:
        obs, reward, _, truncated, _ = env.step(act(obs))
        found.append(reward)
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10)
    episodes = parser.parse_args().episodes
    path = Path(str(resources.files("mtrl_envs").joinpath("metaworld.json")))
    table = json.loads(path.read_text())
    suite = MetaWorld()
    for task in suite.tasks("mt50"):
        name = task.name.removeprefix("metaworld/")
        env = task.build()
        expert = suite.expert(name)
        means = []
        for policy in ("random", "expert"):
            runs = []
            for seed in range(episodes):
                rng = np.random.default_rng(seed)
                act = expert if policy == "expert" else lambda _, rng=rng: rng.uniform(-1, 1, 4).astype(np.float32)
                runs.append(np.cumsum(rewards(env, act, seed)))
            means.append(np.mean(runs, axis=0))
        env.close()
        score = {str(h): [round(float(mean[h - 1]), 2) for mean in means] for h in HORIZONS}
        table["tasks"][name]["score"] = score
        print(f"{name:32s}", *(f"{h}: {low:8.1f} {high:8.1f}" for h, (low, high) in score.items()), flush=True)
    table["score_source"] = (
        f"mean return of random actions and of the scripted policy, {episodes} episodes (seeds 0-{episodes - 1}), "
        f"metaworld {version('metaworld')}, reward v2, 50 goals; benchmarks/metaworld_scores.py"
    )
    path.write_text(dump(table))


def dump(table: dict) -> str:
    """The table as JSON with one line per group and per task."""
    parts = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
