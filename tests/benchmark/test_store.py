"""The store: rows, costs, tables, imports."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtrl.benchmark import store
from mtrl.benchmark.analysis import analyse
from mtrl.benchmark.attempt import BenchmarkError
from mtrl.benchmark.report import render
from mtrl.benchmark.store import Cost

Writer = Callable[..., Path]


def test_rows_of_a_record() -> None:
    record = {
        "step": 9,
        "wall": 1.0,
        "eval/toy/a/score": 0.5,
        "eval/toy/a/success": 1.0,
        "eval_sampled/toy/a/score": 0.25,
        "eval/toy/maze/small/score": 0.75,
        "eval/mean_score": 0.5,
        "charts/toy/a_score": 0.1,
    }
    assert list(store.evaluations(record)) == [
        {"step": 9, "actions": "greedy", "task": "toy/a", "score": 0.5, "success": 1.0},
        {"step": 9, "actions": "sampled", "task": "toy/a", "score": 0.25},
        {"step": 9, "actions": "greedy", "task": "toy/maze/small", "score": 0.75},
    ]


def test_a_grid_is_read_in_the_order_of_its_spec(tmp_path: Path, grid_writer: Writer) -> None:
    found = store.load(grid_writer(tmp_path, {"zeta": 0.9, "alpha": 0.2}, ["s/two", "s/one"], seeds=2))
    assert [(run.agent, run.suite, run.seed) for run in found.runs][:3] == [
        ("zeta", "s/two", 0),
        ("zeta", "s/two", 1),
        ("zeta", "s/one", 0),
    ]
    run = found.runs[0]
    assert (run.status, run.step, run.budget) == ("finished", 300_000, 300_000)
    assert run.usable
    assert len(run.rows) == 6 * 3
    assert run.cost is not None
    assert run.cost.seconds == pytest.approx(150)
    assert run.cost.memory == 400 * 2**20
    assert run.command[:2] == ("mtrl", "train")


def test_cost_follows_the_speed_of_training_not_the_clock() -> None:
    cost = Cost(((100, 10.0), (300, 20.0)), cores=2)
    assert cost.seconds == 20
    assert cost.core_hours == pytest.approx(40 / 3600)
    assert cost.steps_per_second == 15
    assert [cost.core_hours_at(step) * 1800 for step in (0, 50, 100, 200, 300, 999)] == pytest.approx(
        [0, 5, 10, 15, 20, 20]
    )
    assert Cost((), 1).core_hours == 0


def test_an_evaluation_written_twice_counts_once(tmp_path: Path, run_writer: Writer) -> None:
    """A run killed between its last evaluation and its summary repeats that evaluation when it is resumed."""
    folder = run_writer(tmp_path, "a", "s/x", 0)
    once = store.load(tmp_path).to_csv()
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    assert store.load(tmp_path).to_csv() == once


def test_runs_that_did_not_finish(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "a", "s/x", 0, finished=False)
    run_writer(tmp_path, "a", "s/x", 1, finished=False, manifest=False)
    found = store.load(tmp_path).runs
    assert [run.status for run in found] == ["running", "unfinished"]
    assert not any(run.usable for run in found)
    with pytest.raises(BenchmarkError, match="holds no run with records"):
        store.load(tmp_path / "nowhere")


def test_a_run_that_is_asked_for_more_steps_is_not_finished(tmp_path: Path, run_writer: Writer) -> None:
    folder = run_writer(tmp_path, "a", "s/x", 0)
    (folder / "summary.json").write_text(json.dumps({"steps": 100}))
    assert store.load(tmp_path).runs[0].status == "unfinished"


def test_one_run_is_a_store_too(tmp_path: Path, run_writer: Writer) -> None:
    folder = run_writer(tmp_path, "a", "s/x", 0, manifest=False)
    found = store.load(folder)
    assert [run.agent for run in found.runs] == ["a"]
    assert found.spec is None


def test_single_runs_with_other_settings_are_no_seeds_of_one_another(tmp_path: Path, run_writer: Writer) -> None:
    folders = [run_writer(tmp_path, "a", "toy", seed, manifest=False) for seed in (0, 1)]
    assert {run.agent for run in store.load(tmp_path).runs} == {"a"}
    config = folders[1] / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("copies: 8", "copies: 4").replace("kind: a", "kind: a\n  lr: 0.1"))
    found = store.load(tmp_path).runs
    assert [run.agent for run in found] == ["a (lr=0.1, copies=4)", "a (lr=None, copies=8)"]
    assert {row["agent"] for row in found[0].rows} == {"a (lr=0.1, copies=4)"}
    many = text.replace("copies: 8", "copies: 4").replace("kind: a", "kind: a\n  lr: 0.1\n  gamma: 0.9\n  lam: 0.5")
    config.write_text(many)
    third = run_writer(tmp_path, "a", "toy", 2, manifest=False)
    (third / "config.yaml").write_text(many.replace("copies: 4", "copies: 5").replace("seed: 1\n", "seed: 2\n"))
    assert len({run.agent for run in store.load(tmp_path).runs}) == 3, "they differ in the fourth place alone"
    shutil.rmtree(third)
    config.write_text(text.replace("seed: 1\n", "seed: 0\n", 1))
    with pytest.raises(
        BenchmarkError, match=r"a--toy--0 and .*a--toy--1 are both a with seed 0: move one of them away"
    ):
        store.load(tmp_path)


def test_the_cost_of_as_many_threads_as_cores_is_known_when_the_run_has_ended(
    tmp_path: Path, run_writer: Writer
) -> None:
    folder = run_writer(tmp_path, "a", "toy", 0)
    config, summary = folder / "config.yaml", folder / "summary.json"
    config.write_text(config.read_text().replace("threads: 1", "threads: 0").replace("workers: 0", "workers: auto"))
    assert store.load(tmp_path).runs[0].cost is None
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "threads": 4, "workers": 2}))
    cost = store.load(tmp_path).runs[0].cost
    assert cost is not None
    assert cost.cores == 6


def test_tables_for_other_tools(tmp_path: Path, grid_writer: Writer) -> None:
    results, runs = store.write_tables(store.load(grid_writer(tmp_path, {"a": 0.5}, ["s/x"], seeds=2)))
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 * 3
    assert tuple(rows[0]) == store.COLUMNS
    assert rows[0]["task"] == "toy/a"
    assert 0 < float(rows[0]["score"]) < 1.2
    assert "wall" not in results.read_text()
    with runs.open() as file:
        table = list(csv.DictReader(file))
    assert [row["seed"] for row in table] == ["0", "1"]
    assert float(table[0]["core_hours"]) == pytest.approx(150 / 3600, rel=1e-4)


CURVES = "step,task,seed,score\n100,toy/a,0,0.1\n200,toy/a,0,0.4\n100,toy/b,0,.2\n200,toy/b,0,.6\n200,toy/a,1,.5\n"


def test_published_curves_stand_beside_ours(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "a", "s/x", 0)
    source = tmp_path / "paper.csv"
    source.write_text(CURVES)
    store.import_curves(tmp_path, source, agent="MOORE (paper)")
    found = [run for run in store.load(tmp_path).runs if run.status == "imported"]
    assert [(run.agent, run.suite, run.seed, run.step) for run in found] == [
        ("MOORE (paper)", "s/x", 0, 200),
        ("MOORE (paper)", "s/x", 1, 200),
    ]
    assert found[0].rows[-1]["score"] in (0.4, 0.6)
    assert found[0].cost is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,task,seed,scores\n1,a,0,1\n", r"no column score \(is it 'scores'\?\)"),
        ("step,task,seed,score\n1,toy/a,0,good\n", "line 2: score is 'good', not a number"),
        ("step,task,seed,score\n1,toy/a,0,nan\n", "line 2: score is nan"),
        ("step,task,seed,score\n", "no rows"),
        ("step,task,seed,score,agent\n1,toy/a,0,1,p\n1,toy/a,0,1,q\n", "agent 'x' cannot be the name of several, p, q"),
        ("step,task,seed,score,suite\n1,toy/a,0,1,s/x\n1,toy/b,0,1,\n", "some rows name their suite and some do not"),
        ("step,task,seed,score\n1,other,0,1\n", "no suite in .* has the tasks other: say which with --suite"),
    ],
)
def test_curves_that_cannot_be_imported(tmp_path: Path, run_writer: Writer, text: str, message: str) -> None:
    run_writer(tmp_path, "a", "s/x", 0)
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        store.import_curves(tmp_path, tmp_path / "bad.csv", agent="x")


def alone(root: Path, run_writer: Writer, task: str, tasks: tuple[str, ...], **options: Any) -> Path:
    """A run of one task of s/x by the agent "one by one"."""
    folder = run_writer(root, "one by one", task, 0, tasks=(task,), **options)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suite": "s/x", "task": task, "tasks": tasks}))
    return folder


def test_runs_of_single_tasks_stand_beside_runs_of_all(tmp_path: Path, run_writer: Writer) -> None:
    tasks = ("toy/b", "toy/a")
    run_writer(tmp_path, "together", "s/x", 0, tasks=tasks, every=100_000, evaluations=2)
    for task, speed in (("toy/a", 1_000.0), ("toy/b", 500.0)):
        alone(tmp_path, run_writer, task, tasks, every=50_000, evaluations=2, speed=speed)
    one, together = sorted(store.load(tmp_path).runs, key=lambda run: run.agent)
    assert (one.suite, one.status, one.step, one.budget) == ("s/x", "finished", 200_000, 200_000)
    assert one.usable
    assert [(row["step"], row["task"], row["suite"]) for row in one.rows] == [
        (step, task, "s/x") for step in (100_000, 200_000) for task in tasks
    ]
    assert [(row["step"], row["task"]) for row in together.rows] == [(row["step"], row["task"]) for row in one.rows]
    assert one.cost is not None
    assert one.cost.marks == ((100_000, 150.0), (200_000, 300.0)), "the seconds of one task after the other"
    assert set(one.protocols) == set(tasks)
    _, table = store.write_tables(store.load(tmp_path))
    with table.open() as file:
        assert [(row["agent"], row["suite"], row["step"]) for row in csv.DictReader(file)] == [
            ("one by one", "toy/b", "100000"),
            ("one by one", "toy/a", "100000"),
            ("together", "s/x", "200000"),
        ]
    suite = analyse(store.load(tmp_path)).suites[0]
    assert {entry.agent: entry.tasks for entry in suite.entries} == {"one by one": tasks, "together": tasks}
    assert {entry.agent: entry.alone for entry in suite.entries} == {"one by one": True, "together": False}
    assert len(suite.improvement) == 2


def test_single_tasks_count_when_all_of_them_are_done(tmp_path: Path, run_writer: Writer) -> None:
    tasks = ("toy/a", "toy/b")
    alone(tmp_path, run_writer, "toy/a", tasks)
    assert [(run.status, run.usable) for run in store.load(tmp_path).runs] == [("unfinished", False)]
    alone(tmp_path, run_writer, "toy/b", tasks, finished=False)
    assert [(run.status, run.usable) for run in store.load(tmp_path).runs] == [("running", False)]


def settings(folder: Path, **agent: Any) -> None:
    """Change settings of a run's agent."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["agent"].update(agent)
    path.write_text(yaml.safe_dump(config))


