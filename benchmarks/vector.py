"""Stepping speed of the vector beside its peers: environment steps per second with random actions, memory, start-up.

    python benchmarks/vector.py                                    # MT10, 8 MiniGrid ids, 8 Atari games, all 26 at once
    python benchmarks/vector.py minigrid/mt7 --rounds 15 --out results/vector.json
    python benchmarks/vector.py --scaling metaworld/mt10 --copies 1 5 10 20

Peers are in ``benchmarks/peers.py``; what is not installed, or cannot hold the tasks, is named and left out. A "bound"
is two processes that step environments in plain loops and never talk: what no communication would cost, with the
packages' environments or with ours, which are faster. Contestants stay alive and take turns round by round; figures are
medians over rounds, ratios are medians of the rounds' own ratios, so that a machine that slows down hurts all alike.
"CPU us" is the processor time of all processes together per environment step, which hardly depends on what else runs.
PufferLib 3.0.0 does not install beside numpy 2 and is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from gymnasium.error import DependencyNotInstalled
from peers import GIVES_UP, peers, stock

from mtrl import registry
from mtrl.types import Decision, Task
from mtrl.vector import MultiTaskVectorEnv

OURS, IN_PROCESS = "mtrl, 2 workers", "mtrl, in process"
STOCK_BOUND, OWN_BOUND = "bound: 2 raw loops", "bound with our environments"
MINIGRID = "minigrid/mt7+minigrid/DoorKey-8x8"
MIX = f"metaworld/mt10+{MINIGRID}+atari/8"
PACKAGES = ("gymnasium", "stable-baselines3", "metaworld", "mujoco", "minigrid", "ale-py", "numpy")
PEERS = ("tianshou", "torchrl", "envpool")


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


class Ours:
    """Our vector by its native face: send, receive, the transition of every row."""

    def __init__(self, tasks: Sequence[Task], workers: int) -> None:
        self._envs = MultiTaskVectorEnv(tasks, workers=workers)
        self._envs.reset(seed=0)
        self._envs.action_space.seed(0)
        self._actions = [self._envs.action_space.sample() for _ in range(256)]

    def steps(self, count: int) -> None:
        """Vector steps, with random actions."""
        envs, actions = self._envs, self._actions
        for step in range(count):
            action = actions[step % 256]
            envs.step_async(action)
            envs.step_wait(Decision(action, {}))

    def close(self) -> None:
        self._envs.close()


def contestants(suite: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Everything that takes part, alive; closed with the stack."""
    tasks = registry.tasks(suite)
    if any(task.agents > 1 for task in tasks):
        raise SystemExit(f"{suite}: no peer holds teams; battles have benchmarks/battles.py")
    try:
        others = peers(tasks)
    except DependencyNotInstalled as error:  # no peer steps without the package's own environments
        raise SystemExit(f"{suite}: {error}") from error
    made: dict[str, Callable[[], Any]] = {
        OURS: lambda: Ours(tasks, 2),
        IN_PROCESS: lambda: Ours(tasks, 0),
        STOCK_BOUND: lambda: Raw([partial(stock, task.name) for task in tasks]),
        OWN_BOUND: lambda: Raw([task.build for task in tasks]),
        **others,
    }
    alive = {}
    for name, make in made.items():
        try:
            alive[name] = make()
        except (ImportError, ValueError) as error:
            print(f"left out: {name} ({error})")
        else:
            stack.callback(alive[name].close)
    return alive


def run(contestant: Any, steps: int, rows: int) -> float:
    """Environment steps per second over ``steps`` vector steps."""
    if isinstance(contestant, Raw):
        return contestant.run(steps)
    start = time.perf_counter()
    contestant.steps(steps)
    return steps * rows / (time.perf_counter() - start)


