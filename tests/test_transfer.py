"""Runs that start with parts of another one: what is taken, what stays as it is, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtrl import checkpoint, registry, runs
from mtrl.config import ConfigError, RunConfig, load_config, parse_config
from mtrl.log import METRICS
from mtrl.spaces import make_spec
from mtrl.train import train
from mtrl.transfer import prepare
from mtrl.types import Agent

PROBES = "mtrl.testing:Probes"
PPO = {
    "kind": "ppo",
    "rollout": 16,
    "epochs": 1,
    "inspect_every": 1,
    "perception": {"vector": [8]},
    "trunk": {"kind": "moore", "experts": 2, "widths": [8]},
}
SAC = {
    "kind": "sac",
    "trunk": {"kind": "moore", "experts": 2, "widths": [8]},
    "warmup": 20,
    "batch_size": 4,
    "log_every": 5,
    "inspect_every": 1,
}
AGENTS = {"ppo": (PPO, ""), "sac": (SAC, "-box")}


def config(kind: str, tasks: str, **changes: Any) -> RunConfig:
    """Tasks: names of probes, joined by "+"."""
    options, ending = AGENTS[kind]
    given = {"steps": 120, "copies": 2, "workers": 0, "threads": 1, "eval": {"episodes": 1}, **changes}
    own = {**options, **given.pop("agent", {})}
    log = {"every": 40, "terminal": False, "wandb": "off"}
    suite = "+".join(f"{PROBES}/{task}{ending}" for task in tasks.split("+"))
    return parse_config({"suite": suite, "agent": own, "log": log, **given})


def fresh(made: RunConfig) -> Agent:
    return runs.make_agent(made, make_spec(registry.tasks(made.suite)))


def parameters(out: Path) -> dict[str, Tensor]:
    """All networks of a run's newest checkpoint, targets too."""
    state = checkpoint.load(out / runs.CHECKPOINTS).state["agent"]
    nets = [net for net in ("policy", "critic", "critics", "targets") if net in state]
    return {f"{net}.{name}": value for net in nets for name, value in state[net].items()}