def test_runs_beside_a_grid_are_no_seeds_of_its_agents(tmp_path: Path, grid_writer: Writer, run_writer: Writer) -> None:
    grid_writer(tmp_path, {"ppo": 0.5}, ["s/x"], seeds=2)
    settings(run_writer(tmp_path, "ppo", "s/x", 7, manifest=False), lr=1e-8)
    found = [(run.agent, run.seed) for run in store.load(tmp_path).runs]
    assert found == [("ppo", 0), ("ppo", 1), ("ppo (lr=1e-08)", 7)]
    settings(tmp_path / "runs" / "ppo--s_x--1", lr=1e-8)
    with pytest.raises(BenchmarkError, match=r"are both ppo on s/x, with other settings \(agent.lr\): move one"):
        store.load(tmp_path)


def test_a_seed_that_comes_twice_is_refused(tmp_path: Path, grid_writer: Writer) -> None:
    grid_writer(tmp_path, {"ppo": 0.5}, ["s/x"], seeds=1)
    shutil.copytree(tmp_path / "runs" / "ppo--s_x--0", tmp_path / "runs" / "copy")
    with pytest.raises(BenchmarkError, match="are both ppo with seed 0"):
        store.load(tmp_path)


def test_a_run_that_failed_before_it_began_is_counted(tmp_path: Path, grid_writer: Writer) -> None:
    grid_writer(tmp_path, {"ppo": 0.5, "sac": 0.5}, ["s/x"], seeds=1)
    folder = tmp_path / "runs" / "sac--s_x--0"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    manifest = json.loads((folder / "manifest.json").read_text()) | {"status": "failed", "config": config}
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        (folder / name).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = store.load(tmp_path)
    assert [(run.agent, run.status) for run in found.runs] == [("ppo", "finished"), ("sac", "failed")]
    assert "1 of 2 finished" in render(analyse(found))


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "config.yaml"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path, grid_writer: Writer) -> None:
    grid_writer(tmp_path, {"ppo": 0.5}, ["s/x"], seeds=1)
    path = tmp_path / "runs" / "ppo--s_x--0" / name
    path.write_text("")
    with pytest.raises(BenchmarkError, match=f"{name} is (damaged|empty)"):
        store.load(tmp_path)