def cpu_seconds() -> float:
    """CPU time used so far by this process and all its descendants."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def compare(suite: str, rounds: int, steps: int) -> dict[str, Any]:
    """Run all contestants in turn; returns speeds (environment steps per second) and ratios."""
    rows = len(registry.tasks(suite))
    with contextlib.ExitStack() as stack:
        alive = contestants(suite, stack)
        for one in alive.values():
            run(one, steps // 4, rows)  # warm up
        gc.collect()
        gc.freeze()  # or every contestant in this process pays for collections that look at all the others' objects
        speeds: dict[str, list[float]] = {name: [] for name in alive}
        cost = dict.fromkeys(alive, 0.0)
        for round_ in range(rounds):
            order = list(alive) if round_ % 2 == 0 else list(alive)[::-1]
            for name in order:
                before = cpu_seconds()
                speeds[name].append(run(alive[name], steps, rows))
                cost[name] += cpu_seconds() - before
    cpu = {name: seconds / (rounds * steps * rows) * 1e6 for name, seconds in cost.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ours = max((OURS, IN_PROCESS), key=medians.__getitem__)  # what `workers: auto` takes
    equals = [name for name in speeds if name not in (OURS, IN_PROCESS, STOCK_BOUND, OWN_BOUND, *GIVES_UP)]
    best = max(equals, key=medians.__getitem__)
    against = ["Gymnasium AsyncVectorEnv", best, STOCK_BOUND, OWN_BOUND, *(name for name in GIVES_UP if name in speeds)]
    ratios = {
        name: statistics.median(a / b for a, b in zip(speeds[ours], speeds[name], strict=True)) for name in against
    }
    told = {"suite": suite, "rows": rows, "rounds": rounds, "steps": steps, "ours": ours, "best peer": best}
    return {**told, "speeds": speeds, "cpu": cpu, "ratios": ratios}


def report(result: dict[str, Any]) -> None:
    """Print one table."""
    ours = result["speeds"][result["ours"]]
    print(f"\n{result['suite']} ({result['rows']} rows): environment steps per second, ", end="")
    print(f"{result['rounds']} rounds of {result['steps']} vector steps")
    print(f"{'':30s}{'median':>9s}{'min':>9s}{'max':>9s}   ours / it   CPU us")
    for name, values in sorted(result["speeds"].items(), key=lambda item: -statistics.median(item[1])):
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        print(
            f"{name:30s}{statistics.median(values):9.0f}{min(values):9.0f}{max(values):9.0f}{ratio:9.2f}{result['cpu'][name]:12.0f}"
        )
    print(f"{result['ours']}: " + "; ".join(f"{ratio:.2f} x {label}" for label, ratio in result["ratios"].items()))
    for name, what in GIVES_UP.items():
        if name in result["speeds"]:
            print(f"{name} {what}")


def scaling(suite: str, copies: Sequence[int], rounds: int) -> dict[str, Any]:
    """Speed, memory and start-up as rows are added: ``copies`` of each task, two workers each, all taking turns."""
    tasks, found = registry.tasks(suite), []
    with contextlib.ExitStack() as stack:
        alive = []
        for number in copies:
            start, before = time.perf_counter(), resident()
            envs = stack.enter_context(contextlib.closing(MultiTaskVectorEnv(tasks, number, workers=2)))
            envs.reset(seed=0)
            told = {"rows": envs.num_envs, "start_seconds": time.perf_counter() - start}
            envs.action_space.seed(0)
            alive.append((envs, [envs.action_space.sample() for _ in range(64)]))
            found.append({**told, "megabytes": resident() - before, "speeds": [], "cpu": 0.0})
        for _ in range(rounds):
            for (envs, actions), row in zip(alive, found, strict=True):
                count, before, start = max(20, 4000 // envs.num_envs), cpu_seconds(), time.perf_counter()
                for step in range(count):
                    envs.step_async(actions[step % 64])
                    envs.step_wait(Decision(actions[step % 64], {}))
                row["speeds"].append(count * envs.num_envs / (time.perf_counter() - start))
                row["cpu"] += (cpu_seconds() - before) / (rounds * count * envs.num_envs) * 1e6
    for row in found:
        ratios = [a / b for a, b in zip(row["speeds"], found[0]["speeds"], strict=True)]
        row["ratio"] = statistics.median(ratios)
        print(
            f"{suite}: {row['rows']:4d} rows  {statistics.median(row['speeds']):8.0f} environment steps/s "
            f"({row['ratio']:.2f} x the first)  {row['cpu']:5.0f} CPU us  {row['megabytes']:6.0f} MB, "
            f"first observation after {row['start_seconds']:.1f} s"
        )
    added = found[-1]["rows"] - found[0]["rows"]
    print(f"{(found[-1]['megabytes'] - found[0]['megabytes']) / max(added, 1):.1f} MB per added row")
    return {"suite": suite, "scaling": found}


def resident() -> float:
    """Proportional set size in MB of this process and its children."""
    me = psutil.Process()
    return sum(p.memory_full_info().pss for p in (me, *me.children(recursive=True))) / 2**20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=["metaworld/mt10", MINIGRID, "atari/8", MIX])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=500, help="vector steps per round (500: one MetaWorld episode)")
    parser.add_argument(
        "--scaling", action="store_true", help="speed, memory and start-up of more and more rows instead"
    )
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 4, 10, 20], help="of each task")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args()
    results = []
    for suite in args.suites:
        if args.scaling:
            results.append(scaling(suite, args.copies, args.rounds))
        else:
            results.append(compare(suite, args.rounds, args.steps))
            report(results[-1])
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if args.out:
        versions = {name: version(name) for name in PACKAGES}
        for name in PEERS:
            with contextlib.suppress(PackageNotFoundError):
                versions[name] = version(name)
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}
        told = {"machine": machine, "versions": versions, "results": results}
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
