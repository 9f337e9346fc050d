"""What recording a run costs: JSONL, terminal and offline Weights & Biases, as a share of the training.

    python benchmarks/logging_cost.py [--steps 120000] [--rounds 3]

Runs of PPO on minigrid/mt3, each in a process of its own, alternate between recording everything (a record every 5,000
steps and every training episode, an evaluation in between) and nothing but the final record. Two figures:

- booked: CPU seconds inside the logger, plus those of W&B's own process, over all others of the same run;
- paired: CPU seconds of whole runs with everything, over those with nothing (noisier).

Starting and ending W&B costs the same for a run of any length, so it is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import psutil

EVERY = ("log", "episode", "evaluation", "summary")  # methods of the logger that are called again and again
ONCE = ("__init__", "close")


def one_run(out: Path, steps: int, everything: bool) -> dict[str, float]:
    """Train here; CPU seconds by where they went."""
    from mtrl.config import parse_config
    from mtrl.log import Logger
    from mtrl.train import train

    spent = {"every": 0.0, "once": 0.0, "service": 0.0}

    def booked(method: Callable[..., Any], book: str) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if method.__name__ == "close":
                children = psutil.Process().children(recursive=True)
                spent["service"] = max(spent["service"], sum(sum(c.cpu_times()[:2]) for c in children))
            start = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent[book] += time.process_time() - start

        return call

    for name in EVERY:
        setattr(Logger, name, booked(getattr(Logger, name), "every"))
    for name in ONCE:
        setattr(Logger, name, booked(getattr(Logger, name), "once"))
    log = {"wandb": "offline", "every": 5000} if everything else {"wandb": "off", "every": 10**9, "terminal": False}
    config = parse_config(
        {
            "suite": "minigrid/mt3",
            "agent": {"kind": "ppo", "rollout": 128, "minibatches": 4},
            "steps": steps,
            "copies": 8,
            "threads": 1,
            "workers": 0,
            "eval": {"every": steps // 2, "episodes": 10},
            "log": log,
        }
    )
    train(config, out)
    return {"total": time.process_time(), **spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        found = one_run(Path(args.child[0]), args.steps, args.child[1] == "everything")
        Path(args.child[0], "cost.json").write_text(json.dumps(found))
        return
    runs: dict[str, list[dict[str, float]]] = {"everything": [], "nothing": []}
    for _ in range(args.rounds):
        for kind, found in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--steps", str(args.steps), "--child", folder, kind]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                found.append(json.loads(Path(folder, "cost.json").read_text()))
    rows = runs["everything"]
    rest = [row["total"] - row["every"] - row["once"] for row in rows]
    booked = statistics.median((row["every"] + row["service"]) / r for row, r in zip(rows, rest, strict=True))
    once = statistics.median(row["once"] for row in rows)
    pairs = zip(rows, runs["nothing"], strict=True)
    paired = statistics.median((a["total"] + a["service"] - a["once"]) / (b["total"] - b["once"]) - 1 for a, b in pairs)
    print(f"training of {args.steps:,} steps: {statistics.median(rest):.1f} CPU s")
    print(f"recording everything, booked: {100 * booked:.2f} %; paired: {100 * paired:+.2f} %")
    print(f"beginning and ending, once a run: {once:.1f} CPU s")
    if args.out:
        told = {"steps": args.steps, "runs": runs, "booked": booked, "paired": paired, "once": once}
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
