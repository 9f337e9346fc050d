"""The report: one file that needs nothing else, right numbers, and a real browser that draws it without complaint."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mtrl.benchmark import store, svg
from mtrl.benchmark.analysis import analyse
from mtrl.benchmark.paper import write_paper
from mtrl.benchmark.report import render, write_report
from mtrl.benchmark.tables import latex, markdown

Writer = Callable[..., Path]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Balance(HTMLParser):
    """Notices a tag that is closed wrongly or never."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """``<path/>`` opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"


@pytest.fixture
def page(tmp_path: Path, grid_writer: Writer) -> Path:
    """The report of two suites, three agents and imported curves with a difficult name."""
    root = grid_writer(tmp_path, {"ppo": 0.7, "moore": 0.8, "random": 0.0}, ["s/x", "s/y"], seeds=3, video=True)
    source = tmp_path / "paper.csv"
    source.write_text(
        "step,task,seed,score,suite\n300000,toy/a,0,.9,s/x\n300000,toy/b,0,.9,s/x\n300000,toy/c,0,.9,s/x\n"
    )
    store.import_curves(root, source, agent="<b>&co")
    return write_report(store.load(root), tmp_path / "report.html")


def test_the_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    checker = Balance()
    checker.feed(text)
    assert checker.open == []
    assert "<b>&co" not in text, "names are escaped"
    outside = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?!data:|#)([a-z]+:|//)[^"' )]*""", text)
    assert outside == []
    assert "default-src 'none'" in text
    for title in ("In short", "Results", "Learning curves", "Who beats whom", "Task by task", "Speed, memory, cost"):
        assert f"<h2>{title}</h2>" in text
    assert "What may not be concluded" in text
    assert "data:image/gif;base64," in text
    assert "mtrl train configs/ppo.yaml --seed 2" in text
    assert "&lt;b&gt;&amp;co" in text


def test_the_numbers_are_those_of_the_analysis(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    for suite in analyse(store.load(tmp_path)).suites:
        assert html.escape(suite.verdict) in text
        for entry in suite.entries:
            assert f"<b>{entry.iqm.value:.3f}</b> ({entry.iqm.low:.3f} to {entry.iqm.high:.3f})" in text
    charts = [json.loads(html.unescape(found)) for found in re.findall(r'data-chart="([^"]*)"', text)]
    assert len(charts) >= 2 * 3
    assert all(len(one["x"]) == len(one["y"]) for chart in charts for one in chart["series"])


def test_a_store_without_a_finished_run_has_a_page_too(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "a", "s/x", 0, finished=False)
    text = write_report(store.load(tmp_path), tmp_path / "report.html").read_text()
    assert "No run has finished yet" in text
    assert "running" in text


def test_runs_that_were_not_evaluated_so_are_no_unfinished_ones(tmp_path: Path, grid_writer: Writer) -> None:
    text = render(analyse(store.load(grid_writer(tmp_path, {"ppo": 0.7}, ["s/x"], seeds=1)), "sampled"))
    assert "No finished run was evaluated with sampled actions (eval.stochastic adds sampled ones)" in text


def test_other_evaluation_episodes_are_told(tmp_path: Path, grid_writer: Writer) -> None:
    root = grid_writer(tmp_path, {"ppo": 0.7, "sac": 0.8}, ["s/x"], seeds=1)
    path = root / "runs" / "sac--s_x--0" / "config.yaml"
    path.write_text(path.read_text().replace("episodes: 50", "episodes: 2"))
    text = render(analyse(store.load(root)))
    assert "Not all runs met the same evaluation episodes" in text
    assert "2 episodes per task and evaluation, evaluation seed 1000003: sac." in text


def test_charts_are_well_formed_svg() -> None:
    x = np.array([0.0, 1e6, 2e6])
    series = [svg.Series(i, f"a<{i}", x, x / 2e6, x / 3e6, x / 1e6) for i in range(10)]
    for chart in (
        svg.line_chart(series, "steps", "score"),
        svg.line_chart([svg.Series(0, "one", x[1:2], x[1:2] / 1e6, x[:1], x[1:2] / 1e6)], "steps", "score"),
        svg.forest([svg.Bar("a > b", 0.5, 0.2, 0.8, 0, 1)], "p", reference=0.5),
    ):
        ElementTree.fromstring(chart)
        ElementTree.fromstring(svg.standalone(chart, ["a<b", "c"]))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 300_000, [0, 1e5, 2e5, 3e5]), (-0.3, 1.2, [0, 0.5, 1])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert svg.ticks(low, high) == pytest.approx(expected)
    assert [svg.short(1_500_000), svg.short(300_000), svg.short(0), svg.short(0.2)] == ["1.5M", "300k", "0", "0.2"]


