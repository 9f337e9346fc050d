"""Are two runs the same, bit for bit?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtrl import checkpoint, runs
from mtrl.log import METRICS


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {k: v for key, item in tree.items() for k, v in flatten(item, f"{path}/{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, item in enumerate(tree) for k, v in flatten(item, f"{path}/{i}").items()}
    return {path: tree}


def assert_same_state(first: Path, second: Path) -> None:
    """The newest checkpoints hold the same bits."""
    one, two = (checkpoint.load(out / runs.CHECKPOINTS) for out in (first, second))
    assert one.step == two.step
    left, right = flatten(one.state), flatten(two.state)
    assert left.keys() == right.keys()
    for path, value in left.items():
        other = right[path]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), path
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other, err_msg=path)
        else:
            assert value == other, path


def records(out: Path) -> list[dict[str, Any]]:
    """The run's records without what the clock on the wall decides."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "wall" and not k.startswith("time/")} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    assert_same_state(first, second)
    assert records(first) == records(second)
    one, two = (json.loads((out / runs.SUMMARY).read_text())["evaluation"] for out in (first, second))
    assert one == two


def rewind(source: Path, target: Path, step: int) -> None:
    """A copy of a finished run as it was when the checkpoint at ``step`` had just been written."""
    shutil.copytree(source, target)
    (target / runs.SUMMARY).unlink()
    folder = target / runs.CHECKPOINTS
    for path in folder.glob("step-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    (folder / "latest.json").unlink(missing_ok=True)
