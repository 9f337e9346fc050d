"""How long a benchmark spec takes here: every agent on every suite is trained for a while, and the rest extrapolated.

    python benchmarks/core_hours.py configs/benchmark/*.yaml --seconds 60

The speed is that of training alone, as in reports: evaluations are left out, and so is what an off-policy agent plays
before it learns (its ``warmup`` is cut short).
"""

from __future__ import annotations

import argparse
import itertools
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mtrl.benchmark.engine import cores
from mtrl.benchmark.spec import Job, load_spec, plan
from mtrl.config import dump_config
from mtrl.log import METRICS, read

WARMUP = 200  # steps per task


def speed(job: Job, seconds: float) -> float:
    """Environment steps per second, once learning is under way.

    Raises:
        RuntimeError: nothing was recorded in that time.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder, "config.yaml"), Path(folder, "run")
        config.write_text(dump_config(job.config))
        short = ["eval.every=null", "eval.episodes=1", "log.every=500", "log.wandb=off"]
        if "warmup" in job.config.agent:
            short.append(f"agent.warmup={WARMUP}")
        command = [sys.executable, "-m", "mtrl.cli", "train", str(config), *short, "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        start = time.monotonic()
        while process.poll() is None and time.monotonic() - start < seconds:
            time.sleep(0.2)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
        records = [row for row in read(out / METRICS) if "time/SPS" in row] if (out / METRICS).exists() else []
        if not records:
            raise RuntimeError(f"{job.name}: nothing recorded within {seconds:g} s; give it more --seconds")
        learning = records[len(records) // 3 :]
        # Steps over time, not a mean of speeds: an on-policy agent learns in few records and plays in many.
        took = sum((b["step"] - a["step"]) / b["time/SPS"] for a, b in itertools.pairwise(learning))
        if not took:
            return statistics.median(row["time/SPS"] for row in records)
        return (learning[-1]["step"] - learning[0]["step"]) / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="per agent and suite")
    args = parser.parse_args()
    for path in args.specs:
        spec = load_spec(path)
        total = 0.0
        print(f"{path}: {len(spec.seeds)} seeds", flush=True)
        for job in (job for job in plan(spec) if job.seed == spec.seeds[0]):
            rate = speed(job, args.seconds)
            hours = job.config.steps / rate / 3600 * cores(job)
            total += hours * len(spec.seeds)
            print(f"  {job.agent:14} {job.suite:50} {rate:8.0f} steps/s  {hours:7.2f} core-hours a run", flush=True)
        print(f"  in all {total:.2g} core-hours (the spec says {spec.core_hours})", flush=True)


if __name__ == "__main__":
    main()
