"""What is kept of grids: the same numbers, merged with later runs, never mixed with what does not compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mtrl.benchmark import store
from mtrl.benchmark.analysis import analyse
from mtrl.benchmark.attempt import BenchmarkError
from mtrl.benchmark.keep import README, RUNS, at, keep
from mtrl.benchmark.spec import load_spec
from mtrl.cli import app

Writer = Callable[..., Path]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON or YAML file in place."""
    found = yaml.safe_load(path.read_text())
    change(found)
    path.write_text(json.dumps(found) if path.suffix == ".json" else yaml.safe_dump(found))


def test_a_kept_grid_has_its_tables(tmp_path: Path, grid_writer: Writer) -> None:
    grid = grid_writer(tmp_path / "grid", {"weak": 0.2, "strong": 0.9}, ["s/x"], seeds=5)
    written = keep([grid], tmp_path / "kept", "the command")
    assert {path.name for path in written} == {
        "rows.jsonl",
        "runs.jsonl",
        "settings.yaml",
        "spec.yaml",
        "README.md",
        "curves-s_x-greedy.svg",
    }
    rows = [json.loads(line) for line in (tmp_path / "kept" / "rows.jsonl").read_text().splitlines()]
    assert rows == store.load(grid).rows()
    text = (tmp_path / "kept" / README).read_text()
    (suite,) = analyse(store.load(grid)).suites
    strong = suite.entries[0]
    shown = f"{strong.iqm.value:.3f} ({strong.iqm.low:.3f} to {strong.iqm.high:.3f}), 5 runs"
    (line,) = (line for line in text.splitlines() if line.startswith("| strong | ") and line.endswith(" runs |"))
    assert line.endswith(f"{shown} |")
    assert "300,000 steps" not in text, "steps are those of one task: a third"
    assert "| agent | 33,333 steps per task | 66,667 steps per task | 100,000 steps per task |" in text
    for said in (
        "Command: `the command`",
        "it beats weak",
        "| weak | 0 of 5 |",
        "torch | 2.13.0",
        "2 cores of Some CPU",
    ):
        assert said in text
    assert "5 of 5: " in text


def test_an_unfinished_grid_counts_runs_where_they_were_evaluated(tmp_path: Path, run_writer: Writer) -> None:
    for seed in range(3):
        run_writer(tmp_path, "a", "s/x", seed, finished=seed < 2, evaluations=2)
    keep([tmp_path], tmp_path / "kept")
    text = (tmp_path / "kept" / README).read_text()
    assert "Runs: 2 finished, 1 running." in text
    (line,) = (line for line in text.splitlines() if line.startswith("| a | ") and line.endswith(" runs |"))
    assert line.count("3 runs") == 1
    assert line.count("2 runs") == 1
    early = at(store.load(tmp_path), "s/x", 50_000)
    assert [run.usable for run in early.runs] == [True] * 3
    assert {row["step"] for row in early.rows()} == {50_000}


