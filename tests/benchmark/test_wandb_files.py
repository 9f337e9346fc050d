"""Offline W&B runs read back equal what ``metrics.jsonl`` holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtrl.benchmark import store
from mtrl.benchmark.attempt import BenchmarkError
from mtrl.benchmark.wandb_files import read, restore
from mtrl.config import dump_config, parse_config
from mtrl.log import METRICS, Logger
from mtrl.log import read as read_jsonl


def test_an_offline_run_comes_back_whole(tmp_path: Path) -> None:
    settings = parse_config(
        {
            "suite": "mtrl.testing:Probes/discrete",
            "agent": "random",
            "steps": 200,
            "seed": 3,
            "threads": 1,
            "workers": 0,
        }
    )
    plain = {**settings.model_dump(mode="json"), "config": dump_config(settings)}
    out = tmp_path / "run"
    sinks = ("jsonl", "wandb")
    with Logger(out, config=plain, total_steps=200, sinks=sinks, wandb_mode="offline", group="grid") as logger:
        for step in (100, 200):
            logger.log({"charts/mean_return": step / 7, "time/SPS": 50.0}, step)
            logger.evaluation({"eval/probe/delay/score": step / 300, "eval/probe/delay/success": 1.0}, step)
    found = read(out)
    truth = read_jsonl(out / METRICS)
    assert [{**one, "wall": 0} for one in found.records] == [{**one, "wall": 0} for one in truth]
    assert (found.status, found.group) == ("finished", "grid")
    assert found.config["suite"] == settings.suite

    folder = restore(out, tmp_path / "store", agent="from W&B")
    (run,) = store.load(tmp_path / "store").runs
    assert (run.agent, run.suite, run.seed, run.status) == ("from W&B", settings.suite, 3, "finished")
    assert [row["score"] for row in run.rows] == [100 / 300, 200 / 300]
    assert run.cost is not None
    assert run.cost.seconds == pytest.approx(4.0)
    with pytest.raises(BenchmarkError, match="holds a run already"):
        restore(out, tmp_path / "store", agent="from W&B")
    assert folder.name == "from_W_B--mtrl.testing_Probes_discrete--3"


def test_what_is_no_offline_run(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"is no \.wandb file and holds none"):
        read(tmp_path)
    (tmp_path / "run-x.wandb").write_text("nonsense")
    with pytest.raises(BenchmarkError):
        restore(tmp_path, tmp_path / "store")
