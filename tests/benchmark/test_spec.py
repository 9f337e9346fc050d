"""Specs: what they mean, what mistakes say, and those that are shipped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtrl import registry
from mtrl.benchmark.spec import dump_spec, load_spec, parse_spec, plan
from mtrl.config import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "benchmark").glob("*.yaml"))
PROBES = "mtrl.testing:Probes"


def raw(**changes: Any) -> dict[str, Any]:
    agents = {"ppo": {"agent": {"kind": "ppo", "rollout": 16}}, "random": {"agent": "random", "steps": 50}}
    return {"name": "x", "seeds": 2, "suites": [f"{PROBES}/discrete"], "agents": agents, **changes}


def test_a_plan_is_agents_x_suites_x_seeds() -> None:
    suites = {f"{PROBES}/discrete": {"copies": 3}, f"{PROBES}/mix": None}
    shared = {"steps": 100, "agent": {"kind": "ppo", "gamma": 0.5}}
    jobs = plan(parse_spec(raw(suites=suites, seeds=[4, 7], run=shared, threads=2)))
    assert len(jobs) == 8
    assert len({job.name for job in jobs}) == 8
    first = jobs[0]
    assert (first.agent, first.seed, first.config.seed, first.config.steps) == ("ppo", 4, 4, 100)
    assert first.config.agent["rollout"] == 16
    assert first.config.agent["gamma"] == 0.5
    assert (first.config.copies, first.config.threads, first.config.workers) == (3, 2, 0)
    assert (first.config.log.group, first.config.log.terminal) == ("x", False)
    assert jobs[1].config.agent == {"kind": "random"}, "options of another agent must not leak"
    assert jobs[1].config.steps == 50
    assert [job.seed for job in jobs] == [4] * 4 + [7] * 4, "seed by seed: early results cover everyone"


def test_copies_in_a_suite_belong_to_its_name() -> None:
    jobs = plan(parse_spec(raw(suites=[f"{PROBES}/discrete", f"{PROBES}/discrete*4"], seeds=1)))
    assert len({job.name for job in jobs}) == 4
    assert [job.config.suite for job in jobs[::2]] == [f"{PROBES}/discrete", f"{PROBES}/discrete*4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": 3}, "seedz: .*did you mean 'seeds'"),
        ({"seeds": 0}, "seeds"),
        ({"agents": {}}, "agents"),
        ({"run": {"seed": 1}}, "seed: decided by the grid"),
        ({"agents": {"a--b": {}}}, "agent label 'a--b'"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_mistakes_in_a_spec(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(raw(**changes), "x.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suites": ["minigird/mt3"]}, "x: suites: unknown suite 'minigird'; did you mean 'minigrid'"),
        ({"suites": [f"{PROBES}/discrete*0"]}, "x: suites: .*write copies as a whole number from 1 up"),
        ({"suites": [f"{PROBES}/discrete*2"], "run": {"copies": [1, 1]}}, r"copies and '\*2' in suite .* both say"),
        ({"agents": {"a": {"agent": "pppo"}}}, "agent 'a' on .*did you mean 'ppo'"),
        ({"agents": {"a": {"agent": {"kind": "ppo", "gama": 1}}}}, r"agent\.gama: unknown key; did you mean 'gamma'"),
        ({"agents": {"a b": {}, "a_b": {}}}, "two runs would share the folder a_b--"),
        ({"seeds": [1, 1]}, "two runs would share the folder"),
        ({"run": {"stepz": 1}}, "stepz: unknown key; did you mean 'steps'"),
    ],
)
def test_mistakes_found_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(parse_spec(raw(**changes)))


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("seeds: [1\n")
    with pytest.raises(ConfigError, match=r"did you mean 'small\.yaml'"):
        load_spec(tmp_path / "smal.yaml")
    with pytest.raises(ConfigError, match=r"small\.yaml"):
        load_spec(tmp_path / "small.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_spec(path: Path) -> None:
    spec = load_spec(path)
    assert spec.name == path.stem
    assert spec.core_hours, "a spec states its budget in core-hours as well"
    assert spec.about
    assert parse_spec(yaml.safe_load(dump_spec(spec))) == spec
    try:
        for suite in spec.suites:
            registry.tasks(suite)
    except (ImportError, ValueError) as error:  # a suite that is not installed fails only now, and by its name
        with pytest.raises(ConfigError, match=re.escape(f"{spec.name}: suites: {error}")):
            plan(spec)
        return
    jobs = plan(spec)
    assert len(jobs) == len(spec.agents) * len(spec.suites) * len(spec.seeds)
    assert all(job.config.workers == 0 and job.config.threads == 1 for job in jobs)
