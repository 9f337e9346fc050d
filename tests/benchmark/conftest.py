"""Run folders as ``mtrl train`` and the engine leave them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

GIF = bytes.fromhex(
    "47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b"  # one pixel
)


def write_run(
    root: Path,
    agent: str,
    suite: str,
    seed: int,
    *,
    skill: float = 0.8,
    tasks: Sequence[str] = ("toy/a", "toy/b", "toy/c"),
    evaluations: int = 6,
    every: int = 50_000,
    speed: float = 2_000.0,
    success: bool = True,
    finished: bool = True,
    manifest: bool = True,
    video: bool = False,
) -> Path:
    """One run whose scores rise to about ``skill``; returns its folder."""
    folder = root / "runs" / f"{agent}--{suite.replace('/', '_')}--{seed}"
    folder.mkdir(parents=True)
    steps = evaluations * every
    config = {
        "suite": suite,
        "agent": {"kind": agent},
        "steps": steps,
        "seed": seed,
        "copies": 8,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "eval": {"every": every, "episodes": 50, "seed": 1_000_003},
        "log": {"wandb": "off"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rng = np.random.default_rng([seed, len(agent), *agent.encode(), *suite.encode()])
    ease = np.random.default_rng([*suite.encode()]).uniform(0.5, 1.2, len(tasks))
    final = np.clip(skill * ease * rng.normal(1, 0.08, len(tasks)), -0.1, 1.02)
    lines = []
    for k in range(1, (evaluations if finished else evaluations // 2) + 1):
        at = {"step": k * every, "wall": 1.7e9 + k}
        lines.append({**at, "charts/mean_score": 0.1, "time/SPS": speed})
        record: dict[str, Any] = dict(at)
        for task, score in zip(tasks, final * (1 - np.exp(-3 * k / evaluations)) / (1 - np.exp(-3)), strict=True):
            value = float(score + rng.normal(0, 0.02) * (k < evaluations))
            record |= {f"eval/{task}/return": value, f"eval/{task}/score": value, f"eval/{task}/length": 20.0}
            if success:
                share = float(np.clip(value, 0, 1))
                record |= {f"eval/{task}/success": share, f"eval/{task}/success_last": share}
        record["eval/mean_score"] = 0.5
        lines.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    versions = {"python": "3.11.7", "mtrl": "0.1.0", "torch": "2.13.0", "git": "0123456789abcdef"}
    if finished:
        kept = {task: {"protocol": {"package": "toy 1.0", "goals": "50"}, "horizon": 100} for task in tasks}
        (folder / "summary.json").write_text(
            json.dumps({"steps": steps, "versions": versions, "evaluation": {"tasks": kept}, "seconds": 10.0})
        )
    if manifest:
        about = {
            "format": 1,
            "protocol": "1",
            "agent": agent,
            "suite": suite,
            "seed": seed,
            "status": "finished" if finished else "running",
            "command": ["mtrl", "train", f"configs/{agent}.yaml", "--seed", str(seed), "--out", folder.name],
            "versions": versions,
            "hardware": {"cpu": "Some CPU", "cores": 2, "memory": 2**33},
            "attempts": [{"seconds": 12.0, "cpu_seconds": 11.0, "peak_memory": 400 * 2**20}],
        }
        (folder / "manifest.json").write_text(json.dumps(about))
    if video:
        (folder / "videos").mkdir()
        (folder / "videos" / f"best-{steps}.gif").write_bytes(GIF)
    return folder


def write_grid(root: Path, agents: dict[str, float], suites: Sequence[str], seeds: int, **options: Any) -> Path:
    """A grid of finished runs and its spec."""
    for suite in suites:
        for agent, skill in agents.items():
            for seed in range(seeds):
                write_run(root, agent, suite, seed, skill=skill, **options)
    spec = {
        "name": "toy",
        "about": "Made-up runs.",
        "seeds": list(range(seeds)),
        "suites": list(suites),
        "agents": {agent: {"agent": agent} for agent in agents},
        "core_hours": 0.5,
    }
    (root / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return root


@pytest.fixture
def run_writer() -> Callable[..., Path]:
    """``write_run``."""
    return write_run


@pytest.fixture
def grid_writer() -> Callable[..., Path]:
    """``write_grid``."""
    return write_grid
