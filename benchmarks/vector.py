"""Stepping speed of the vector beside its peers: environment steps per second with random actions, and memory.

    python benchmarks/vector.py                          # metaworld/mt10 and minigrid/mt7
    python benchmarks/vector.py minigrid/mt7 --rounds 15 --out results/vector.json
    python benchmarks/vector.py --memory metaworld/mt50  # all processes together

Peers step the packages' own environments under the least wrapping that they can hold: MetaWorld's class with a time
limit, MiniGrid with its image only (ours also carries direction, tasks and exact successors). "bound" are two
processes that step those same environments in plain loops and never talk: what no communication would cost.
Contestants stay alive and take turns round by round; figures are medians over rounds, ratios are medians of the
rounds' own ratios, so that a machine that slows down hurts all alike. "CPU us" is the processor time of all processes
together per environment step, which hardly depends on what else runs. PufferLib 3.0.0 does not install beside numpy 2
and is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from mtrl import registry
from mtrl.types import Decision
from mtrl.vector import MultiTaskVectorEnv

OURS, BOUND = "mtrl, 2 workers", "bound: 2 raw loops"


def stock(name: str) -> gym.Env[Any, Any]:
    """The package's own environment of a task named as in our suites."""
    suite, _, task = name.partition("/")
    if suite == "metaworld":
        from mtrl_envs.metaworld import make_raw

        raw = make_raw(task)
        raw._freeze_rand_vec = False  # a new goal at every reset
        return gym.wrappers.TimeLimit(raw, 500)
    from minigrid.wrappers import ImgObsWrapper

    from mtrl_envs.minigrid import make_stock

    return ImgObsWrapper(
        make_stock(next(i for i in gym.registry if task in i and i.startswith(("MiniGrid", "BabyAI"))))
    )


