"""The loop: exact resume on every backend, interruptions, faults, records."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch

from mtrl import checkpoint, registry, runs
from mtrl.config import ConfigError, RunConfig, parse_config
from mtrl.evaluate import Evaluation, evaluate
from mtrl.log import METRICS, Logger
from mtrl.train import train
from mtrl.types import Journal
from mtrl.vector import EnvironmentFailedError, replay
from mtrl_agents.ppo import PPO as PPOAgent
from tests.sameness import assert_same_run, assert_same_state, flatten, records, rewind

PPO = {"kind": "ppo", "rollout": 16, "epochs": 2}
SAC = {
    "kind": "sac",
    "trunk": {"kind": "multi_head", "widths": [32, 32]},
    "warmup": 40,
    "batch_size": 8,
    "log_every": 7,
}


def config(agent: Mapping[str, Any], suite: str, **changes: Any) -> RunConfig:
    return parse_config(
        {
            "suite": suite,
            "agent": dict(agent),
            "steps": 1200,
            "copies": 2,
            "workers": 0,
            "threads": 1,
            "eval": {"every": 500, "episodes": 3},
            "checkpoint": {"every": 250, "keep": 9},
            "log": {"every": 110, "window": 5, "terminal": False, "wandb": "off"},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("agent", "suite"),
    [
        (PPO, "mtrl.testing:Probes/mix"),
        ({**PPO, "memory": 8}, "mtrl.testing:Probes/memory"),
        (PPO, "mtrl.testing:Probes/team"),
        ({**SAC, "average": 0.9}, "mtrl.testing:Probes/continuous"),
        ({"kind": "random"}, "mtrl.testing:Probes/mix"),
    ],
    ids=["ppo-mix", "ppo-memory", "ppo-team", "sac", "random"],
)
def test_resume_is_exact_on_both_backends(agent: Mapping[str, Any], suite: str, tmp_path: Path) -> None:
    settings = config(agent, suite)
    train(settings, tmp_path / "whole")
    train(settings.model_copy(update={"workers": 2}), tmp_path / "workers")
    assert_same_run(tmp_path / "whole", tmp_path / "workers")
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "whole" / runs.CHECKPOINTS).glob("step-*"))
    assert len(saved) >= 4
    for step, workers in ((saved[0], 0), (saved[2], 2)):
        out = tmp_path / f"resumed-{step}"
        rewind(tmp_path / "whole", out, step)
        train(settings.model_copy(update={"workers": workers}), out, resume=True)
        assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "suite"),
    [(PPO, "minigrid/mt3+metaworld/reach"), (SAC, "metaworld/mt3")],
    ids=["ppo", "sac"],
)
def test_resume_is_exact_on_real_tasks(agent: Mapping[str, Any], suite: str, tmp_path: Path) -> None:
    """Interrupted in the middle of episodes: their journals are replayed, in process and in workers."""
    settings = config(agent, suite, steps=4000, checkpoint={"every": 900, "keep": 9}, eval={"episodes": 2})
    train(settings, tmp_path / "whole")
    rewind(tmp_path / "whole", tmp_path / "resumed", 1900)
    train(settings.model_copy(update={"workers": 2}), tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def command(settings: RunConfig, out: Path) -> list[str]:
    options = [
        f"{key}.{name}={json.dumps(value)}"
        for key in ("agent", "eval", "checkpoint", "log")
        for name, value in settings.model_dump(mode="json")[key].items()
        if value is not None
    ]
    plain = [f"copies={settings.copies}", f"workers={settings.workers}", f"threads={settings.threads}"]
    head = [sys.executable, "-m", "mtrl.cli", "train", "--suite", settings.suite, "--steps", str(settings.steps)]
    return [*head, "--out", str(out), *plain, *options]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_process_resumes_exactly(number: signal.Signals, tmp_path: Path) -> None:
    settings = config(PPO, "mtrl.testing:Probes/mix", steps=60_000, eval={"episodes": 2}, workers=1)
    settings = settings.model_copy(update={"checkpoint": settings.checkpoint.model_copy(update={"every": 500})})
    out = tmp_path / "broken"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(settings, out), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/step-*/manifest.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        status = process.wait(60)
    text = (tmp_path / "log").read_text()
    assert not (out / runs.SUMMARY).exists(), "the run ended before it could be interrupted"
    if number != signal.SIGKILL:
        assert status == 128 + number, text
        assert "go on with: mtrl train --resume" in text.replace("\n", " ")
    head = [sys.executable, "-m", "mtrl.cli", "train", "--resume", str(out), "--steps", "4000"]
    subprocess.run(head, check=True, capture_output=True)
    train(settings.model_copy(update={"steps": 4000}), tmp_path / "whole")
    if checkpoint.load(out / runs.CHECKPOINTS).step == checkpoint.load(tmp_path / "whole" / runs.CHECKPOINTS).step:
        assert_same_run(tmp_path / "whole", out)
    else:  # the signal came later than 4,000 steps: then nothing was left to do
        assert checkpoint.load(out / runs.CHECKPOINTS).step > 4000


@pytest.mark.parametrize("call", [1, 2, 3, 5], ids=["greedy", "sampled", "greedy, later", "at the end"])
def test_a_signal_stops_an_evaluation_which_a_resumed_run_does(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(PPO, "mtrl.testing:Probes/mix", eval={"every": 500, "episodes": 3, "stochastic": True})
    train(settings, tmp_path / "whole")
    calls = itertools.count(1)

    def disturbed(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr("mtrl.train.evaluate", disturbed)
    summary = train(settings, tmp_path / "broken")
    assert (summary.signal, summary.evaluation) == (signal.SIGTERM, None)
    assert not (tmp_path / "broken" / runs.SUMMARY).exists()
    found = [row["step"] for row in records(tmp_path / "broken") if "eval/mean_score" in row]
    assert len(found) == (call - 1) // 2
    train(settings, tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_folder_is_not_overwritten(tmp_path: Path) -> None:
    settings = config({"kind": "random"}, "mtrl.testing:Probes/discrete", steps=50)
    train(settings, tmp_path / "x")
    with pytest.raises(runs.RunError, match="already holds a run: resume it"):
        train(settings, tmp_path / "x")
    with pytest.raises(runs.RunError, match=r"holds no run.*did you mean .*x\?"):
        runs.config_of(tmp_path / "xx")


def test_resuming_a_complete_run_and_one_without_checkpoints(tmp_path: Path) -> None:
    settings = config({"kind": "random"}, "mtrl.testing:Probes/discrete", steps=50)
    train(settings, tmp_path / "x")
    with pytest.raises(runs.RunError, match="is complete at step"):
        train(settings, tmp_path / "x", resume=True)
    more = settings.model_copy(update={"steps": 120})
    train(more, tmp_path / "x", resume=True)
    train(more, tmp_path / "y")
    assert_same_state(tmp_path / "x", tmp_path / "y")

    runs.start(tmp_path / "z", more)  # killed while it wrote its first checkpoint
    (tmp_path / "z" / runs.CHECKPOINTS / "step-24.tmp").mkdir(parents=True)
    train(more, tmp_path / "z", resume=True)
    assert_same_run(tmp_path / "y", tmp_path / "z")


def test_a_non_finite_loss_stops_the_run_and_names_the_place(tmp_path: Path) -> None:
    settings = config({**PPO, "lr": 1e30}, "mtrl.testing:Probes/continuous", steps=4000, checkpoint={"every": 100})
    with pytest.raises(FloatingPointError, match=r"at environment step \d+; last good checkpoint: .*step-"):
        train(settings, tmp_path / "x")
    saved = checkpoint.load(tmp_path / "x" / runs.CHECKPOINTS)
    policy = [v for v in flatten(saved.state["agent"]["policy"]).values() if isinstance(v, torch.Tensor)]
    assert policy
    assert all(bool(torch.isfinite(value).all()) for value in policy)


def test_a_killed_worker_does_not_change_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = config(PPO, "mtrl.testing:Probes/both", workers=2, steps=600)
    train(calm, tmp_path / "calm")
    observe, killed = PPOAgent.observe, []

    def kill_now_and_then(self: PPOAgent, step: Any) -> None:
        observe(self, step)
        if len(killed) < 3:
            victims = [child for child in psutil.Process().children() if "mtrl.vector.workers" in str(child.cmdline())]
            victims[len(killed) % 2].kill()
            killed.append(victims[0].pid)

    monkeypatch.setattr(PPOAgent, "observe", kill_now_and_then)
    train(calm, tmp_path / "hit")
    assert len(killed) == 3
    assert_same_state(tmp_path / "calm", tmp_path / "hit")
    assert records(tmp_path / "calm") == records(tmp_path / "hit")


@pytest.mark.parametrize("workers", [0, 2, "auto"])
def test_a_runs_evaluations_use_its_workers(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, told, fault = [], [], "worker 1 was killed\nat a step"

    def evaluated(*args: Any, **settings: Any) -> Evaluation:
        given.append((settings["workers"], settings["patience"]))
        return dataclasses.replace(evaluate(*args, **settings), faults=(fault,))

    monkeypatch.setattr("mtrl.train.evaluate", evaluated)
    monkeypatch.setattr(Logger, "notice", lambda self, text: told.append(text))
    options = {"workers": workers, "patience": 50, "eval": {"episodes": 2, "stochastic": True}}
    train(config({"kind": "random"}, "mtrl.testing:Probes/mix", steps=20, **options), tmp_path / "x")
    assert given == [(workers, 50)] * 2
    assert told.count("replaced a worker: worker 1 was killed") == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_always_fails_leaves_its_episode(tmp_path: Path, workers: int) -> None:
    broken = config({"kind": "random"}, "tests.vector.probes:Probes/faulty-raise", workers=workers)
    with pytest.raises(runs.RunError, match=r"(?s)the physics exploded.*failure.json; there is no checkpoint yet"):
        train(broken, tmp_path / "x")
    found = json.loads((tmp_path / "x" / runs.FAILURE).read_text())
    assert found["task"] == "probe/faulty-raise"
    assert len(found["actions"]) == 3
    assert re.search(r"probes\.py.*, line \d+, in step", found["traceback"])
    assert re.search(r"step 3\): raised .* at .*probes\.py:\d+", found["error"])
    (task,) = registry.tasks("tests.vector.probes:Probes/faulty-raise")
    with pytest.raises(EnvironmentFailedError, match="the physics exploded"):
        replay(task, Journal(found["task"], found["seed"], np.array(found["actions"])))


def test_a_run_can_end_with_videos(tmp_path: Path) -> None:
    settings = config({"kind": "random"}, "minigrid/Empty-5x5", steps=20, eval={"episodes": 2, "video": True})
    train(settings, tmp_path / "x")
    videos = sorted(path.name for path in (tmp_path / "x" / runs.VIDEOS).iterdir())
    assert [name.partition("-")[0] for name in videos] == ["best", "worst"]


def test_export_and_load_act_alike(tmp_path: Path) -> None:
    settings = config(PPO, "mtrl.testing:Probes/discrete", steps=200)
    train(settings, tmp_path / "x")
    runs.export(tmp_path / "x", tmp_path / "policy")
    whole, alone = runs.load(tmp_path / "x"), runs.load(tmp_path / "policy")
    saved = checkpoint.load(tmp_path / "policy" / runs.CHECKPOINTS).state
    assert list(saved) == ["agent"]
    assert list(saved["agent"]) == ["policy"]
    rng = np.random.default_rng(0)
    for task in whole.tasks:
        observation = rng.uniform(-1, 1, 2).astype(np.float32)
        assert whole.act(observation, task.name) == alone.act(observation, task.name)
    with pytest.raises(ValueError, match="did you mean 'probe/constant'"):
        whole.act(np.zeros(2, np.float32), "probe/constan")
    with pytest.raises(TypeError, match=r"probe/constant: the observation does not fit its space Box.*\(5,\)"):
        whole.act(np.zeros(5, np.float32), "probe/constant")


def test_an_extended_run_that_is_interrupted_can_be_resumed(tmp_path: Path) -> None:
    settings = config({"kind": "random"}, "mtrl.testing:Probes/mix", steps=300)
    out = tmp_path / "run"
    train(settings, out)
    last = checkpoint.load(out / runs.CHECKPOINTS)
    shutil.copytree(last.path, last.path.with_suffix(".bak"))  # a user's copy is no checkpoint of ours
    longer = settings.model_copy(update={"steps": 900})
    with runs.claimed(out, longer, last.step, resume=True):  # as far as an interrupted one gets, at the least
        with pytest.raises(runs.RunError, match="another process trains"):
            train(longer, out, resume=True)
        runs.go_on(out, longer)
        assert not (out / runs.SUMMARY).exists()
    summary = train(runs.config_of(out), out, resume=True)
    assert summary.steps >= 900
    with pytest.raises(runs.RunError, match="is complete"):
        train(longer, out, resume=True)
    assert (out / runs.SUMMARY).exists()


def test_what_costs_no_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that cannot be drawn, and steps too few for one update."""
    told: list[str] = []
    monkeypatch.setattr(Logger, "notice", lambda self, text: told.append(text))
    train(config(PPO, "mtrl.testing:Probes/discrete", steps=20, eval={"episodes": 2, "video": True}), tmp_path / "run")
    assert (tmp_path / "run" / runs.SUMMARY).exists()
    assert any(text.startswith("no update was recorded: ") for text in told)
    assert any(text.startswith("no video: task 'probe/") for text in told)


