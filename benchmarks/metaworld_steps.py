"""Cost of a MetaWorld step: the package against mtrl's adapter, with and without its fast path.

CPU time of one thread, random actions, the three sides interleaved in chunks so that a busy machine hurts all alike;
the median chunk counts. "raw" is the package's own environment with its goal visible.

    python benchmarks/metaworld_steps.py [--group mt10] [--chunks 20]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mtrl_envs.metaworld import MetaWorld, MetaWorldEnv, make_raw

CHUNK = 25
"""Steps per measurement."""


def cpu_us(call: Callable[[], Any], times: int = 1) -> float:
    """Microseconds of CPU time per call."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times * 1e6


def measure(task: str, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds per step [3] and per reset [3] of raw, adapter without and adapter with the fast path."""
    raw = make_raw(task)
    raw._freeze_rand_vec, raw.seeded_rand_vec, raw.np_random = False, True, np.random.default_rng(0)
    envs: list[Any] = [raw, MetaWorldEnv(task, fast=False), MetaWorldEnv(task)]
    rng = np.random.default_rng(0)
    steps = np.empty((chunks, 3))
    resets = []
    for chunk in range(chunks):
        if chunk % (500 // CHUNK) == 0:
            resets.append([cpu_us(env.reset) for env in envs])
        actions = rng.uniform(-1, 1, (CHUNK, 4)).astype(np.float32)
        for side in rng.permutation(3):
            step, rest = envs[side].step, iter(actions)
            steps[chunk, side] = cpu_us(lambda step=step, rest=rest: step(next(rest)), CHUNK)
    for env in envs:
        env.close()
    return np.median(steps, axis=0), np.median(resets, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", default="mt10", help="a group or a task of the suite")
    parser.add_argument("--chunks", type=int, default=20, help=f"chunks of {CHUNK} steps per task")
    args = parser.parse_args()
    print("CPU microseconds      step: raw  adapter   fast  raw/fast   reset: raw  adapter    fast")
    total = []
    for task in MetaWorld().tasks(args.group):
        name = task.name.removeprefix("metaworld/")
        step, reset = measure(name, args.chunks)
        total.append(step)
        print(f"{name:27s}{row(step)}{step[0] / step[2]:9.2f}x       {row(reset)}", flush=True)
    mean = np.mean(total, axis=0)
    print(f"{'mean':27s}{row(mean)}{mean[0] / mean[2]:9.2f}x")


def row(values: np.ndarray) -> str:
    return "".join(f"{value:8.0f}" for value in values)


if __name__ == "__main__":
    main()
