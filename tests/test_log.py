"""The log: JSONL is exact and survives kills and resumes, mirrors never break a run."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mtrl import log, terminal
from mtrl.log import METRICS, Jsonl, Logger
from mtrl.registry import UnknownNameError
from mtrl.sinks import Sink
from mtrl.types import Episode, Journal

F32: Any = np.float32  # what agents may hand over, though the contract says float


def episode(task=0, ret=1.0, success: bool | None = True):
    return Episode(task, 0, 0, 0, ret, 10, success, success, True, Journal("t", 0, np.zeros(10, np.int64)))


def lines(path):
    return [json.loads(line) for line in (path / METRICS).read_text().splitlines()]


def clockless(records):
    return [{k: v for k, v in record.items() if k != "wall" and not k.startswith("time/")} for record in records]


def test_jsonl_lines(tmp_path):
    with Logger(tmp_path, config={}, total_steps=100, sinks=["jsonl"]) as logger:
        logger.log({"charts/mean_return": 0.1 + 0.2, "charts/episodes": 3, "losses/value": F32(0.1)}, 10)
        assert len(lines(tmp_path)) == 1, "a record is on the disk at once"
        logger.evaluation({"eval/a/b/success": 1.0}, 20)
        logger.episode("a/b", episode(), 21, 0.5)
        logger.notice("not a record")
    first, second = lines(tmp_path)
    assert list(first) == ["step", "wall", "charts/mean_return", "charts/episodes", "losses/value"]
    assert first["charts/mean_return"] == 0.1 + 0.2
    assert first["charts/episodes"] == 3
    assert isinstance(first["charts/episodes"], int)
    assert first["losses/value"] == float(np.float32(0.1))
    assert clockless([second]) == [{"step": 20, "eval/a/b/success": 1.0}]


def test_non_finite_values_are_valid_json(tmp_path):
    with Logger(tmp_path, config={}, total_steps=1, sinks=["jsonl"]) as logger:
        logger.log({"a": math.nan, "b": math.inf, "c": F32(-np.inf), "d": 1.0}, 0)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert [record[key] for key in "abcd"] == ["nan", "inf", "-inf", 1.0]
    (read,) = log.read(tmp_path / METRICS)
    assert math.isnan(read["a"])
    assert (read["b"], read["c"], read["d"]) == (math.inf, -math.inf, 1.0)


def run(out, steps, resume_at=None):
    with Logger(out, config={}, total_steps=100, sinks=["jsonl"], resume_at=resume_at) as logger:
        for step in steps:
            logger.log({"charts/x": step / 3, "losses/y": math.nan, "time/SPS": np.random.default_rng().random()}, step)
            if step % 20 == 0:
                logger.evaluation({"eval/mean_score": step * 0.1}, step)


@pytest.mark.parametrize("checkpoint", [0, 10, 40, 45, 70, 100])
@pytest.mark.parametrize("tail", ["", '{"step": 80, "wa', "\0\0\0"])
def test_a_resumed_log_equals_the_uninterrupted_one(checkpoint, tail, tmp_path):
    run(tmp_path / "whole", range(10, 101, 10))
    run(tmp_path / "parts", range(10, 71, 10))  # killed at 70, the last checkpoint is older or newer than a record
    with (tmp_path / "parts" / METRICS).open("a") as file:
        file.write(tail)
    run(tmp_path / "parts", [s for s in range(10, 101, 10) if s > min(checkpoint, 70)], resume_at=checkpoint)
    assert clockless(lines(tmp_path / "parts")) == clockless(lines(tmp_path / "whole"))
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_resuming_without_a_checkpoint_starts_a_new_file(tmp_path):
    run(tmp_path, [10, 20])
    run(tmp_path, [10])
    assert [record["step"] for record in lines(tmp_path)] == [10]
    Jsonl(tmp_path / "new" / METRICS, resume_at=5).close("finished")  # nothing to cut
    assert (tmp_path / "new" / METRICS).read_text() == ""


def test_unknown_sink(tmp_path):
    with pytest.raises(UnknownNameError, match=r"unknown sink 'wanbd'; did you mean 'wandb'\?"):
        Logger(tmp_path, config={}, total_steps=1, sinks=["wanbd"])


def test_plain_lines(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with Logger(tmp_path, config={}, total_steps=2_000_000, sinks=["terminal"], resume_at=1000) as logger:
        logger.episode("a/b", episode(), 1500, 0.5)
        logger.log({"charts/mean_return": 1234.5}, 1000)
        clock[0] = 10.0
        logger.log({"charts/mean_return": 0.5, "charts/mean_success_rate": 0.25, "time/SPS": 99.6}, 2000)
        clock[0] = 30.0
        logger.log({"losses/value": 1.0}, 3000)
        logger.evaluation({"eval/a/b/score": 0.5, "eval/mean_score": 0.5, "eval/mean_success": 1.0}, 3000)
        logger.notice("resumed")
    assert capsys.readouterr().out.splitlines() == [
        "  0%  1,000/2,000,000 steps  0 steps/s  -:--:-- left  return 1,234",
        "  0%  2,000/2,000,000 steps  100 steps/s  5:33:00 left  return 0.5  success 0.25",
        "  0%  3,000/2,000,000 steps  67 steps/s  8:19:15 left",
        "evaluation at step 3,000:  score 0.5  success 1",
        "resumed",
    ]


def display(width, height, tasks, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=width, height=height, force_terminal=True, color_system=None, **options)
    return terminal.Display(1000, tasks, 0, "ppo a/b", console), stream


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (40, 10), (10, 3), (1, 1)])
def test_live_display_on_any_terminal(width, height):
    tasks = [f"suite/task-{i}" for i in range(30)]
    shown, stream = display(width, height, tasks)
    for i, task in enumerate(tasks):
        shown.episode(task, episode(i, float(i), i % 3 > 0 if i % 2 else None), 100 + i, i / 30)
    shown.log({"losses/policy": -0.5, "losses/value": math.nan, "time/SPS": 10.0}, 500)
    shown.evaluation({"eval/suite/task-1/success": 0.75, "eval/mean_success": 0.75}, 500)
    shown.notice("a notice")
    shown.close("finished")
    text = stream.getvalue()
    assert text.count("\x1b[?25l") == 1
    assert text.endswith("\x1b[?25h") or text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor comes back"


def test_live_display_shows_the_tasks():
    shown, stream = display(120, 40, ["suite/easy", "suite/hard", "suite/new"])
    for ret, success in ((1.0, True), (3.0, False)):
        shown.episode("suite/easy", episode(0, ret, success), 10, ret / 4)
    shown.episode("suite/hard", episode(1, -7.0, None), 11, -0.1)
    shown.evaluation({"eval/suite/easy/success": 0.75, "eval/mean_success": 0.75}, 500)
    stream.truncate(0)
    shown.log({"losses/policy": -0.5}, 250)
    words = [line.split() for line in stream.getvalue().splitlines()]
    shown.close("finished")
    assert ["suite/easy", "2", "2", "0.5"] in [line[:4] for line in words]
    assert any(line[:1] == ["suite/easy"] and "50%" in line and line[-1] == "0.75" for line in words)
    assert any(line[:4] == ["suite/hard", "1", "-7", "-0.1"] and line[-1] == "-" for line in words)
    assert any(line[:2] == ["suite/new", "0"] for line in words)
    assert any("25%" in line and "250/1,000" in line for line in words)
    assert ["policy", "-0.5"] in words


def test_live_display_prefers_unsolved_tasks_when_there_is_no_room():
    tasks = [f"suite/task-{i}" for i in range(30)]
    shown, stream = display(120, 12, tasks)
    for i, task in enumerate(tasks):
        shown.episode(task, episode(i), i, 1 - i / 30)
    stream.truncate(0)
    shown.log({}, 30)
    text = stream.getvalue()
    shown.close("finished")
    assert "suite/task-29" in text
    assert "suite/task-0 " not in text
    assert "... and 25 more" in text


def test_an_exception_gives_the_terminal_back(tmp_path, monkeypatch):
    shown, stream = display(80, 24, ["a/b"])
    monkeypatch.setattr(terminal, "terminal", lambda *args: shown)
    with pytest.raises(KeyboardInterrupt), Logger(tmp_path, config={}, total_steps=1, sinks=["terminal"]):
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


class Broken(Sink):
    def __init__(self):
        self.calls = []

    def log(self, metrics, step):
        self.calls.append("log")
        raise OSError("the server is gone")

    def close(self, status):
        self.calls.append(f"close {status}")


def test_a_broken_mirror_is_dropped_and_the_run_goes_on(tmp_path, caplog):
    broken = Broken()
    with Logger(tmp_path, config={}, total_steps=1, sinks=["jsonl"]) as logger:
        logger._mirrors.append(broken)
        for step in range(3):
            logger.log({"x": 1.0}, step)
    assert broken.calls == ["log", "close failed"]
    assert [record.getMessage() for record in caplog.records] == [
        "Broken is off from now on: OSError: the server is gone"
    ]
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (ValueError(), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(), "interrupted")],
)
def test_how_a_run_ended(error, status, tmp_path):
    class Last(Sink):
        status = ""

        def close(self, status):
            assert not self.status, "closed once"
            self.status = status

    last = Last()
    logger = Logger(tmp_path, config={}, total_steps=1, sinks=["jsonl"])
    logger._mirrors.append(last)
    try:
        with logger:
            if error is not None:
                raise error
            logger.close()
    except (ValueError, KeyboardInterrupt, SystemExit) as raised:
        assert raised is error  # noqa: PT017
    assert last.status == status


_WANDB = """
import sys
from pathlib import Path
from mtrl.log import Logger
out = Path(sys.argv[1])
about = {"group": "ppo probe", "tags": ["test"], "sinks": ["jsonl", "wandb"]}
with Logger(out, config={"suite": "a/b"}, total_steps=10, **about) as logger:
    logger.log({"charts/mean_return": 0.5}, 5)
    logger.summary({"eval/mean_score": 0.25})
with Logger(out, config={"suite": "a/b"}, total_steps=10, resume_at=5, **about) as logger:
    logger.log({"charts/mean_return": 0.75}, 10)
"""


def test_wandb_without_an_account_is_offline_and_one_run(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", _WANDB, str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "off from now on" not in done.stderr
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert {path.name for path in files} == {files[0].name}, "a resumed run keeps its id"
    assert b"charts/mean_return" in b"".join(path.read_bytes() for path in files)
    assert [record["step"] for record in lines(tmp_path / "run")] == [5, 10]


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Logger(tmp_path, config={"suite": "a/b"}, total_steps=10, sinks=["tensorboard"]) as logger:
        for step in (1, 2):
            logger.log({"charts/x": step / 2}, step)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("charts/x")] == [(1, 0.5), (2, 1.0)]


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'mtrl-suite\[track\]'"):
        Logger(tmp_path, config={}, total_steps=1, sinks=["tensorboard"])


def test_light_imports():
    code = "import mtrl.log, sys; print([m for m in ('torch', 'wandb', 'tensorboard', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert Path(log.__file__).exists()