def test_a_policy_alone_is_not_trained_further(tmp_path: Path) -> None:
    settings = config({"kind": "random"}, "mtrl.testing:Probes/mix", steps=300)
    train(settings, tmp_path / "run")
    runs.export(tmp_path / "run", tmp_path / "policy")
    with pytest.raises(runs.RunError, match="holds a policy alone"):
        train(settings, tmp_path / "policy", resume=True)
    assert not (tmp_path / "policy" / METRICS).exists()


def test_a_policy_made_on_a_gpu_loads_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(PPO, "mtrl.testing:Probes/discrete", steps=200)
    train(settings, tmp_path / "run")
    path = tmp_path / "run" / runs.CONFIG
    path.write_text(path.read_text().replace("device: auto", "device: cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(runs.load(tmp_path / "run").agent.device) == "cpu"  # type: ignore[attr-defined]


def test_a_run_that_cannot_be_resumed_keeps_what_it_has(tmp_path: Path) -> None:
    settings = config(PPO, "mtrl.testing:Probes/both", steps=300)
    train(settings, tmp_path / "x")
    before = {name: (tmp_path / "x" / name).read_text() for name in (runs.CONFIG, runs.SUMMARY)}
    with pytest.raises((RuntimeError, ValueError)):  # the networks have other sizes
        train(
            settings.model_copy(update={"steps": 600, "agent": {**settings.agent, "head": [7]}}),
            tmp_path / "x",
            resume=True,
        )
    assert {name: (tmp_path / "x" / name).read_text() for name in before} == before


class Wider(gym.ObservationWrapper[Any, Any, Any]):
    """One number more is seen."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        width = env.observation_space.shape[0] + 1  # type: ignore[index] # a Box has a shape
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (width,), np.float32)

    def observation(self, observation: Any) -> Any:
        return np.append(observation, np.float32(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: tasks[::-1], "was trained on {names}, which now are {reversed}: bring the environments"),
        (lambda tasks: tasks[:1], "was trained on {names}, which now are {first}: bring the environments"),
        (
            lambda tasks: [
                dataclasses.replace(one, build=lambda one=one: Wider(one.build()), spaces=None) for one in tasks
            ],
            "was trained when {first} had vector 2 float32; 2 actions; now it has vector 3 float32; 2 actions: ",
        ),
    ],
)
def test_tasks_that_changed_since_a_checkpoint_are_named(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(PPO, "mtrl.testing:Probes/discrete", steps=300)
    train(settings, tmp_path / "run")
    runs.export(tmp_path / "run", tmp_path / "policy")
    found = registry.mix(settings.suite)
    tasks = change(found.tasks)
    names = [task.name for task in found.tasks]
    said = message.format(names=", ".join(names), reversed=", ".join(names[::-1]), first=names[0])
    monkeypatch.setattr(registry, "mix", lambda _: found._replace(tasks=tuple(tasks)))
    before = (tmp_path / "run" / runs.SUMMARY).read_text()
    with pytest.raises(runs.RunError, match=re.escape(said)):
        train(settings.model_copy(update={"steps": 600}), tmp_path / "run", resume=True)
    for name in ("run", "policy"):
        with pytest.raises(runs.RunError, match=re.escape(said)):
            runs.load(tmp_path / name)
    assert (tmp_path / "run" / runs.SUMMARY).read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": (1.0, 1.0)}, r"its score \(1.0, 1.0\) is no scale"),
        ({"score": (0.0, math.nan)}, "is no scale"),
        ({"horizon": None}, "its horizon is None"),
        ({"protocol": {"size": np.int64(3)}}, "its protocol cannot be written down"),
    ],
)
def test_what_a_task_says_of_itself_is_looked_at_first(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = registry.mix("mtrl.testing:Probes/discrete")
    wrong = (dataclasses.replace(found.tasks[0], **change), *found.tasks[1:])
    monkeypatch.setattr(registry, "mix", lambda suite: found._replace(tasks=wrong))
    with pytest.raises(ConfigError, match=message):
        train(config({"kind": "random"}, "mtrl.testing:Probes/discrete"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_notices_are_told_without_a_terminal_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = config(PPO, "mtrl.testing:Probes/both", steps=300)
    train(settings, tmp_path / "x")
    train(settings.model_copy(update={"steps": 600}), tmp_path / "x", resume=True)
    assert "resumed at step 300" in capfd.readouterr().err
