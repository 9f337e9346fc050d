"""Grids: killed and resumed ones end with the same bits, failures stay where they are, nothing runs twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from mtrl import runs
from mtrl.benchmark import attempt, store
from mtrl.benchmark.attempt import Attempt, BenchmarkError, folder_of
from mtrl.benchmark.engine import Local, run_grid
from mtrl.benchmark.progress import Board
from mtrl.benchmark.spec import Job, Spec, dump_spec, parse_spec, plan, slug

# A stand-in for `mtrl train` that starts at once: counts to 50 in a checkpoint of its own, then writes a summary.
FAKE = """
import json, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1]); how = sys.argv[2]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
state = out / "state"
step = int(state.read_text()) if state.exists() else 0
with (out / "starts").open("a") as file: print(step, file=file)
if how == "fail": print("the cause"); sys.exit(1)
if how == "explain": print("error: the cause\\nand what follows from it"); sys.exit(1)
if how == "end": signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.raise_signal(signal.SIGTERM)
while step < 50 and not stopped:
    time.sleep(0.02 if how == "slow" else 0); step += 1
state.write_text(str(step))
if step < 50: sys.exit(128 + 15)
(out / "summary.json").write_text(json.dumps({"steps": 1000}))
"""


def spec(**changes: Any) -> Spec:
    return parse_spec(
        {
            "name": "tiny",
            "seeds": 2,
            "run": {
                "steps": 600,
                "copies": 2,
                "eval": {"every": 300, "episodes": 2},
                "checkpoint": {"every": 60},
                "log": {"every": 100, "wandb": "off"},
            },
            "suites": ["mtrl.testing:Probes/discrete"],
            "agents": {"ppo": {"agent": {"kind": "ppo", "rollout": 16, "epochs": 1, "minibatches": 2}}},
            **changes,
        }
    )


def board() -> Board:
    return Board(Console(quiet=True))


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Runs are stand-ins; the mapping says how each behaves: "fail", "slow", or at once."""
    behaviour: dict[str, str] = {}

    def command(job: Job, root: Path) -> list[str]:
        return [sys.executable, "-c", FAKE, str(folder_of(root, job)), behaviour.get(job.name, "")]

    monkeypatch.setattr(attempt, "_command", command)
    return behaviour


def starts(root: Path, name: str) -> int:
    return len((root / attempt.RUNS / name / "starts").read_text().splitlines())


def test_a_killed_grid_resumes_to_the_same_table_bit_for_bit(tmp_path: Path) -> None:
    small = spec(seeds=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_grid(small, whole, Local(1), board()).complete

    (tmp_path / "spec.yaml").write_text(dump_spec(small))
    command = [sys.executable, "-m", "mtrl.cli", "benchmark", str(tmp_path / "spec.yaml"), "--out", str(broken)]
    engine = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(broken.glob("runs/*/checkpoints/step-*/manifest.json")))
    for process in [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]:
        process.kill()
    engine.wait()
    assert not list(broken.glob(f"runs/*/{runs.SUMMARY}")), "killed too late to show anything"
    with pytest.raises(BenchmarkError, match="already holds a grid: go on with --resume"):
        run_grid(small, broken, Local(1), board())
    assert run_grid(small, broken, Local(1), board(), resume=True).complete

    for root in (whole, broken):
        store.write_tables(store.load(root))
    assert (broken / store.RESULTS).read_bytes() == (whole / store.RESULTS).read_bytes()
    found = store.load(broken)
    assert [run.status for run in found.runs] == ["finished"]
    manifest = json.loads((found.runs[0].folder / attempt.MANIFEST).read_text())
    assert manifest["protocol"] == "1"
    assert manifest["benchmark"] == "tiny"
    assert manifest["hardware"]["cores"]
    assert manifest["versions"]["torch"]
    assert len(manifest["attempts"]) == 2
    assert manifest["attempts"][-1]["cpu_seconds"] > 0
    assert manifest["attempts"][-1]["peak_memory"] > 1e7
    assert manifest["command"][:2] == ["mtrl", "train"]


def test_finished_runs_are_never_done_again(tmp_path: Path, fake: dict[str, str]) -> None:
    first = run_grid(spec(), tmp_path, Local(1), board())
    assert first.complete
    grown = spec(seeds=3)
    again = run_grid(grown, tmp_path, Local(1), board(), resume=True)
    assert (again.total, again.done_before, len(again.outcomes)) == (3, 2, 1)
    assert again.complete
    assert [starts(tmp_path, job.name) for job in plan(grown)] == [1, 1, 1]


def test_the_reason_is_the_error_and_an_early_signal_is_no_failure(tmp_path: Path, fake: dict[str, str]) -> None:
    first, second = plan(spec())
    fake |= {first.name: "explain", second.name: "end"}
    grid = run_grid(spec(), tmp_path, Local(2), board())
    found = {outcome.job.name: outcome for outcome in grid.outcomes}
    assert found[first.name].reason == "error: the cause"
    assert found[second.name].status == "interrupted"  # as with SIGKILL, it was asked to end


