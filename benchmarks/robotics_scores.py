"""Measures what random actions return in every task of the suite ``robotics`` and writes ``mtrl_envs/robotics.json``.

Score 0 is the mean undiscounted return of uniformly random actions over seeded episodes. Score 1 is not measured: it is
the published return of experts (D4RL, Fu et al. 2020, arXiv:2004.07219, ``d4rl/infos.py``) or a bound of the return.
Takes about 6 minutes.

    python benchmarks/robotics_scores.py [--episodes 50]
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mtrl.files import write_text
from mtrl.types import Task
from mtrl_envs.robotics import ADROIT_HORIZON, KITCHEN, Robotics

TABLE = Path(__file__).parents[1] / "envs" / "mtrl_envs" / "robotics.json"
EXPERT = {"adroit-door": 2880.57, "adroit-hammer": 12794.13, "adroit-relocate": 4233.88}
PEN = 3076.83  # in the 100 steps that D4RL's episodes of this task have
SOURCES = {
    "d4rl": "experts' mean return in D4RL (arXiv:2004.07219), whose rewards differ slightly (distance to the object)",
    "d4rl-pen": "twice the experts' mean return in D4RL (arXiv:2004.07219), whose episodes are half as long",
    "always": "bound of the return: success at every step",
    "completed": "bound of the return: every sub-task that is asked for",
}


def reference(name: str) -> tuple[float, str]:
    """The return that counts as 1, and the key of its source."""
    if name in KITCHEN:
        return float(len(KITCHEN[name])), "completed"
    if name.endswith("-sparse"):
        return 10.0 * ADROIT_HORIZON, "always"
    return (2 * PEN, "d4rl-pen") if name == "adroit-pen" else (EXPERT[name], "d4rl")


def random_returns(task: Task, episodes: int) -> np.ndarray:
    """Returns of uniformly random actions, [episodes] float64; seeds count from 0."""
    env, found = task.build(), np.zeros(episodes)
    for seed in range(episodes):
        env.reset(seed=seed)
        env.action_space.seed(seed)
        for _ in range(task.horizon):
            _, reward, terminated, _, _ = env.step(env.action_space.sample())
            found[seed] += reward
            if terminated:
                break
    env.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50)
    episodes = parser.parse_args().episodes
    rows = []
    for task in Robotics().tasks("all"):
        name = task.name.partition("/")[2]
        returns = random_returns(task, episodes)
        rows.append(f'    "{name}": {json.dumps([round(float(returns.mean()), 3), *reference(name)])}')
        error = returns.std(ddof=1) / np.sqrt(episodes)
        print(f"{name:24s} {returns.mean():10.3f} +- {error:.3f} (standard error)", flush=True)
    random = (
        f"mean return of random actions, {episodes} episodes (seeds 0-{episodes - 1}), gymnasium-robotics "
        f"{version('gymnasium-robotics')}; benchmarks/robotics_scores.py"
    )
    scores = ",\n".join(rows)
    sources = json.dumps(SOURCES, indent=2).replace("\n", "\n  ")
    text = f'{{\n  "scores": {{\n{scores}\n  }},\n  "random": {json.dumps(random)},\n  "sources": {sources}\n}}\n'
    json.loads(text)
    write_text(TABLE, text)


if __name__ == "__main__":
    main()
