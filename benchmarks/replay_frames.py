"""Stacks of Atari screens stored whole and frame by frame: bytes per transition, and time to add and to draw.

    python benchmarks/replay_frames.py [--capacity 4000] [--copies 4] [--rounds 7] [--rollout 125] [--train-rss]

Both kinds of both memories (``Replay``, and ``Rollout`` with its ``Items``) hold the same steps of Pong and Boxing
under random actions. Bytes are what the process grew by, in a process of its own. Contestants take turns round by
round; times are medians over rounds, ratios medians of the rounds' own ratios (whole / frames: above 1 is faster).
``--train-rss`` adds the peak memory of a short ``mtrl train --suite atari/Pong --agent ppo``, with and without frames.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from mtrl import make_spec, registry
from mtrl.config import load_config
from mtrl.replay import Replay
from mtrl.rollout import Items, Rollout
from mtrl.train import train
from mtrl.types import Decision, Spec, Step, Task
from mtrl.vector import MultiTaskVectorEnv
from mtrl_envs.atari import Atari

KINDS = ("whole", "frames")
SUITE = "atari/Pong+atari/Boxing"


class Frames(Atari):
    """The suite with short episodes, so that a run's last evaluation does not last."""

    def tasks(self, group: str) -> list[Task]:
        return [replace(task, horizon=200) for task in super().tasks(group)]


class Whole(Atari):
    """The same without the declaration."""

    def tasks(self, group: str) -> list[Task]:
        return [replace(task, horizon=200, frames={}) for task in super().tasks(group)]


def spec_of(kind: str) -> Spec:
    spec = make_spec(registry.tasks(SUITE))
    if kind == "frames":
        return spec
    return replace(spec, groups=tuple(replace(group, frames={}) for group in spec.groups))


def steps(count: int, copies: int) -> Iterator[Step]:
    """Random play."""
    tasks, rng = registry.tasks(SUITE), np.random.default_rng(0)
    envs = MultiTaskVectorEnv(tasks, copies, seed=0)
    envs.reset()
    for _ in range(count):
        decision = Decision({"atari": rng.integers(18, size=envs.num_envs)}, {})
        envs.step_async(decision.action)
        yield envs.step_wait(decision)[0]
    envs.close()


def items(roll: Rollout) -> Items:
    return Items(roll, steps=1, columns={}, action=roll.action, memory={}, device=torch.device("cpu"))


def resident(memory: str, kind: str, size: int, copies: int) -> float:
    """Bytes per transition that a full memory adds to a fresh process."""
    made: Any = Replay(spec_of(kind), size, seed=0) if memory == "replay" else Rollout(spec_of(kind), size)
    before, cut = 0, None
    process = psutil.Process()
    for step in steps(-(-size // copies) if memory == "replay" else size, copies):
        if not before:
            before = process.memory_info().rss
        made.add(step)
    if memory == "items":
        cut = items(made)
    grown = process.memory_info().rss - before
    del cut
    return grown / (2 * size * (1 if memory == "replay" else copies))


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def race(what: str, rounds: int, call: Callable[[str], Any]) -> None:
    """Times of the two kinds, in turns."""
    found = [{kind: timed(partial(call, kind)) for kind in KINDS} for _ in range(rounds)]
    medians = {kind: statistics.median(one[kind] for one in found) * 1e3 for kind in KINDS}
    ratio = statistics.median(one["whole"] / one["frames"] for one in found)
    print(f"{what:<44}{medians['whole']:>9.2f} ms{medians['frames']:>9.2f} ms{ratio:>9.2f}x")


def speed(capacity: int, copies: int, rollout: int, rounds: int) -> None:
    replays = {kind: Replay(spec_of(kind), capacity, seed=0) for kind in KINDS}
    rolls = {kind: Rollout(spec_of(kind), rollout) for kind in KINDS}
    recorded = list(steps(rollout, copies))
    for step in recorded:
        for kind in KINDS:
            rolls[kind].add(step)
    while replays["whole"].sizes.min() < capacity:  # the same steps again: what is in them does not matter here
        for step in recorded:
            for kind in KINDS:
                replays[kind].add(step)

    def add(memory: Any) -> None:
        if isinstance(memory, Rollout):
            memory.clear()
        for step in recorded:
            memory.add(step)

    def draw(cut: Items) -> None:
        for _ in cut.minibatches(8, torch.Generator().manual_seed(0)):
            pass

    race(f"replay: add {rollout} steps of {2 * copies} rows", rounds, lambda kind: add(replays[kind]))
    race("replay: draw 2 x 16", rounds, lambda kind: replays[kind].sample(16))
    race("replay: draw 2 x 128", rounds, lambda kind: replays[kind].sample(128))
    race(f"rollout: add {rollout} steps of {2 * copies} rows", rounds, lambda kind: add(rolls[kind]))
    cut = {kind: items(rolls[kind]) for kind in KINDS}
    race("rollout: cut into items", rounds, lambda kind: items(rolls[kind]))
    race("rollout: one pass of 8 minibatches", rounds, lambda kind: draw(cut[kind]))


def train_peak(kind: str) -> float:
    """Peak memory in MiB of a process that trains PPO on Pong for one update."""
    suite = f"replay_frames:{kind.title()}/Pong"
    with tempfile.TemporaryDirectory() as folder:
        options = [f"suite={suite}", "agent=ppo", "copies=8", "agent.epochs=1", "steps=2100", "workers=0", "device=cpu"]
        train(load_config(None, [*options, "eval.episodes=1", "log.wandb=off"]), Path(folder) / "run")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(call: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a call in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--capacity", type=int, default=4000)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rollout", type=int, default=125)
    parser.add_argument("--train-rss", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':<44}{'whole':>12}{'frames':>12}")
    for memory, size in (("replay", args.capacity), ("rollout", 4 * args.rollout), ("items", 4 * args.rollout)):
        whole, frames = (alone(resident, memory, kind, size, args.copies) for kind in KINDS)
        name = {"items": "rollout and its items"}.get(memory, memory)
        print(f"{name + ': bytes per transition':<44}{whole:>12,.0f}{frames:>12,.0f}{whole / frames:>9.2f}x")
    speed(args.capacity, args.copies, args.rollout, args.rounds)
    if args.train_rss:
        whole, frames = (alone(train_peak, kind) for kind in KINDS)
        print(f"{'mtrl train atari/Pong, ppo: peak MiB':<44}{whole:>12,.0f}{frames:>12,.0f}{whole / frames:>9.2f}x")


if __name__ == "__main__":
    main()
