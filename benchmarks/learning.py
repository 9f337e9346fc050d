"""Learning results: one config, several seeds, IQM and intervals; what ``results/`` holds comes from here.

    python benchmarks/learning.py configs/minigrid-mt3-ppo.yaml --seeds 5 --out results/foundation/minigrid-mt3-ppo

Each seed is an ordinary ``mtrl train`` in a process of its own (one torch thread, environments in process), resumed
if it was interrupted. What is kept is what ``mtrl keep`` keeps of a grid: the last evaluation is that of the *last*
checkpoint, never of the best.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mtrl.benchmark.keep import README, keep
from mtrl.machine import usable_cores
from mtrl.runs import CONFIG, SUMMARY


def run_seed(config: Path, seed: int, folder: Path, overrides: list[str]) -> Path:
    """Train one seed to its end; returns the run folder."""
    out = folder / f"seed-{seed}"
    if (out / SUMMARY).exists():
        return out
    common = [sys.executable, "-m", "mtrl.cli", "train"]
    fresh = [str(config), "--seed", str(seed), "--out", str(out), *overrides]
    command = [*common, *(["--resume", str(out)] if (out / CONFIG).exists() else fresh)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "stdout.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=env)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, required=True, help="folder of the small files to keep")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default runs/CONFIG")
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_intermixed_args()
    folder = args.runs or Path("runs") / args.config.stem
    overrides = ["threads=1", "workers=0", "log.terminal=false", "log.wandb=off", *args.overrides]
    with ThreadPoolExecutor(args.jobs) as pool:
        outs = list(pool.map(lambda seed: run_seed(args.config, seed, folder, overrides), range(args.seeds)))
    command = "python benchmarks/learning.py " + shlex.join(
        [str(args.config), "--seeds", str(args.seeds), "--out", str(args.out), *args.overrides]
    )
    for path in keep(outs, args.out, command):
        print(path)
    print((args.out / README).read_text())


if __name__ == "__main__":
    main()
