"""How many environment steps agents take to a share of the best score, from their training episodes.

    python benchmarks/steps_to.py runs/tl-5-7 --share 0.8 --out results/moore/moore-transfer-5-7/steps.json

Evaluations are too rare to tell. A run's score at a record is the mean over tasks of the mean of each task's last
episodes (``log.window``); best is the highest mean over seeds of an agent's last scores. The answer is the first
record at or above ``share`` times best with all tasks in it, so it comes as many episodes late as the window is long,
for all agents alike. Agents that learn each task alone are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mtrl.benchmark.store import Run, load
from mtrl.files import write_text
from mtrl.log import METRICS, read


def tasks(run: Run) -> list[str]:
    """Those that were evaluated."""
    return sorted({str(row["task"]) for row in run.rows})


def curve(run: Run) -> list[tuple[int, float]]:
    """(environment steps, training score) at the records that tell about every task."""
    keys = [f"charts/{task}_score" for task in tasks(run)]
    records = [record for record in read(run.folder / METRICS) if all(key in record for key in keys)]
    return [(record["step"], statistics.fmean(record[key] for key in keys)) for record in records]


def reached(runs: list[Run], share: float) -> dict[str, Any]:
    """Of the finished runs on one suite: the score asked for and {agent: {seed: steps per task, or None}}."""
    curves = {(run.agent, run.seed): curve(run) for run in runs}
    agents = list(dict.fromkeys(run.agent for run in runs))
    best = max(
        statistics.fmean(points[-1][1] for (name, _), points in curves.items() if name == agent) for agent in agents
    )
    steps: dict[str, dict[str, int | None]] = {agent: {} for agent in agents}
    for (agent, seed), points in curves.items():
        first = next((step for step, score in points if score >= share * best), None)
        steps[agent][str(seed)] = first if first is None else first // len(tasks(runs[0]))
    return {"best": round(best, 4), "share": share, "score": round(share * best, 4), "steps per task": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = [run for run in load(args.grid).runs if run.status == "finished" and not run.parts]
    found: dict[str, Any] = {}
    for suite in dict.fromkeys(run.suite for run in runs):
        own = [run for run in runs if run.suite == suite]
        if len({run.agent for run in own}) < 2:
            continue
        found[suite] = reached(own, args.share)
        print(f"{suite}: steps per task to a training score of {found[suite]['score']:.3f}")
        for agent, steps in found[suite]["steps per task"].items():
            got = sorted(value for value in steps.values() if value is not None)
            spread = f"median {statistics.median(got):>9,.0f}  ({got[0]:,} to {got[-1]:,})" if got else ""
            print(f"  {agent:24} {len(got)} of {len(steps)}  {spread}")
    if args.out:
        write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
