"""Training speed of whole configurations on the CPU and on a GPU: environment steps per second of wall time.

    python benchmarks/devices.py configs/metaworld-mt3-sac.yaml configs/atari-8-ppo.yaml --seconds 30

Each configuration trains with each device in turn, alone, without evaluations; what an off-policy agent plays before it
learns is cut short. The figure is the median of the records after the first losses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mtrl.config import load_config
from mtrl.files import write_text
from mtrl.log import METRICS, read

WAYS = {
    "cpu": ["device=cpu"],
    "cuda": ["device=cuda"],
    "cuda, graph": ["device=cuda", "agent.cuda_graph=true"],
    "cuda, bf16": ["device=cuda", "agent.matmul=bf16"],
}
"""``graph``: updates and actions are launched as CUDA graphs, for SAC alone; without it, kernel by kernel."""


def speed(config: Path, settings: list[str], seconds: float) -> float:
    """Environment steps per second while learning.

    Raises:
        RuntimeError: it failed, or too little was recorded in that time.
    """
    short = ["eval.every=null", "eval.episodes=1", "checkpoint.every=1000000000", "log.every=200", "log.wandb=off"]
    if load_config(config).agent["kind"] == "sac":
        short.append("agent.warmup=200")
    with tempfile.TemporaryDirectory() as folder:
        out, output = Path(folder, "run"), Path(folder, "output")
        command = [sys.executable, "-m", "mtrl.cli", "train", str(config), *short, *settings, "--out", str(out)]
        with output.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
            end = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            process.kill()
            process.wait()
        rows = read(out / METRICS) if (out / METRICS).exists() else []
        learns = min((row["step"] for row in rows if any(key.startswith("losses/") for key in row)), default=math.inf)
        found = [row["time/SPS"] for row in rows if "time/SPS" in row and row["step"] > learns]
        if len(found) < 4:
            raise RuntimeError(f"{config}: too little recorded within {seconds:g} s: {output.read_text()[-500:]}")
        return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seconds", type=float, default=30.0, help="per configuration and device")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    args = parser.parse_args()
    usable = [way for way in args.ways if way == "cpu" or torch.cuda.is_available()]
    found: dict[str, dict[str, float | str]] = {}
    for config in args.configs:
        found[config.stem] = {}
        for name in usable:
            settings = [*WAYS[name], f"threads={args.threads}"]
            if load_config(config).agent["kind"] == "sac":
                settings += ["agent.cuda_graph=false"] * (name != "cuda, graph")
            elif name == "cuda, graph":
                continue
            try:
                found[config.stem][name] = round(speed(config, settings, args.seconds), 1)
            except RuntimeError as error:
                found[config.stem][name] = str(error)
            print(f"{config.stem:32} {name:14} {found[config.stem][name]}", flush=True)
    if args.out:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        if torch.cuda.is_available():
            machine["gpu"] = torch.cuda.get_device_name()
        told = {"machine": machine, "threads": args.threads, "seconds": args.seconds, "steps per second": found}
        write_text(args.out, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