def test_later_runs_join_those_that_are_kept(tmp_path: Path, grid_writer: Writer, run_writer: Writer) -> None:
    whole = grid_writer(tmp_path / "whole", {"a": 0.5, "b": 0.8}, ["s/x"], seeds=2)
    first, second, kept = tmp_path / "first", tmp_path / "second", tmp_path / "kept"
    grid_writer(first, {"a": 0.5, "b": 0.8}, ["s/x"], seeds=1)
    run_writer(first, "a", "s/x", 1, skill=0.5, finished=False)
    for agent, skill in (("a", 0.5), ("b", 0.8)):
        run_writer(second, agent, "s/x", 1, skill=skill)
    keep([first], kept)
    before = contents(kept)
    keep([first], kept)
    assert contents(kept) == before, "keeping it again changes nothing"
    keep([second], kept)
    keep([whole], tmp_path / "at once")
    ours, theirs = contents(kept), contents(tmp_path / "at once")
    del ours["spec.yaml"], theirs["spec.yaml"]  # of the first grid, which had one seed
    assert ours == theirs
    keep([kept], tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(kept)
    third = run_writer(tmp_path / "third", "a", "s/x", 2, skill=0.5)
    edit(third / "config.yaml", lambda found: (found.update(workers=2), found["agent"].update(cuda_graph=True)))
    keep([tmp_path / "third"], kept)  # what results do not depend on may differ
    assert "cuda_graph" not in (kept / "settings.yaml").read_text()


def test_the_spec_of_several_grids_makes_the_runs_of_all(tmp_path: Path, grid_writer: Writer) -> None:
    kept = tmp_path / "kept"
    for seed, (agent, suite) in enumerate([("b", "s/y"), ("a", "s/x"), ("a", "s/y")]):
        grid = grid_writer(tmp_path / str(seed), {agent: 0.5}, [suite], seeds=1)
        own = {"seeds": [seed], "run": {"device": ("cpu", "cuda")[seed % 2]}}  # results do not depend on the device
        edit(grid / "spec.yaml", lambda found, own=own: found.update(own))
        keep([grid], kept)
    spec = load_spec(kept / "spec.yaml")
    assert (spec.seeds, [*spec.suites], [*spec.agents]) == ((0, 1, 2), ["s/y", "s/x"], ["b", "a"])
    edit(tmp_path / "2" / "spec.yaml", lambda found: found.update(run={"copies": 4}))  # then no one spec makes them all
    keep([tmp_path / "2"], kept)
    assert load_spec(kept / "spec.yaml") == load_spec(tmp_path / "2" / "spec.yaml")


def test_agents_whose_last_steps_differ_by_a_few_are_compared(tmp_path: Path, run_writer: Writer) -> None:
    """Vector steps of another size pass the same budget by another few steps."""
    run_writer(tmp_path, "narrow", "s/x", 0)
    folder = run_writer(tmp_path, "wide", "s/x", 0)
    path, last = folder / "metrics.jsonl", json.loads((folder / "summary.json").read_text())["steps"]
    path.write_text(path.read_text().replace(f'"step": {last},', f'"step": {last + 24},'))
    edit(folder / "summary.json", lambda found: found.update(steps=last + 24))
    keep([tmp_path], tmp_path / "kept")
    text = (tmp_path / "kept" / README).read_text()
    final = text[text.index("\nAfter ") :]
    assert "| narrow | 1 |" in final
    assert "| wide | 1 |" in final
    assert f'"step": {last + 24},' in (tmp_path / "kept" / "rows.jsonl").read_text(), "rows stay what they were"


def test_a_spec_may_name_an_agent_without_settings(tmp_path: Path, grid_writer: Writer) -> None:
    grid = grid_writer(tmp_path / "grid", {"a": 0.5}, ["s/x"], seeds=1)
    edit(grid / "spec.yaml", lambda found: found.update(run={"agent": "random"}))
    keep([grid], tmp_path / "kept")
    assert load_spec(tmp_path / "kept" / "spec.yaml").run == {"agent": "random"}


def test_parts_of_a_run_are_kept_as_one(tmp_path: Path, run_writer: Writer) -> None:
    for task in ("toy/a", "toy/b"):
        folder = run_writer(tmp_path, "one by one", task, 0, tasks=(task,))
        about = {"suite": "s/x", "task": task, "tasks": ["toy/a", "toy/b"]}
        edit(folder / "manifest.json", lambda found, about=about: found.update(about))
    keep([tmp_path], tmp_path / "kept")
    (line,) = (tmp_path / "kept" / RUNS).read_text().splitlines()
    assert json.loads(line)["suite"] == "s/x"
    settings = yaml.safe_load((tmp_path / "kept" / "settings.yaml").read_text())
    assert list(settings) == ["one by one on s/x, toy/a alone", "one by one on s/x, toy/b alone"]
    keep([tmp_path], tmp_path / "kept")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("manifest.json", lambda found: found.update(protocol="2"), "protocol versions 1 and 2 do not compare"),
        ("config.yaml", lambda found: found.update(copies=4), r"a on s/x was run with other settings \(copies\)"),
        ("config.yaml", lambda found: found["agent"].update(lr=1.0), r"other settings \(agent.lr\)"),
        (
            "config.yaml",
            lambda found: found.update(suite="s/y", eval={**found["eval"], "episodes": 9}),
            "eval.episodes",
        ),
    ],
)
def test_what_does_not_compare_is_refused(
    tmp_path: Path, run_writer: Writer, file: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    kept = tmp_path / "kept"
    run_writer(tmp_path / "old", "a", "s/x", 0)
    keep([tmp_path / "old"], kept)
    before = contents(kept)
    folder = run_writer(tmp_path / "new", "a", "s/x", 1)
    edit(folder / file, change)
    if "episodes" in message:  # of another agent: its other settings may differ
        edit(folder / "manifest.json", lambda found: found.update(agent="b"))
    with pytest.raises(BenchmarkError, match=message):
        keep([tmp_path / "new"], kept)
    assert contents(kept) == before


def test_one_run_with_two_results_is_refused(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path / "old", "a", "s/x", 0, skill=0.3)
    run_writer(tmp_path / "new", "a", "s/x", 0, skill=0.9)
    with pytest.raises(BenchmarkError, match="a on s/x, seed 0, comes twice, with other results"):
        keep([tmp_path / "old", tmp_path / "new"], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_fields_that_an_older_version_did_not_know_are_no_difference(tmp_path: Path, run_writer: Writer) -> None:
    for place, seed in (("old", 0), ("new", 1)):
        folder = run_writer(tmp_path / place, "a", "s/x", seed)
        edit(folder / "config.yaml", lambda found: found.update(agent={"kind": "ppo"}, threads=1))
    edit(folder / "config.yaml", lambda found: found["agent"].update(gamma=0.99))
    keep([tmp_path / "old", tmp_path / "new"], tmp_path / "kept")
    edit(folder / "config.yaml", lambda found: found["agent"].update(gamma=0.9))
    with pytest.raises(BenchmarkError, match=r"agent.gamma"):
        keep([tmp_path / "old", tmp_path / "new"], tmp_path / "kept")


def test_the_command(tmp_path: Path, grid_writer: Writer) -> None:
    grid = grid_writer(tmp_path / "grid", {"a": 0.5}, ["s/x"], seeds=2)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["keep", str(grid), "--out", str(tmp_path / "kept")])
    assert done.exit_code == 0, done.output
    assert "README.md" in done.output
    missing = CliRunner().invoke(app, ["keep", str(tmp_path / "nowhere"), "--out", str(tmp_path / "kept")])
    assert missing.exit_code == 2


def test_single_tasks_are_ranked_when_all_of_them_were_evaluated(tmp_path: Path, run_writer: Writer) -> None:
    tasks = ("toy/a", "toy/b")
    run_writer(tmp_path / "grid", "together", "s/x", 0, tasks=tasks, every=100_000, evaluations=2)
    folder = run_writer(tmp_path / "grid", "solo", "toy/a", 0, tasks=("toy/a",), every=50_000, evaluations=2)
    edit(folder / "manifest.json", lambda found: found.update(suite="s/x", task="toy/a", tasks=list(tasks)))
    keep([tmp_path / "grid"], tmp_path / "kept")
    text = (tmp_path / "kept" / README).read_text()
    assert "| solo | - | - |" in text
    assert "| solo | 0 of 1 |" in text
    assert "Only together has such runs" in text
    keep([tmp_path / "kept"], tmp_path / "again")  # what the tasks of the suite are is kept, too
    assert (tmp_path / "again" / README).read_text() == text.replace("# kept", "# again")


def test_an_agent_of_fewer_steps_is_not_lost(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path / "grid", "long", "s/x", 0, evaluations=4)
    run_writer(tmp_path / "grid", "random", "s/x", 0, evaluations=1, every=3_000)
    keep([tmp_path / "grid"], tmp_path / "kept")
    text = (tmp_path / "kept" / README).read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("random, after 1,000 steps per task: "))
    assert line.endswith(", 1 run.")
