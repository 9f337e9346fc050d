"""Offline runs of Weights & Biases back into plain records and run folders.

W&B writes no clear text; its own ``wandb leet inspect --json`` prints a ``.wandb`` file's records as JSON lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrl import runs
from mtrl.benchmark.attempt import MANIFEST, RUNS, BenchmarkError
from mtrl.benchmark.spec import PROTOCOL, slug
from mtrl.files import write_text
from mtrl.log import METRICS


@dataclass(frozen=True)
class WandbRun:
    """What an offline run file holds of ours.

    Attributes:
        config: the run's configuration.
        records: as in ``metrics.jsonl``: ``step``, ``wall`` and metrics.
        status: ``finished``, ``interrupted`` or ``failed``; ``unfinished`` if the file ends before the run did.
        group: the W&B group, which is the grid.
    """

    config: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    status: str
    group: str | None


def read(path: Path) -> WandbRun:
    """Read a ``.wandb`` file, or the newest one in a folder.

    Raises:
        BenchmarkError: there is none, or W&B cannot read it.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(_file(path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{path}: W&B cannot read it: {done.stderr.strip() or done.stdout.strip()}")
    config: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    status, group = "unfinished", None
    for line in done.stdout.splitlines():
        record = json.loads(line)
        match record["type"]:
            case "run":
                config |= record["run"].get("config", {}).get("update", {})
                group = record["run"].get("run_group", group)
            case "summary":
                status = record["summary"].get("update", {}).get("status", status)
            case "history":
                item = record["history"]["item"]
                metrics = {key: value for key, value in item.items() if key[0] != "_" and key != "global_step"}
                plain = {key: value for key, value in metrics.items() if not isinstance(value, dict)}  # no media
                if plain and "global_step" in item:
                    records.append({"step": int(item["global_step"]), "wall": item["_timestamp"], **plain})
    config.pop("_wandb", None)
    return WandbRun(config, tuple(records), status, group)


def restore(source: Path, root: Path, agent: str | None = None) -> Path:
    """Make a run folder in ``root`` of an offline run, for the tables and the report; it holds no checkpoint.

    Args:
        source: a ``.wandb`` file or the folder that holds it.
        root: the store's folder.
        agent: what to call it; None: the agent's kind.

    Returns:
        the run's folder.

    Raises:
        BenchmarkError: not one of our runs, or the run is there already.
    """
    found = read(source)
    if "config" not in found.config or not found.records:
        raise BenchmarkError(f"{source} is no run of mtrl train, or one without records")
    label = agent or found.config["agent"]["kind"]
    name = f"{slug(label)}--{slug(found.config['suite'])}--{found.config['seed']}"
    folder = root / RUNS / name
    if (folder / runs.CONFIG).exists():
        raise BenchmarkError(f"{folder} holds a run already")
    step = found.records[-1]["step"]
    about = {"agent": label, "protocol": PROTOCOL, "status": found.status, "restored_from": str(source)}
    write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in found.records))
    write_text(folder / MANIFEST, json.dumps(about, indent=1) + "\n")
    if found.status == "finished":
        write_text(folder / runs.SUMMARY, json.dumps({"steps": step}) + "\n")
    write_text(folder / runs.CONFIG, found.config["config"])  # last: it makes the folder a run
    return folder


def _file(path: Path) -> Path:
    files = (
        [path] if path.suffix == ".wandb" else sorted(path.glob("**/run-*.wandb"), key=lambda one: one.stat().st_mtime)
    )
    if not files or not files[-1].is_file():
        raise BenchmarkError(f"{path} is no .wandb file and holds none")
    return files[-1]
