"""Learning results: one config, several seeds, IQM and intervals; what ``results/`` holds comes from here.

    python benchmarks/learning.py configs/minigrid-mt3-ppo.yaml --seeds 5 --out results/foundation/minigrid-mt3-ppo

Each seed is an ordinary ``mtrl train`` in a process of its own (one torch thread, environments in process), resumed
if it was interrupted. The curve comes from the run's ``metrics.jsonl``; the last row per task and seed is the final
evaluation of the *last* checkpoint, never of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mtrl.benchmark.stats import FEW_RUNS, estimate
from mtrl.benchmark.store import evaluations
from mtrl.files import write_text
from mtrl.log import METRICS, read
from mtrl.runs import CONFIG, SUMMARY

DRAWS = 10_000  # bootstrap replications behind every interval in results/


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


def rows_of(out: Path, seed: int) -> list[dict[str, Any]]:
    """Evaluation rows {seed, step, actions, task, return, score, success, ...} of a run, in order."""
    return [{"seed": seed, **row} for record in read(out / METRICS) for row in evaluations(record)]


def report(rows: list[dict[str, Any]], seeds: int, command: str) -> str:
    """Markdown: IQM of the normalised score at every evaluation, then the final per-task table."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [f"Command: `{command}`"]
    for actions in dict.fromkeys(row["actions"] for row in rows):
        mine = [row for row in rows if row["actions"] == actions]
        steps = sorted({row["step"] for row in mine})

        def matrix(name: str, step: int, mine: list[dict[str, Any]] = mine) -> np.ndarray:
            cells = {(row["seed"], row["task"]): row[name] for row in mine if row["step"] == step}
            return np.array([[cells[seed, task] for task in tasks] for seed in range(seeds)])

        lines += ["", f"Evaluated with {actions} actions, {seeds} seeds:", ""]
        lines += [
            "| steps per task | IQM of the score (95 % interval) | mean score | mean success |",
            "|---|---|---|---|",
        ]
        for step in steps:
            scores, success = matrix("score", step), matrix("success", step)
            found = estimate(scores, draws=DRAWS)
            shown = f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f}) | {scores.mean():.3f} | {success.mean():.3f}"
            lines.append(f"| {round(step / len(tasks), -3):,.0f} | {shown} |")
        scores, success = matrix("score", steps[-1]), matrix("success", steps[-1])
        lines += [
            "",
            "| task, at the end | mean score | worst seed | mean success | worst seed |",
            "|---|---|---|---|---|",
        ]
        for k, task in enumerate(tasks):
            cells = [scores[:, k].mean(), scores[:, k].min(), success[:, k].mean(), success[:, k].min()]
            lines.append(f"| {task} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    if seeds < FEW_RUNS:
        lines += ["", f"With {seeds} seeds a bootstrap interval is too narrow: read it as a lower bound of the spread."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the small files to keep")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default runs/CONFIG")
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_intermixed_args()
    folder = args.runs or Path("runs") / args.config.stem
    overrides = ["threads=1", "workers=0", "log.terminal=false", "log.wandb=off", *args.overrides]
    with ThreadPoolExecutor(args.jobs) as pool:
        outs = list(pool.map(lambda seed: run_seed(args.config, seed, folder, overrides), range(args.seeds)))
    rows = [row for seed, out in enumerate(outs) for row in rows_of(out, seed)]
    command = "python benchmarks/learning.py " + shlex.join(
        [str(args.config), "--seeds", str(args.seeds), "--out", str(args.out), *args.overrides]
    )
    summaries = [json.loads((out / SUMMARY).read_text()) for out in outs]
    text = report(rows, args.seeds, command)
    write_text(args.out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(args.out / CONFIG, (outs[0] / CONFIG).read_text())
    write_text(args.out / "versions.json", json.dumps(summaries[0]["versions"], indent=1) + "\n")
    write_text(args.out / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
