"""How long a benchmark spec takes here: every agent on every suite is trained for a while, and the rest extrapolated.

    python benchmarks/core_hours.py configs/benchmark/*.yaml --seconds 60

Core-hours are CPU time of training alone, as in reports: evaluations are left out, and so is what an off-policy agent
plays before it learns (its ``warmup`` is cut short).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from mtrl.benchmark.spec import Job, load_spec, plan
from mtrl.config import dump_config
from mtrl.log import METRICS, read

WARMUP = 200  # steps per task


def speed(job: Job, seconds: float) -> float:
    """Environment steps per CPU-second, once learning is under way.

    Raises:
        RuntimeError: too little was recorded in that time.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder, "config.yaml"), Path(folder, "run")
        init = job.config.init and job.config.init.model_copy(update={"run": None})  # its source is not there; as fast
        config.write_text(dump_config(job.config.model_copy(update={"init": init})))
        short = ["eval.every=null", "eval.episodes=1", "log.every=500", "log.wandb=off"]
        if "warmup" in job.config.agent:
            short.append(f"agent.warmup={WARMUP}")
        command = [sys.executable, "-m", "mtrl.cli", "train", str(config), *short, "--out", str(out)]
        process = psutil.Popen(command, stdout=subprocess.DEVNULL)
        seen: list[tuple[int, float]] = []  # (step, CPU seconds) whenever a record came
        start = time.monotonic()
        while process.poll() is None and time.monotonic() - start < seconds:
            time.sleep(0.1)
            times = process.cpu_times()
            step = read(out / METRICS)[-1]["step"] if (out / METRICS).exists() and read(out / METRICS) else 0
            if step and (not seen or step > seen[-1][0]):
                seen.append((step, times.user + times.system))
        if process.poll() is None:
            process.kill()
            process.wait()
        elif process.returncode:
            raise RuntimeError(f"{job.name}: training failed; see: {' '.join(command[:-2])} --out DIR")
        seen = seen[len(seen) // 3 :]
        if len(seen) < 2:
            raise RuntimeError(f"{job.name}: too little recorded within {seconds:g} s; give it more --seconds")
        return (seen[-1][0] - seen[0][0]) / (seen[-1][1] - seen[0][1])


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
            hours = job.config.steps / rate / 3600
            total += hours * len(spec.seeds)
            print(
                f"  {job.agent:14} {job.suite:50} {rate:7.0f} steps/CPU s  {hours:7.2f} core-hours a run",
                flush=True,
            )
        print(f"  in all {total:.2g} core-hours (the spec says {spec.core_hours})", flush=True)


if __name__ == "__main__":
    main()