def test_a_run_whose_last_records_are_lost_is_not_finished(tmp_path: Path, run_writer: Writer) -> None:
    path = run_writer(tmp_path, "ppo", "s/x", 0) / "metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    (run,) = store.load(tmp_path).runs
    assert (run.status, run.usable) == ("unfinished", False)


def test_imported_curves_join_no_agent_of_ours(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "ppo", "s/x", 0)
    source = tmp_path / "ppo.csv"
    source.write_text("\ufeffstep,task,seed,score\n10,toy/a,0,0.5\n10,toy/b,0,0.5\n", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="there are runs of our own of 'ppo': call the curves by --agent NAME"):
        store.import_curves(tmp_path, source, suite="s/x")
    store.import_curves(tmp_path, source, agent="theirs", suite="s/x")
    source.write_text("agent,step,task,seed,score\nppo,10,toy/a,1,0.7\n")
    path = store.import_curves(tmp_path, source, agent="theirs", suite="s/x")  # the option wins over the column
    assert [(row["agent"], row["seed"]) for row in store._parse(path)] == [("theirs", 0)] * 2 + [("theirs", 1)]
    run_writer(tmp_path, "theirs", "s/x", 0)  # a grid that grows
    with pytest.raises(BenchmarkError, match="there are runs of our own of 'theirs': call them otherwise in"):
        store.load(tmp_path)
    shutil.rmtree(tmp_path / "runs" / "theirs--s_x--0")
    source.write_text("step,task,seed,score\n10,toy/a,0,0.5\n10,toy/a,0,0.6\n")
    with pytest.raises(BenchmarkError, match="has seed 0 of toy/a at step 10 twice"):
        store.import_curves(tmp_path, source, agent="theirs", suite="s/x")
