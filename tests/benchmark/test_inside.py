"""Charts of diagnostics: which there are, what they show, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from mtrl.benchmark.attempt import BenchmarkError
from mtrl.benchmark.inside import panels, plot
from mtrl.cli import app
from mtrl.registry import UnknownNameError


def run(folder: Path, **values: float) -> Path:
    """A run with two records of ``diagnostics/policy/*`` and one of the critic."""
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = [{"step": 0, "charts/x": 1.0}]
    records += [{"step": s, **{f"diagnostics/policy/{k}": v * s for k, v in values.items()}} for s in (1, 2)]
    records += [{"step": 2, "diagnostics/critic/dormant": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_panels_hold_what_was_recorded(tmp_path: Path) -> None:
    made = run(tmp_path / "a", dormant=0.1, effective_rank=20.0, **{"s/x_expert0": 0.3, "s/x_expert1": 0.4})
    found = {panel.title: panel for panel in panels([made])}
    assert list(found) == ["effective rank of the features", "share of dormant units", "s/x, policy: use of experts"]
    assert found["share of dormant units"].labels == ["policy", "critic"]
    rank = found["effective rank of the features"].series[0]
    assert (rank.x.tolist(), rank.y.tolist()) == ([1, 2], [20.0, 40.0])
    use = found["s/x, policy: use of experts"]
    assert use.labels == ["expert 0", "expert 1"]
    assert [one.y.tolist() for one in use.series] == [[0.3, 0.6], [0.4, 0.8]]


def test_runs_are_called_by_what_differs(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"{name}--s_x--{seed}", dormant=0.1) for name in ("moe", "moore") for seed in (0, 1)]
    (panel,) = panels(runs)
    assert panel.labels[::2] == ["moe 0 policy", "moe 1 policy", "moore 0 policy", "moore 1 policy"]


def test_one_file_of_any_format(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, dormant=0.1, gradient_cosine=-0.2, **{"s/x_expert0": 0.3}) for name in ("a<b", "c")]
    sheet = ElementTree.fromstring(plot(runs, tmp_path / "x.svg").read_text())
    texts = {node.text for node in sheet.iter() if node.tag.endswith("text")}
    assert {"share of dormant units", "a<b policy", "c critic", "s/x, a<b policy: use of experts"} <= texts
    page = plot(runs, tmp_path / "x.html").read_text()
    assert page.count("<svg") == page.count("<figcaption>") == len(panels(runs))
    assert "a&lt;b policy" in page
    pytest.importorskip("matplotlib")
    assert plot(runs, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(tmp_path: Path) -> None:
    made = run(tmp_path / "first", dormant=0.1)
    with pytest.raises(UnknownNameError, match=r"unknown format '\.svgg'; did you mean '\.svg'"):
        plot([made], tmp_path / "x.svgg")
    with pytest.raises(BenchmarkError, match=r"frist holds no run; did you mean .*first"):
        plot([tmp_path / "frist"], tmp_path / "x.svg")
    (made / "metrics.jsonl").write_text('{"step": 1, "charts/x": 2.0}\n')
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plot", str(made), "-o", str(tmp_path / "x.svg")])
    assert shown.exit_code == 2
    assert "agent.inspect_every=0" in shown.output
    assert not (tmp_path / "x.svg").exists()