def taken(name: str) -> bool:
    """Whether a parameter is one that tasks share, in the networks of this file."""
    return ".perception." in name or (".trunk." in name and not name.endswith("trunk.weights"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two tasks for each kind of agent."""
    folder = tmp_path_factory.mktemp("sources")
    for kind in AGENTS:
        train(config(kind, "action+both", seed=3), folder / f"{kind}-3")
    return folder


@pytest.mark.parametrize("kind", AGENTS)
@pytest.mark.parametrize("freeze", [True, False])
def test_shared_parts_are_taken_and_stay_if_frozen(kind: str, freeze: bool, sources: Path, tmp_path: Path) -> None:
    init = {"run": f"{sources}/{kind}-{{seed}}", "freeze": freeze}
    made = config(kind, "both+delay+constant", seed=3, init=init)
    agent, plain = fresh(made), fresh(made)
    origin = prepare(agent, made, tmp_path / "x")
    theirs, ours, before = parameters(sources / f"{kind}-3"), agent.state_dict(), plain.state_dict()
    nets = ("policy", "critic") if kind == "ppo" else ("policy", "critics")
    shared = 0
    for net in nets:
        for name, value in ours[net].items():
            place = f"{net}.{name}"
            assert torch.equal(value, theirs[place] if taken(place) else before[net][name]), place
            shared += value.numel() * taken(place)
    assert origin is not None
    assert (origin["numbers"], origin["frozen"]) == (shared, shared * freeze)

    train(made, tmp_path / "new")
    ended = parameters(tmp_path / "new")
    for name, value in ended.items():
        if taken(name):
            assert torch.equal(value, theirs[name.replace("targets", "critics")]) == freeze, name
    summary = json.loads((tmp_path / "new" / runs.SUMMARY).read_text())
    manifest = next((sources / f"{kind}-3" / runs.CHECKPOINTS).glob("step-120*/manifest.json"))
    assert summary["init"]["sha256"] == json.loads(manifest.read_text())["sha256"]
    assert summary["init"]["step"] == 120
    assert summary["init"]["run"] == f"{sources}/{kind}-3"
    assert summary["init"]["seed"] == 3
    moved = [name for name in ended if not taken(name) and "targets" not in name]
    start = {f"{net}.{name}": value for net in nets for name, value in before[net].items()}
    assert any(not torch.equal(ended[name], start[name]) for name in moved), "heads and task weights learn"


@pytest.mark.parametrize("kind", AGENTS)
def test_a_run_with_frozen_parts_resumes_bit_for_bit(kind: str, sources: Path, tmp_path: Path) -> None:
    source = tmp_path / f"{kind}-source"
    shutil.copytree(sources / f"{kind}-3", source)
    changes: dict[str, Any] = {"init": {"run": str(source), "freeze": True}, "checkpoint": {"every": 60, "keep": 9}}
    train(config(kind, "both+delay", **changes), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for path in (tmp_path / "broken" / runs.CHECKPOINTS).glob("step-*"):
        if int(path.name.partition("-")[2]) > 60:
            shutil.rmtree(path)
    (tmp_path / "broken" / runs.SUMMARY).unlink()
    shutil.rmtree(source)  # what was taken is in the checkpoint
    train(config(kind, "both+delay", **changes), tmp_path / "broken", resume=True)
    one, two = parameters(tmp_path / "whole"), parameters(tmp_path / "broken")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    inits = [json.loads((tmp_path / name / runs.SUMMARY).read_text())["init"] for name in ("whole", "broken")]
    assert inits[0] == inits[1]
    assert inits[0]["frozen"] > 0


def test_fresh_parts_can_be_frozen(tmp_path: Path) -> None:
    made = config("ppo", "both+delay", init={"freeze": True})
    start = fresh(made).state_dict()
    train(made, tmp_path / "x")
    ended = parameters(tmp_path / "x")
    same = {
        name for name, value in ended.items() if torch.equal(value, start[name.split(".")[0]][name.split(".", 1)[1]])
    }
    assert {name for name in ended if taken(name)} <= same
    assert "policy.body.trunk.weights" not in same
    assert json.loads((tmp_path / "x" / runs.SUMMARY).read_text())["init"]["run"] is None


def test_targets_start_as_the_critics_that_were_put_in(sources: Path, tmp_path: Path) -> None:
    made = config(
        "sac", "both+delay", steps=48, init={"run": str(sources / "sac-3")}, agent={"tau": 1e-9, "warmup": 20}
    )
    train(made, tmp_path / "x")
    theirs, ended = parameters(sources / "sac-3"), parameters(tmp_path / "x")
    named = [name for name in ended if name.startswith("targets.") and taken(name)]
    assert named
    for name in named:
        torch.testing.assert_close(ended[name], theirs[name.replace("targets", "critics")], atol=1e-6, rtol=0)


def test_parts_and_steps_are_chosen(sources: Path, tmp_path: Path) -> None:
    made = config("ppo", "both", init={"run": str(sources / "ppo-3"), "parts": ["perception"], "step": 120})
    agent, plain = fresh(made), fresh(made)
    prepare(agent, made, tmp_path)
    changed = {
        name
        for net in ("policy", "critic")
        for name, value in agent.state_dict()[net].items()
        if not torch.equal(value, plain.state_dict()[net][name])
    }
    assert changed
    assert all(".perception." in f".{name}" for name in changed)


def test_heads_of_single_tasks_are_never_taken(sources: Path, tmp_path: Path) -> None:
    made = config("ppo", "both", init={"run": str(sources / "ppo-3"), "parts": ["heads"]})
    with pytest.raises(ConfigError, match="'ppo' has no shared parameters in heads"):
        prepare(fresh(made), made, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent": {"perception": {"vector": [9]}}}, r"perception.* has shape \[8, .*\] in .*ppo-3 and \[9, "),
        (
            {"agent": {"trunk": {"kind": "moore", "experts": 3, "widths": [8]}}},
            r"trunk\..* has shape .* in .* and .* here",
        ),
        ({"agent": {"trunk": {"kind": "care", "experts": 2, "widths": [8]}}}, "has no parameter policy.body.trunk"),
        ({"init": {"run": "{runs}/ppo-4"}}, r"holds no run .*did you mean .*ppo-3"),
        ({"init": {"run": "{runs}/ppo-3", "step": 7}}, "no checkpoint of step 7"),
        ({"init": {"run": "{runs}/sac-3"}}, "was made by 'sac', not by 'ppo'"),
    ],
)
def test_sources_that_do_not_fit(changes: dict[str, Any], message: str, sources: Path) -> None:
    made = config("ppo", "both+delay", **{"init": {"run": "{runs}/ppo-3"}, **changes})
    agent, out = fresh(made), sources / "new"
    with pytest.raises((runs.RunError, checkpoint.CheckpointError), match=message):
        train(made, out)
    assert not out.exists(), "a mistake leaves no folder behind"
    with pytest.raises((runs.RunError, checkpoint.CheckpointError)):
        prepare(agent, made, out)
    for net in ("policy", "critic"):
        for name, value in fresh(made).state_dict()[net].items():
            assert torch.equal(agent.state_dict()[net][name], value), "nothing is half taken"


def test_a_source_must_be_finished_or_its_step_named(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "ppo-3", tmp_path / "source")
    (tmp_path / "source" / runs.SUMMARY).unlink()
    made = config("ppo", "both", init={"run": "{runs}/source"})
    with pytest.raises(runs.RunError, match=r"source is not finished: finish it .* or set init.step"):
        prepare(fresh(made), made, tmp_path / "x")
    named = config("ppo", "both", init={"run": "{runs}/source", "step": 120})
    assert prepare(fresh(named), named, tmp_path / "x") is not None


def test_an_agent_without_networks(tmp_path: Path) -> None:
    made = parse_config({"suite": f"{PROBES}/both", "agent": "random", "init": {"freeze": True}})
    with pytest.raises(ConfigError, match="agent 'random' has no shared parameters"):
        prepare(fresh(made), made, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("init.step=3", "init: .*give run, or freeze=true, or both"),
        ("init.run='runs/{sed}'", r"init.run: .*the placeholders are \{runs\} and \{seed\}"),
        ("init={freeze: true, parts: [trunc]}", r"init.parts.0: .*'perception', 'trunk', 'memory' or 'heads'"),
        ("init.frieze=true", "did you mean 'freeze'"),
    ],
)
def test_mistakes_in_the_configuration(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[f"suite={PROBES}/both", text])


def test_frozen_parts_are_said(sources: Path, tmp_path: Path) -> None:
    train(config("ppo", "both", init={"run": str(sources / "ppo-3"), "freeze": True}), tmp_path / "x")
    sizes = json.loads((tmp_path / "x" / runs.SUMMARY).read_text())["parameters"]
    whole = json.loads((sources / "ppo-3" / runs.SUMMARY).read_text())["parameters"]
    assert sizes["policy"] < whole["policy"], "only what is trained counts"
    records = (tmp_path / "x" / METRICS).read_text()
    assert "gradient_cosine" not in records, "one task has no conflicts"