def test_runs_wait_for_those_they_start_from(tmp_path: Path, fake: dict[str, str]) -> None:
    suite = slug(*spec().suites)
    learned = {"init": {"run": f"{{runs}}/source--{suite}--{{seed}}", "freeze": True}}
    agents = {"later": learned, "source": {}, "apart": {"init": {"freeze": True}}}
    grid = run_grid(spec(agents=agents), tmp_path, Local(4), board())
    assert grid.complete
    assert {outcome.job.agent for outcome in grid.outcomes[:4]} == {"source", "apart"}
    assert {outcome.job.agent for outcome in grid.outcomes[4:]} == {"later"}


def test_a_failed_run_is_reported_and_stops_no_other(tmp_path: Path, fake: dict[str, str]) -> None:
    first, second = plan(spec())
    fake[first.name] = "fail"
    grid = run_grid(spec(), tmp_path, Local(2), board())
    assert {outcome.job.name: outcome.status for outcome in grid.outcomes} == {
        first.name: "failed",
        second.name: "finished",
    }
    assert grid.failed[0].reason == "the cause"
    assert not grid.complete
    assert json.loads((folder_of(tmp_path, first) / attempt.MANIFEST).read_text())["status"] == "failed"
    fake.clear()
    assert run_grid(spec(), tmp_path, Local(2), board(), resume=True).complete
    assert starts(tmp_path, second.name) == 1


def test_an_interrupt_saves_every_run(tmp_path: Path, fake: dict[str, str]) -> None:
    jobs = plan(spec(seeds=3))
    fake.update({job.name: "slow" for job in jobs})

    class Interrupting(Board):
        def refresh(self) -> None:
            if all((folder_of(tmp_path, job) / "starts").exists() for job in jobs[:2]):
                os.kill(os.getpid(), signal.SIGINT)

    grid = run_grid(spec(seeds=3), tmp_path, Local(2), Interrupting(Console(quiet=True)))
    assert grid.signal == signal.SIGINT
    assert [outcome.status for outcome in grid.outcomes] == ["interrupted", "interrupted"]
    assert all((folder_of(tmp_path, job) / "state").exists() for job in jobs[:2])
    assert not folder_of(tmp_path, jobs[2]).exists()
    fake.clear()
    assert run_grid(spec(seeds=3), tmp_path, Local(2), board(), resume=True).complete


def test_an_orphan_is_stopped_before_its_run_goes_on(tmp_path: Path, fake: dict[str, str]) -> None:
    """An engine killed with -9 leaves its runs behind: they must not be trained twice at once."""
    job = plan(spec())[0]
    fake[job.name] = "slow"
    orphan = Attempt(job, tmp_path, "tiny", "local")
    wait_for((folder_of(tmp_path, job) / "starts").exists)
    fake.clear()
    successor = Attempt(job, tmp_path, "tiny", "local")  # returns when the orphan has ended
    left = orphan.poll()
    assert left is not None
    assert left.status == "interrupted"
    wait_for(lambda: successor.poll() is not None)
    begun = [int(line) for line in (folder_of(tmp_path, job) / "starts").read_text().split()]
    assert begun[0] == 0
    assert begun[1] > 0, "started again from nothing"


def test_a_changed_spec_is_not_mixed_with_old_runs(tmp_path: Path) -> None:
    job = plan(spec())[0]
    runs.start(folder_of(tmp_path, job), job.config)
    other = spec(run={**spec().run, "copies": 3})
    with pytest.raises(BenchmarkError, match=r"started with other settings \(copies\)"):
        run_grid(other, tmp_path, Local(1), board(), resume=True)


def test_settings_that_came_later_do_not_stop_a_grid(tmp_path: Path, fake: dict[str, str]) -> None:
    job = plan(spec())[0]
    runs.start(folder_of(tmp_path, job), job.config)
    path = folder_of(tmp_path, job) / runs.CONFIG
    config = yaml.safe_load(path.read_text())
    del config["patience"], config["eval"]["video"]
    path.write_text(yaml.safe_dump(config))
    assert run_grid(spec(), tmp_path, Local(1), board(), resume=True).complete


def test_a_changed_spec_is_not_mixed_with_runs_of_seeds_that_it_names_no_more(tmp_path: Path) -> None:
    job = plan(spec())[0]
    runs.start(folder_of(tmp_path, job), job.config)
    about = {"agent": job.agent, "suite": job.suite, "config": job.config.model_dump(mode="json")}
    (folder_of(tmp_path, job) / attempt.MANIFEST).write_text(json.dumps(about))
    other = spec(run={**spec().run, "copies": 3}, seeds=[7])
    with pytest.raises(BenchmarkError, match=r"of the same agent, was started with other settings \(copies\)"):
        run_grid(other, tmp_path, Local(1), board(), resume=True)


def test_one_engine_a_grid(tmp_path: Path, fake: dict[str, str]) -> None:
    class Intruding(Board):
        def begin(self, jobs: Sequence[Job], todo: Sequence[Job], root: Path) -> None:
            with pytest.raises(BenchmarkError, match="another process runs the grid"):
                run_grid(spec(), tmp_path, Local(1), board(), resume=True)

    assert run_grid(spec(), tmp_path, Local(1), Intruding(Console(quiet=True))).complete