class Raw:
    """Plain loops over ``makers`` in two processes that only report their speeds."""

    def __init__(self, makers: Sequence[Callable[[], Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._links, self._processes = [], []
        for number in range(2):
            ours, theirs = context.Pipe()
            self._processes.append(context.Process(target=_raw_loop, args=(makers[number::2], theirs), daemon=True))
            self._processes[-1].start()
            self._links.append(ours)
        for link in self._links:
            link.recv()

    def run(self, steps: int) -> float:
        """Environment steps per second, both loops together, over ``steps`` steps of every environment."""
        for link in self._links:
            link.send(steps)
        return sum(link.recv() for link in self._links)

    def close(self) -> None:
        for link, process in zip(self._links, self._processes, strict=True):
            link.send(0)
            process.join()


def _raw_loop(makers: Sequence[Callable[[], Any]], link: Any) -> None:
    envs = [make() for make in makers]
    for env in envs:
        env.reset(seed=0)
        env.action_space.seed(0)
    actions = [[env.action_space.sample() for _ in range(256)] for env in envs]
    link.send("ready")
    while steps := link.recv():
        start = time.perf_counter()
        for step in range(steps):
            for env, drawn in zip(envs, actions, strict=True):
                _, _, terminated, truncated, _ = env.step(drawn[step % 256])
                if terminated or truncated:
                    env.reset()
        link.send(steps * len(envs) / (time.perf_counter() - start))


class Vector:
    """A vector environment of Gymnasium or Stable-Baselines3, or ours by its Gymnasium or native face."""

    def __init__(self, envs: Any, rows: int) -> None:
        self._envs, self._rows = envs, rows
        envs.reset()
        self._native = isinstance(envs, MultiTaskVectorEnv)
        envs.action_space.seed(0)
        self._actions: list[Any] = [envs.action_space.sample() for _ in range(256)]
        if not isinstance(envs, VectorEnv):  # SB3's action space is that of one row
            self._actions = [np.stack([self._actions[(i + row) % 256] for row in range(rows)]) for i in range(256)]

    def run(self, steps: int) -> float:
        """Environment steps per second over ``steps`` vector steps."""
        envs, actions = self._envs, self._actions
        start = time.perf_counter()
        for step in range(steps):
            action = actions[step % 256]
            if self._native:
                envs.step_async(action)
                envs.step_wait(Decision(action, {}))
            else:
                envs.step(action)
        return steps * self._rows / (time.perf_counter() - start)

    def close(self) -> None:
        self._envs.close()


def contestants(suite: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Everything that takes part, alive; closed with the stack."""
    tasks = registry.tasks(suite)
    makers = [partial(stock, task.name) for task in tasks]
    made: dict[str, Callable[[], Any]] = {
        OURS: lambda: Vector(MultiTaskVectorEnv(tasks, workers=2), len(tasks)),
        "mtrl, in process": lambda: Vector(MultiTaskVectorEnv(tasks), len(tasks)),
        "Gymnasium SyncVectorEnv": lambda: Vector(SyncVectorEnv(makers), len(tasks)),
        "Gymnasium AsyncVectorEnv": lambda: Vector(AsyncVectorEnv(makers), len(tasks)),
        BOUND: lambda: Raw(makers),
        "bound with our environments": lambda: Raw([task.build for task in tasks]),
    }
    try:
        from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
    except ImportError:
        print("stable-baselines3 is not installed: left out")
    else:
        made["SB3 DummyVecEnv"] = lambda: Vector(DummyVecEnv(list(makers)), len(tasks))
        made["SB3 SubprocVecEnv"] = lambda: Vector(SubprocVecEnv(list(makers)), len(tasks))
    alive = {}
    for name, make in made.items():
        alive[name] = make()
        stack.callback(alive[name].close)
    return alive


def cpu_seconds() -> float:
    """CPU time used so far by this process and all its descendants."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def compare(suite: str, rounds: int, steps: int) -> dict[str, Any]:
    """Run all contestants in turn; returns speeds (environment steps per second) and ratios."""
    with contextlib.ExitStack() as stack:
        alive = contestants(suite, stack)
        for one in alive.values():
            one.run(steps // 4)  # warm up
        speeds: dict[str, list[float]] = {name: [] for name in alive}
        cost = dict.fromkeys(alive, 0.0)
        for round_ in range(rounds):
            order = list(alive) if round_ % 2 == 0 else list(alive)[::-1]
            for name in order:
                before = cpu_seconds()
                speeds[name].append(alive[name].run(steps))
                cost[name] += cpu_seconds() - before
        total = rounds * steps * len(registry.tasks(suite))
        cpu = {name: seconds / total * 1e6 for name, seconds in cost.items()}
    peers = [name for name in speeds if name.startswith(("Gymnasium", "SB3"))]
    best = max(peers, key=lambda name: statistics.median(speeds[name]))
    against = {"Gymnasium AsyncVectorEnv": "Gymnasium AsyncVectorEnv", f"best peer ({best})": best, BOUND: BOUND}
    ratios = {
        label: statistics.median(a / b for a, b in zip(speeds[OURS], speeds[name], strict=True))
        for label, name in against.items()
    }
    return {"suite": suite, "rounds": rounds, "steps": steps, "speeds": speeds, "cpu": cpu, "ratios": ratios}


def report(result: dict[str, Any]) -> None:
    """Print one table."""
    ours = result["speeds"][OURS]
    print(f"\n{result['suite']}: environment steps per second, {result['rounds']} rounds of {result['steps']} each")
    print(f"{'':30s}{'median':>9s}{'min':>9s}{'max':>9s}   ours / it   CPU us")
    for name, values in sorted(result["speeds"].items(), key=lambda item: -statistics.median(item[1])):
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        print(
            f"{name:30s}{statistics.median(values):9.0f}{min(values):9.0f}{max(values):9.0f}{ratio:9.2f}{result['cpu'][name]:12.0f}"
        )
    print("; ".join(f"{ratio:.2f} x {label}" for label, ratio in result["ratios"].items()))


def memory(suite: str) -> dict[str, Any]:
    """Proportional set size in MB of this process and its workers, one row per task, after some steps."""
    tasks = registry.tasks(suite)
    with contextlib.closing(MultiTaskVectorEnv(tasks, workers=2)) as envs:
        envs.reset()
        for _ in range(50):
            envs.step(envs.action_space.sample())
        me = psutil.Process()
        sizes = [p.memory_full_info().pss / 2**20 for p in (me, *me.children(recursive=True))]
    print(f"{suite}: {sum(sizes):.0f} MB in {len(sizes)} processes ({', '.join(f'{size:.0f}' for size in sizes)})")
    return {"suite": suite, "megabytes": sizes}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=["metaworld/mt10", "minigrid/mt7"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=500, help="vector steps per round (500: one MetaWorld episode)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args()
    results = []
    for suite in args.suites:
        if args.memory:
            results.append(memory(suite))
        else:
            results.append(compare(suite, args.rounds, args.steps))
            report(results[-1])
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if args.out:
        packages = ("gymnasium", "stable-baselines3", "metaworld", "mujoco", "minigrid", "numpy")
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}
        told = {"machine": machine, "versions": {name: version(name) for name in packages}, "results": results}
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
