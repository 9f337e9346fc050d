"""The schema: merging, agent options, and messages that name the place and the nearest valid choice."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtrl import registry, runs
from mtrl.config import ConfigError, RunConfig, dump_config, load_config
from mtrl.nn.size import network_sizes
from mtrl.spaces import make_spec

ROOT = Path(__file__).parents[1]
CONFIGS = [path for path in sorted(ROOT.glob("configs/**/*.yaml")) if path.parent.name != "benchmark"]


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def test_file_flags_and_overrides_win_in_that_order(tmp_path: Path) -> None:
    path = write(tmp_path, "suite: minigrid/mt3\nsteps: 100\nseed: 1\nlog: {every: 10}\n")
    config = load_config(path, ["log.window=7", "seed=3"], steps=200, seed=2)
    assert (config.suite, config.steps, config.seed) == ("minigrid/mt3", 200, 3)
    assert (config.log.every, config.log.window) == (10, 7)


def test_agent_short_form_merges_with_its_options(tmp_path: Path) -> None:
    path = write(tmp_path, "suite: a/b\nagent: ppo\n")
    assert load_config(path, ["agent.gamma=0.9"]).agent["gamma"] == 0.9


def test_naming_another_agent_drops_the_files_options(tmp_path: Path) -> None:
    path = write(tmp_path, "suite: a/b\nagent: {kind: ppo, gamma: 0.5}\n")
    config = load_config(path, agent="random")
    assert config.agent["kind"] == "random"
    assert "gamma" not in config.agent
    assert load_config(path, agent="ppo").agent["gamma"] == 0.5


def test_a_dumped_config_is_the_same_config(tmp_path: Path) -> None:
    config = load_config(overrides=["suite=minigrid/mt3", "copies=[1,2,3]", "agent.gamma=0.9"])
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepz=3"], r"stepz: unknown key; did you mean 'steps'\?"),
        (["log.evry=3"], r"log\.evry: unknown key; did you mean 'every'\?"),
        (["agent.gama=0.9"], r"agent\.gama: unknown key; did you mean 'gamma'\?"),
        (["agent.gamma=high"], r"agent\.gamma: .*got 'high'"),
        (["agent=pppo"], r"agent.*unknown agent 'pppo'; did you mean 'ppo'\?"),
        (["steps=0"], r"steps: .*greater than 0.*got 0"),
        (["steps"], r"override 'steps' is not of the form key=value"),
        (["suite=a/b*0"], r"suite: .*'a/b\*0' in suite 'a/b\*0': write copies as a whole number"),
        (
            ["suite=a/b*4+c/d", "copies=[1,2]"],
            r"^copies and '\*4' in suite 'a/b\*4\+c/d' both say how many",
        ),
        (["suite=a/b*4", "slots=3", "sampler.kind=uniform"], r"slots and '\*4' in suite 'a/b\*4' both say how many"),
        (
            ["sampler.weights={a: 2}"],
            r"sampler: .*weights do not count for pinned: set sampler\.kind to one that draws",
        ),
        (["sampler.weights={a: 2}", "sampler.kind=round_robin"], r"weights do not count for round_robin"),
        (["device=gpu"], r"device: .*'auto', 'cpu' or 'cuda'.*got 'gpu'"),
        (["agent.trunk.kind=more"], r"agent\.trunk\.kind: .*got 'more'; did you mean 'moore'\?"),
        (["copies=0"], r"^copies: .*greater than 0 or .*valid tuple, got 0$"),
        (["lr=3"], r"lr: unknown key; did you mean 'agent\.lr'\?"),
        (["agent.widths=[64]"], r"agent\.widths: unknown key; did you mean 'agent\.trunk\.widths'\?"),
        (["window=3"], r"window: unknown key; did you mean 'log\.window'\?"),
        (["=3"], r"override '=3' is not of the form key=value"),
    ],
)
def test_mistakes_name_their_place(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=["suite=a/b", *overrides])


def test_a_missing_suite_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^suite: name the tasks, as in --suite minigrid/mt3; see mtrl list suites$"):
        load_config()
    write(tmp_path, "suite: a/b\n")
    with pytest.raises(ConfigError, match=r"did you mean 'c.yaml'\?"):
        load_config(tmp_path / "cc.yaml")
    with pytest.raises(ConfigError, match="no config file 'minigrid/mt3'; tasks are named with --suite minigrid/mt3"):
        load_config(Path("minigrid/mt3"))
    (tmp_path / "suites.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="is no YAML; tasks of a suite in it: --suite suites:CLASS/GROUP"):
        load_config(tmp_path / "suites.py")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(write(tmp_path, "suite: [unclosed\n"))
    with pytest.raises(ConfigError, match="mapping of keys"):
        load_config(write(tmp_path, "- a\n- b\n"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_builds(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, RunConfig)
    runs.make_agent(config, make_spec(registry.tasks(config.suite)))


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem.endswith("-matched")], ids=lambda path: path.stem
)
def test_matched_configs_have_the_size_of_the_mixture(path: Path) -> None:
    sizes = []
    for name in (path, path.with_stem(path.stem.replace("matched", "standard"))):
        config = load_config(name)
        agent = runs.make_agent(config, make_spec(registry.tasks(config.suite)))
        sizes.append(network_sizes(agent))
    for own, other in zip(*(found.values() for found in sizes), strict=True):
        assert abs(own - other) < 0.01 * other


@pytest.mark.parametrize("words", [["agent=sac", "agent.gamma=0.9"], ["agent.gamma=0.9", "agent=sac"]])
def test_an_agent_and_its_options_in_any_order(words: list[str]) -> None:
    config = load_config(None, words, suite="metaworld/mt3")
    assert (config.agent["kind"], config.agent["gamma"]) == ("sac", 0.9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["workers=-1"], "workers"),
        (["patience=inf"], "patience: must be finite"),
        (["agent=ppo", "agent.clip=.inf"], "agent.clip: must be finite; null turns off"),
        (["eval.seed=-1"], "eval.seed"),
        (["copies=3", "slots=4", "sampler.kind=uniform"], "slots and copies both say"),
    ],
)
def test_what_would_fail_after_the_training_is_refused_before(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, words, suite="minigrid/mt3")