def test_tables_and_plots_for_papers(page: Path, tmp_path: Path) -> None:
    found = store.load(tmp_path)
    analysis = analyse(found)
    text = markdown(analysis)
    head = next(line for line in text.splitlines() if line.startswith("| agent"))
    rows = [line for line in text.splitlines() if line.startswith("| ppo | 3 |")]
    assert all(line.count("|") == head.count("|") for line in rows)
    tex = latex(analysis)
    assert "<b>\\&co" in tex
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == 4
    written = write_paper(found, tmp_path / "paper")
    assert {path.suffix for path in written} >= {".md", ".tex", ".svg"}
    for path in written:
        if path.suffix == ".svg":
            ElementTree.fromstring(path.read_text())


# Runs in the page: uses it as a reader would, and leaves what it saw in the document.
PROBE = """
const seen = { errors: window.__errors, charts: [], texts: [] };
for (const chart of document.querySelectorAll("figure svg.chart")) {
  if (chart.closest("[hidden]") || chart.closest("details:not([open])")) continue;
  const box = chart.getBoundingClientRect();
  const lines = [...chart.querySelectorAll(".line, .whisker, .dot")];
  const longest = Math.max(...lines.map((one) => one.getBBox().width + one.getBBox().height));
  const ink = getComputedStyle(lines.find((one) => !one.matches(".dot"))).stroke;
  seen.charts.push([box.width, box.height, longest, ink]);
}
const at = (node, x) => {
  const box = node.getBoundingClientRect();
  const where = { clientX: box.left + box.width * x, clientY: box.top + box.height / 2, bubbles: true };
  node.dispatchEvent(new PointerEvent("pointermove", where));
};
const tip = document.getElementById("tip");
const first = document.querySelector("svg[data-chart]");
at(first, 0.97);
seen.tip = tip.hidden ? null : tip.textContent;
at(document.querySelector(".cell"), 0.5);
seen.cell = tip.textContent;
const rows = () => [...document.querySelectorAll('[data-agent="0"]')].filter((n) => n.getClientRects().length).length;
seen.before = rows();
document.querySelector(".chip").click();
seen.after = rows();
document.querySelector(".chip").click();
const views = first.closest("figure").querySelectorAll(".choice button");
views[1].click();
seen.hours = first.closest("[data-view]").hidden;
const back = () => getComputedStyle(document.body).backgroundColor;
seen.themes = [back()];
document.getElementById("theme").click();
seen.themes.push(back());
seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.requests = performance.getEntriesByType("resource").map((one) => one.name).filter((name) => !/^data:/.test(name));
const pre = document.createElement("pre");
pre.id = "seen";
pre.textContent = JSON.stringify(seen);
document.body.append(pre);
"""
WATCH = (
    "window.__errors = []; addEventListener('error', (e) => __errors.push(e.message)); "
    "addEventListener('securitypolicyviolation', (e) => __errors.push(e.blockedURI));"
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 500])  # 500 is the narrowest window that headless Chromium opens
def test_in_a_real_browser(page: Path, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    probed = tmp_path / "probed.html"
    text = page.read_text().replace("<style>", f"<script>{WATCH}</script><style>", 1)
    probed.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet = "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom --virtual-time-budget=3000"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        + [f"--window-size={width},900", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, "the probe did not finish"
    seen = json.loads(html.unescape(found.group(1)))
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert len(seen["charts"]) >= 2 * 3
    for wide, high, drawn, ink in seen["charts"]:
        assert wide > 300
        assert high > 80
        assert drawn > 5
        assert ink.startswith("rgb(")
        assert ink != "rgb(0, 0, 0)", "colours come from the style"
    assert "environment steps: 300,000" in seen["tip"]
    assert "ppo: 0." in seen["tip"]
    assert " on toy/a: " in seen["cell"]
    assert seen["before"] > 5
    assert seen["after"] == 0
    assert seen["hours"] is True
    assert seen["themes"][0] != seen["themes"][1]
    assert seen["overflow"] <= 0, "wide tables scroll by themselves, the page does not"


@pytest.mark.slow
def test_a_large_store_is_written_in_time_and_size(tmp_path: Path, grid_writer: Writer) -> None:
    """500 runs x 50 tasks. The limit of time is generous: it is a bound on the algorithm, not a benchmark."""
    agents = {f"agent {i}": 0.3 + 0.06 * i for i in range(10)}
    tasks = [f"toy/task-{i}" for i in range(50)]
    root = grid_writer(tmp_path, agents, [f"s/{i}" for i in range(5)], seeds=10, tasks=tasks, evaluations=10)
    started = time.process_time()
    path = write_report(store.load(root), tmp_path / "report.html")
    assert time.process_time() - started < 60
    assert path.stat().st_size < 5_000_000
