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
