"""One agent learns several real tasks in a few minutes; ``make demo`` runs this.

Trains ``configs/demo.yaml`` with the live display, evaluates the agent beside a random one on the same seeded
episodes, and writes a GIF and a report.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mtrl
from mtrl import runs
from mtrl.benchmark.report import REPORT, write_report
from mtrl.benchmark.store import IMPORTED, evaluations, load, write_rows
from mtrl.config import load_config
from mtrl.evaluate import Evaluation, evaluate
from mtrl.log import METRICS
from mtrl.train import train
from mtrl.watch import film, pick

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def free(folder: Path) -> Path:
    """``folder``, or ``folder-2``, ``folder-3``, ... if it is taken."""
    candidates = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def compare(console: Console, trained: Evaluation, untrained: Evaluation) -> None:
    """Print score and success of both agents per task."""
    table = Table(title="the same seeded episodes, played by", header_style="bold")
    table.add_column("task", no_wrap=True)
    for column in ("random: score", "success", "trained: score", "success"):
        table.add_column(column, justify="right")
    for after, before in zip(trained.results, untrained.results, strict=True):
        cells = [f"{one.score:.2f}" if i % 2 == 0 else _percent(one.success) for one in (before, after) for i in (0, 1)]
        table.add_row(after.task.name, *cells)
    console.print(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run")
    parser.add_argument("overrides", nargs="*", help="key=value, as for mtrl train")
    args = parser.parse_intermixed_args()
    console = Console()
    config = load_config(CONFIG, args.overrides)
    out = free(args.out)
    summary = train(config, out)
    if summary.evaluation is None:
        raise SystemExit(f"interrupted; go on with: mtrl train --resume {out}")
    tasks = mtrl.tasks(config.suite)
    spec = mtrl.make_spec(tasks)
    settings = {"spec": spec, "episodes": config.eval.episodes, "seed": config.eval.seed}
    chance = runs.make_agent(load_config(overrides=[f"suite={config.suite}"], agent="random"), spec)
    untrained = evaluate(chance, tasks, **settings)
    compare(console, summary.evaluation, untrained)
    gif = film(pick(summary.evaluation, "best"), out / runs.VIDEOS / "best.gif", fps=4)
    who = {"agent": "random", "suite": config.suite, "seed": config.seed}
    rows = evaluations({"step": summary.steps, **untrained.metrics()})
    write_rows(out / IMPORTED / "random.csv", [{**who, **row} for row in rows])
    page = write_report(load(out), out / REPORT)
    console.print(f"{summary.steps:,} environment steps in {summary.seconds / 60:.1f} minutes")
    console.print(f"watch it:          {gif}\nrecords:           {out / METRICS}")
    console.print(f"the report:        {page}")
    console.print(f"evaluate it again: {Path('.venv/bin/mtrl')} evaluate {out} --episodes 100")


if __name__ == "__main__":
    main()
