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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mtrl.runs import CONFIG, METRICS, SUMMARY, write_text


def iqm(scores: np.ndarray) -> float:
    """Interquartile mean of all entries: the mean of the middle half (Agarwal et al., NeurIPS 2021)."""
    flat = np.sort(scores, axis=None)
    cut = len(flat) // 4
    return float(flat[cut : len(flat) - cut].mean())


def interval(scores: np.ndarray, statistic: Callable[[np.ndarray], float], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of a statistic of scores [runs, tasks], resampling runs within each task."""
    rng = np.random.default_rng(0)
    runs, tasks = scores.shape
    picks = rng.integers(runs, size=(draws, runs, tasks))
    values = [statistic(scores[pick, np.arange(tasks)]) for pick in picks]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


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


def rows_of(out: Path, seed: int) -> list[dict[str, float | str | int]]:
    """Evaluation rows {seed, step, task, return, score, success} of a run, in order."""
    rows: list[dict[str, float | str | int]] = []
    for line in (out / METRICS).read_text().splitlines():
        record = json.loads(line)
        found: dict[str, dict[str, float]] = {}
        for key, value in record.items():
            if key.startswith("eval/") and key.count("/") == 3:
                _, suite, task, name = key.split("/")
                found.setdefault(f"{suite}/{task}", {})[name] = value
        rows += [{"seed": seed, "step": record["step"], "task": task, **values} for task, values in found.items()]
    return rows


def report(rows: list[dict], seeds: int, command: str) -> str:
    """Markdown: IQM of the normalised score (and success) at every evaluation, then the final per-task table."""
    steps = sorted({row["step"] for row in rows})
    tasks = list(dict.fromkeys(row["task"] for row in rows))

    def matrix(step: int, name: str) -> np.ndarray | None:
        cells = {(r["seed"], r["task"]): r.get(name) for r in rows if r["step"] == step}
        values = [[cells.get((seed, task)) for task in tasks] for seed in sorted({r["seed"] for r in rows})]
        return None if any(v is None for line in values for v in line) else np.array(values, float)

    lines = [f"Command: `{command}`", "", "| steps per task | IQM of normalised score (95 % interval) | mean success |"]
    lines.append("|---|---|---|")
    for step in steps:
        scores, success = matrix(step, "score"), matrix(step, "success")
        if scores is None:
            continue
        low, high = interval(scores, iqm)
        mean = "-" if success is None else f"{success.mean():.3f}"
        lines.append(f"| {step // len(tasks):,} | {iqm(scores):.3f} ({low:.3f}-{high:.3f}) | {mean} |")
    lines += [
        "",
        f"At the end, {seeds} seeds:",
        "",
        "| task | score, mean over seeds | success, mean | success, worst seed |",
    ]
    lines.append("|---|---|---|---|")
    scores, success = matrix(steps[-1], "score"), matrix(steps[-1], "success")
    assert scores is not None
    for k, task in enumerate(tasks):
        rest = "- | -" if success is None else f"{success[:, k].mean():.3f} | {success[:, k].min():.3f}"
        lines.append(f"| {task} | {scores[:, k].mean():.3f} | {rest} |")
    if seeds < 5:
        lines += ["", f"With {seeds} seeds a bootstrap interval is too narrow; read it as a lower bound of the spread."]
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
