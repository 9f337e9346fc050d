"""The commands: what a user types, what is written, and what a mistake says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mtrl.benchmark import attempt, dashboard
from mtrl.benchmark.analysis import analyse
from mtrl.benchmark.keep import after
from mtrl.benchmark.store import load
from mtrl.cli import app

Writer = Callable[..., Path]


def call(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(word) for word in words])


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec file of one run."""
    path = tmp_path / "tiny.yaml"
    agents = {"random": {"agent": "random", "steps": 20}}
    path.write_text(yaml.safe_dump({"name": "tiny", "seeds": 1, "suites": ["mtrl.testing:Probes"], "agents": agents}))
    path.write_text(path.read_text().replace("Probes", "Probes/discrete"))
    return path


def test_results_report_and_plots(tmp_path: Path, grid_writer: Writer) -> None:
    root = grid_writer(tmp_path, {"weak": 0.2, "strong": 0.9}, ["s/x"], seeds=5)
    shown = call("results", root)
    assert shown.exit_code == 0, shown.output
    assert "it beats weak" in shown.output
    assert "runs: 10 finished" in shown.output
    assert (root / "results.csv").exists()
    assert (root / "runs.csv").exists()

    written = call("report", root, "-o", tmp_path / "page.html", "--paper", tmp_path / "paper")
    assert written.exit_code == 0, written.output
    assert "strong has the highest IQM" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "paper" / "tables.tex").exists()
    assert call("report", root, "--sampled").exit_code == 0

    (tmp_path / "paper.csv").write_text("step,task,seed,score\n9,toy/a,0,1\n9,toy/b,0,1\n9,toy/c,0,1\n")
    imported = call("results", root, "--import", tmp_path / "paper.csv", "--agent", "published")
    assert "published has the highest IQM" in imported.output


def test_kept_results_show_what_the_grid_shows(tmp_path: Path, grid_writer: Writer) -> None:
    """Numbers that a repository keeps can be checked without the runs, by the same command."""
    kept = tmp_path / "kept"
    grid = grid_writer(tmp_path / "grid", {"weak": 0.2, "strong": 0.9}, ["s/x", "s/y"], seeds=5)
    call("keep", grid, "--out", kept)
    files = {path.name: path.read_text() for path in kept.iterdir()}
    for options in ((), ("--pairs",), ("--step", "150000", "--pairs")):
        shown = call("results", kept, *options)
        assert shown.exit_code == 0, shown.output
        assert shown.output == call("results", grid, *options).output.partition("wrote")[0]
    assert {path.name: path.read_text() for path in kept.iterdir()} == files, "nothing is written into it"
    page = call("report", kept, "-o", tmp_path / "page.html")
    assert page.exit_code == 0, page.output
    assert "strong has the highest IQM" in (tmp_path / "page.html").read_text()
    refused = call("results", kept, "--import", tmp_path / "paper.csv")
    assert "kept holds kept results: import into the folder of the runs" in refused.stderr


def test_results_as_of_a_step(tmp_path: Path, run_writer: Writer) -> None:
    """What came later does not count, neither in scores nor in costs; runs that were stopped later count, too."""
    for seed in range(5):
        run_writer(tmp_path, "a", "s/x", seed, skill=0.9, finished=seed < 4)
        run_writer(tmp_path, "b", "s/x", seed, skill=0.2)
        run_writer(tmp_path, "a", "s/long", seed, evaluations=2, every=1_000_000)
    early = call("results", tmp_path, "--step", "1e5", "--pairs").output
    (found,) = analyse(after(load(tmp_path), 100_000, "greedy")).suites
    a, b = found.entries
    assert (a.seeds, b.seeds) == ((0, 1, 2, 3, 4),) * 2
    assert (a.scores == [[row["score"] for row in run.rows if row["step"] == 100_000] for run in a.runs]).all()
    assert b.core_hours == pytest.approx(100_000 / 2_000 / 3600)
    assert early.count(f"{a.iqm.value:.3f}") == 1
    assert " ".join(("a", "b", "1.000", "1.000 to 1.000")) in " ".join(early.split())
    assert "s/long" not in early
    assert not (tmp_path / "results.csv").exists(), "a table of everything would belie what is shown"
    wrong = call("results", tmp_path, "--step", "120000")
    assert wrong.exit_code == 2
    assert "no evaluation with greedy actions after 120000 steps; the nearest: 50000, 100000, 150000" in wrong.stderr
    assert "the nearest: none" in call("results", tmp_path, "--step", "1", "--sampled").stderr


def test_damaged_kept_results_are_named(tmp_path: Path, grid_writer: Writer) -> None:
    kept = tmp_path / "kept"
    call("keep", grid_writer(tmp_path / "grid", {"a": 0.5}, ["s/x"], seeds=2), "--out", kept)
    whole = (kept / "rows.jsonl").read_text()
    for damage in (whole[:-9], whole + "[]\n", whole.replace('"step"', '"stop"')):
        (kept / "rows.jsonl").write_text(damage)
        shown = call("results", kept)
        assert shown.exit_code == 2
        assert "rows.jsonl: line " in shown.stderr
    (kept / "rows.jsonl").unlink()
    assert "rows.jsonl: No such file or directory: a kept folder needs it" in call("results", kept).stderr


def test_a_grid_ends_with_its_report(tmp_path: Path, spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails is named, tables and report are written all the same, and the exit status says so."""
    code = "import pathlib, sys; o = pathlib.Path(sys.argv[1]); (o / 'config.yaml').write_text(sys.argv[2]); "
    code += "(o / 'metrics.jsonl').write_text(''); print('no luck'); sys.exit(3)"

    def command(job: Any, root: Path) -> list[str]:
        plain = yaml.safe_dump(job.config.model_dump(mode="json"))
        return [sys.executable, "-c", code, str(attempt.folder_of(root, job)), plain]

    monkeypatch.setattr(attempt, "_command", command)
    ended = call("benchmark", spec, "--out", tmp_path / "out")
    assert ended.exit_code == 1, ended.output
    assert "no luck" in ended.output
    assert "1 of 1 runs failed" in ended.output
    assert "failed" in (tmp_path / "out" / "report.html").read_text()
    assert "already holds a grid: go on with --resume" in call("benchmark", spec, "--out", tmp_path / "out").stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("benchmark", "nowhere.yaml", "--out", "x"), "no benchmark spec 'nowhere.yaml'"),
        (("sweep", "nowhere.yaml", "--out", "x"), "no benchmark spec 'nowhere.yaml'"),
        (("results", "nowhere"), "nowhere holds no run with records"),
        (("report", "nowhere"), "nowhere holds no run with records"),
    ],
)
def test_mistakes_are_one_clear_line(words: tuple[str, ...], message: str) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_unknown_engine(spec: Path, tmp_path: Path) -> None:
    result = call("benchmark", spec, "--out", tmp_path / "x", "--engine", "rey")
    assert result.exit_code == 2
    assert "did you mean 'ray'?" in result.stderr


def test_the_dashboard_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dashboard.ThreadingHTTPServer, "serve_forever", interrupt)
    shown = call("dashboard", tmp_path, "--port", "0")
    assert shown.exit_code == 0
    assert "http://127.0.0.1:" in shown.output
