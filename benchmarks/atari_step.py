"""CPU microseconds per Atari decision and per seeded reset: Gymnasium's standard stack, the emulator alone, and mtrl.

    python benchmarks/atari_step.py [--games Pong Breakout ...] [--steps 1000] [--rounds 5] [--grey]

The peer is ``gym.make`` without frame skip, ``AtariPreprocessing`` (it needs opencv-python) and
``FrameStackObservation``; with ``--grey`` its environment makes grey screens only, which is faster. The emulator alone
plays four frames and no picture is taken: no Python environment can be faster. All play the same random actions of the
full set without stickiness, one process, one thread; rounds are interleaved and the median counts. Peer and mtrl must
collect the same rewards.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib import import_module
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np

from mtrl_envs.atari import SKIP, STACK, AtariGame

DEFAULT = ["Pong", "MsPacman", "Seaquest", "Boxing", "Alien", "ChopperCommand", "Hero", "RoadRunner"]


class Emulator:
    """Four frames per decision and nothing else."""

    def __init__(self, ours: AtariGame) -> None:
        self._ours, self._actions = ours, [ale_py.Action(i) for i in range(18)]

    def reset(self, *, seed: int) -> None:
        self._ours.reset(seed=seed)

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        act, held, reward = self._ours.ale.act, self._actions[action], 0
        for _ in range(SKIP):
            reward += act(held)
        return None, float(reward), self._ours.ale.game_over(), False, {}


def make_peer(game: str, grey: bool) -> Any:
    kind: dict[str, Any] = {"obs_type": "grayscale"} if grey else {}
    stock = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=True, **kind)
    return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(stock, noop_max=1), STACK)


def play(env: Any, steps: int, seed: int) -> tuple[float, float, float]:
    """(seconds per decision, seconds per seeded reset, sum of rewards) of ``steps`` random decisions."""
    actions = np.random.default_rng(seed).integers(18, size=steps).tolist()
    spent, resetting, resets, total = 0.0, 0.0, 0, 0.0
    terminated = True
    for action in actions:
        if terminated:
            start = time.process_time()
            env.reset(seed=seed)
            resetting, resets = resetting + time.process_time() - start, resets + 1
        start = time.process_time()
        _, reward, terminated, _, _ = env.step(action)
        spent += time.process_time() - start
        total += float(reward)
    return spent / steps, resetting / resets, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=DEFAULT)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grey", action="store_true", help="let the peer's environment make grey screens only")
    args = parser.parse_args()
    import_module("cv2").setNumThreads(1)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    print(f"{'game':16}{'gymnasium':>10}{'emulator':>10}{'mtrl':>8}{'speed-up':>10}{'reset':>10}{'mtrl':>8}")
    ratios = []
    for game in args.games:
        envs = [
            make_peer(game, args.grey),
            Emulator(AtariGame(game, noop_max=1)),
            AtariGame(game, sticky=0.0, noop_max=1),
        ]
        rows = [[play(env, args.steps, seed) for env in envs] for seed in range(args.rounds)]
        for row in rows:
            assert len({total for *_, total in row}) == 1, f"{game}: rewards differ: {row}"
        step, reset = ([statistics.median(row[i][k] for row in rows) * 1e6 for i in range(3)] for k in (0, 1))
        ratios.append(step[0] / step[2])
        print(
            f"{game:16}{step[0]:10.0f}{step[1]:10.0f}{step[2]:8.0f}{ratios[-1]:9.2f}x{reset[0]:10.0f}{reset[2]:8.0f}",
            flush=True,
        )
    print(f"median speed-up per decision {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()
