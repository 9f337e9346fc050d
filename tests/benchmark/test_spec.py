"""Specs: what they mean, what mistakes say, and those that are shipped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtrl import registry
from mtrl.benchmark.spec import dump_spec, load_spec, parse_spec, plan
from mtrl.config import ConfigError, load_config
from mtrl.nn.trunk import TrunkConfig

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "benchmark").glob("*.yaml"))
PROBES = "mtrl.testing:Probes"
A = "a--mtrl.testing_Probes_discrete"


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
    assert first.config.device == "cpu", "a table must not depend on whether there is a GPU"
    assert plan(parse_spec(raw(run={"device": "cuda"})))[0].config.device == "cuda"
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
        ({"agents": {"a": {"alone": "yes"}}}, "agents.a.alone: true or false, got 'yes'"),
        ({"agents": {"a": {"suites": []}}}, r"agents.a.suites: a list of suites, got \[\]"),
        ({"agents": {"a": {"suites": [f"{PROBES}/discret"]}}}, f"did you mean '{PROBES}/discrete'.*in agents.a"),
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
        (
            {"agents": {"a": {"alone": True}}, "run": {"steps": 100}},
            "agent 'a' on .*: steps=100 is no multiple of the 6",
        ),
        (
            {"agents": {"a": {"init": {"run": "{runs}/b--{seed}"}}}},
            "agent 'a': init.run: unknown run of this grid 'b--0'",
        ),
        ({"agents": {"a": {"init": {"run": f"{{runs}}/{A}--{{seed}}"}}}}, "--0, a--.*--1 start from each other"),
        ({"run": {"stepz": 1}}, "stepz: unknown key; did you mean 'steps'"),
    ],
)
def test_mistakes_found_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(parse_spec(raw(**changes)))


def test_an_agent_that_learns_each_task_alone_has_the_same_steps_of_it() -> None:
    tasks = [task.name for task in registry.tasks(f"{PROBES}/discrete")]
    run = {"steps": 600, "copies": 3, "eval": {"every": 60}, "log": {"every": 4}}
    agents = {"one by one": {"alone": True}, "together": {}}
    jobs = plan(parse_spec(raw(agents=agents, run=run, seeds=1)))
    alone, together = jobs[:-1], jobs[-1]
    assert [job.task for job in alone] == tasks
    assert [registry.tasks(job.config.suite)[0].name for job in alone] == tasks
    assert {job.suite for job in jobs} == {f"{PROBES}/discrete"}
    assert {(job.config.steps, job.config.eval.every, job.config.log.every) for job in alone} == {
        (600 // len(tasks), 60 // len(tasks), 1)
    }
    assert {job.config.copies for job in jobs} == {3}
    assert (together.task, together.config.steps) == (None, 600)
    assert len({job.name for job in jobs}) == len(jobs)


def test_alone_tasks_keep_the_copies_that_the_mix_gives_them() -> None:
    agents = {"one by one": {"alone": True}, "together": {}}
    jobs = plan(
        parse_spec(raw(suites=[f"{PROBES}/discrete*4"], agents=agents, run={"steps": 600, "copies": 2}, seeds=1))
    )
    assert [job.config.copies for job in jobs[:-1]] == [8] * (len(jobs) - 1)
    for copies, suite in (([1, 2, 3, 4, 5, 6], f"{PROBES}/discrete"), (1, f"{PROBES}/delay+{PROBES}/action*2")):
        count = len(registry.tasks(suite))
        spec = parse_spec(
            raw(
                suites=[suite],
                agents=agents,
                run={"steps": 600, "copies": copies if isinstance(copies, int) else copies[:count]},
            )
        )
        with pytest.raises(ConfigError, match="alone: steps are shared out equally, but the tasks have 1, 2"):
            plan(spec)


def test_the_seed_of_evaluations_is_no_seed_of_runs() -> None:
    jobs = plan(parse_spec(raw(run={"eval": {"seed": 7}}, agents={"seed": {"agent": "random", "steps": 50}})))
    assert {job.config.eval.seed for job in jobs} == {7}


def test_an_agent_may_run_on_some_suites_only() -> None:
    suites = [f"{PROBES}/discrete", f"{PROBES}/mix"]
    jobs = plan(parse_spec(raw(suites=suites, agents={"a": {}, "b": {"suites": suites[1:]}}, seeds=1)))
    assert [(job.suite, job.agent) for job in jobs] == [(suites[0], "a"), (suites[1], "a"), (suites[1], "b")]


def moore_arm(label: str, stem: str) -> tuple[str, list[str]]:
    """The file in configs/moore, and what it says about its own variants, that an arm of a campaign must equal."""
    channels = ["agent.perception.channels=[16,32,64]"]
    memory = ["agent.memory=128", "agent.chunk=50", "agent.epochs=8", "agent.action_value_weight=0.5"]
    preset = "paper" if label.endswith("paper") else "matched" if label.startswith(("single", "multi")) else "standard"
    changes = {
        "moe": ["agent.trunk.kind=moe"],
        "moore memory": memory,
        "multi_head memory": [*channels, *memory],
        "single-task": channels,
        "multi_head": channels,
    }.get(label, [])
    if stem.startswith("metaworld"):
        plain = ["agent.trunk.widths=[256,256]", "agent.critic_trunk.widths=[256,256,256]"]
        changes = {
            "moe": ["agent.trunk.kind=moe", "agent.critic_trunk.kind=moe"],
            "single-task": plain,
            "multi_head": plain,
        }.get(label, [])
    return f"{stem}-{preset}.yaml", changes


@pytest.mark.parametrize(
    ("name", "stem"),
    [(f"moore-{n}", f"minigrid-{n}") for n in ("mt3", "mt5", "mt7")] + [("moore-metaworld", "metaworld-mt3")],
)
def test_campaigns_have_the_settings_of_the_presets(name: str, stem: str) -> None:
    pytest.importorskip("mtrl_envs")
    folder = SHIPPED[0].parents[1]
    spec = load_spec(folder / "benchmark" / f"{name}.yaml")
    seen = set()
    for job in plan(spec):
        file, changes = moore_arm(job.agent, stem)
        preset = load_config(folder / "moore" / file, changes)
        expected = dict(preset.agent)
        if job.agent == "multi_head paper":  # the presets have no file for it: moore's, with one convolutional net
            expected["perception"] = {**expected["perception"], "channels": [16, 32, 64]}
            expected["trunk"] = TrunkConfig(kind="multi_head").model_dump(mode="json")
        assert job.config.agent == expected, job.agent
        tasks = len(registry.tasks(job.suite))
        per_task = 1 if job.task else tasks
        assert job.config.copies == preset.copies
        steps = 100_000 if stem.startswith("metaworld") else 200_000
        assert job.config.steps == steps * per_task
        assert preset.steps == 200_000 * len(registry.tasks(preset.suite))
        assert job.config.eval == preset.eval.model_copy(update={"every": steps // 2 * per_task, "episodes": 50})
        seen.add((job.agent, job.suite))
    suites = {"metaworld/mt3", "metaworld/mt5"} if stem.startswith("metaworld") else {stem.replace("-", "/")}
    assert seen == {(agent, suite) for agent in spec.agents for suite in suites}
    assert {"single-task", "multi_head", "multi_head matched", "moe", "moore"} <= set(spec.agents)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("3-5", "mt3", ["DoorKey-6x6", "DistShift1"]),
        ("5-7", "mt5", ["SimpleCrossingS9N2", "MultiRoom-N2-S4"]),
    ],
)
def test_transfer_campaigns_start_from_runs_with_the_settings_of_the_preset(
    name: str, old: str, new: list[str]
) -> None:
    pytest.importorskip("mtrl_envs")
    folder = SHIPPED[0].parents[1]
    jobs = plan(load_spec(folder / "benchmark" / f"moore-transfer-{name}.yaml"))
    preset = load_config(folder / "moore" / f"minigrid-{old}-standard.yaml")
    campaign = {job.name: job for job in plan(load_spec(folder / "benchmark" / f"moore-{old}.yaml"))}
    sources = {job.name: job for job in jobs if job.suite == preset.suite}
    assert len(sources) == 5
    for job in sources.values():  # a run of the campaign on these tasks will do as well
        assert job.config.model_copy(update={"log": None}) == campaign[job.name].config.model_copy(update={"log": None})
    inits = {}
    for job in jobs:
        assert job.config.agent == preset.agent
        assert job.config.copies == preset.copies
        tasks = [task.name for task in registry.tasks(job.suite)]
        assert job.config.steps == 200_000 * len(tasks)
        assert (job.config.eval.every, job.config.eval.episodes) == (100_000 * len(tasks), 50)
        if job.suite != preset.suite:
            assert tasks == [f"minigrid/{task}" for task in new]
            init = job.config.init
            inits[job.agent] = None if init is None else (init.run is not None, init.freeze)
            assert job.source in {None, f"moore--minigrid_{old}--{job.seed}"}
            assert (job.source in sources) == (init is not None and init.run is not None)
    assert inits == {
        "moore": None,
        "moore frozen": (True, True),
        "moore fine-tuned": (True, False),
        "moore random frozen": (False, True),
    }


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("seeds: [1\n")
    with pytest.raises(ConfigError, match=r"did you mean 'small\.yaml'"):
        load_spec(tmp_path / "smal.yaml")
    with pytest.raises(ConfigError, match=r"small\.yaml"):
        load_spec(tmp_path / "small.yaml")


def test_a_file_is_read_as_a_runs_configuration_is(tmp_path: Path) -> None:
    """Numbers like 1e6 are numbers, and an agent that comes twice does not replace its namesake in silence."""
    path = tmp_path / "small.yaml"
    plain = "name: small\nseeds: 1\nrun: {steps: 1e3}\nsuites: [minigrid/mt3]\nagents:\n  a: {agent: ppo}\n"
    path.write_text(plain)
    assert [job.config.steps for job in plan(load_spec(path))] == [1000]
    path.write_text(plain + "  a: {agent: random}\n")
    with pytest.raises(ConfigError, match="found duplicate key a"):
        load_spec(path)


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
    single = [label for label, part in spec.agents.items() if part.get("alone")]
    sizes = [len(registry.tasks(suite)) if agent in single else 1 for suite, agent in spec.arms()]
    assert len(jobs) == sum(sizes) * len(spec.seeds)
    assert all(job.config.workers == 0 and job.config.threads == 1 for job in jobs)
