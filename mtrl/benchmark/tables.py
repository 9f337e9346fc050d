"""The tables of a report for a terminal, for Markdown and for LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mtrl.benchmark.analysis import Analysis, Entry, SuiteResult
from mtrl.benchmark.stats import Estimate

HEAD = (
    "agent", "seeds", "IQM", "95 % interval", "IQM of runs", "median", "mean", "gap", "success", "core-hours",
    "a core-hour buys",
)  # fmt: skip
_NARROW = ("agent", "seeds", "IQM", "95 % interval", "success", "core-hours", "a core-hour buys")  # fits 80 columns
PAIR = ("A", "B", "P(A > B)", "95 % interval")


def cells(entry: Entry) -> tuple[str, ...]:
    """One agent's row, under ``HEAD``."""
    iqm, rest = entry.iqm, (entry.estimates[name] for name in ("median", "mean", "optimality gap"))
    return (
        entry.agent,
        str(len(entry.seeds)),
        f"{iqm.value:.3f}",
        f"{iqm.low:.3f} to {iqm.high:.3f}",
        f"{entry.iqm_of_runs:.3f}",
        *(f"{one.value:.3f}" for one in rest),
        "-" if entry.success is None else f"{100 * entry.success.mean():.1f} %",
        "-" if entry.core_hours is None else f"{entry.core_hours * len(entry.runs):.3g}",
        entry.one_core_hour_buys(),
    )


def terminal(analysis: Analysis, pairs: bool = False) -> Group:
    """Tables for a terminal: the headline of each suite, what may not be concluded, and how the runs ended.

    Args:
        analysis: of a store.
        pairs: also the probability of improvement of every pair of agents.
    """
    parts: list[Table | Text] = []
    for suite in analysis.suites:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in _NARROW:
            table.add_column(name, justify="left" if name == "agent" else "right")
        for entry in suite.entries:
            row = dict(zip(HEAD, cells(entry), strict=True))
            table.add_row(*(row[name] for name in _NARROW))
        title = Text(f"{suite.suite}, {analysis.actions} actions", "bold cyan")
        parts += [title, table, Text(suite.verdict), *(Text(f"- {text}", "yellow") for text in suite.cautions), Text()]
        if pairs and suite.improvement:
            parts += [_pairs(suite), Text()]
    counts: dict[str, int] = {}
    for run in analysis.store.runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    parts.append(Text("runs: " + ", ".join(f"{count} {status}" for status, count in counts.items())))
    return Group(*parts)


def _pairs(suite: SuiteResult) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in PAIR:
        table.add_column(name, justify="left" if name in "AB" else "right")
    for row in _compared(suite):
        table.add_row(*row)
    return table


def _compared(suite: SuiteResult) -> list[tuple[str, ...]]:
    """Rows under ``PAIR``."""
    return [(a, b, f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}") for a, b, one in ranked(suite)]


def markdown(analysis: Analysis) -> str:
    """GitHub tables: headline, improvements and tasks of every suite."""
    lines: list[str] = []
    for suite in analysis.suites:
        lines += [f"## {suite.suite}", "", suite.verdict, *(f"- {text}" for text in suite.cautions), ""]
        lines += rows_of(HEAD, [cells(entry) for entry in suite.entries]) + [""]
        if suite.improvement:
            lines += rows_of(PAIR, _compared(suite)) + [""]
        agents = [entry.agent for entry in suite.entries]
        lines += rows_of(("task, mean score", *agents), [(task, *_task(suite, task)) for task in suite.tasks]) + [""]
    return "\n".join(lines)


def latex(analysis: Analysis) -> str:
    """``booktabs`` tables: headline and tasks of every suite."""
    parts = []
    for suite in analysis.suites:
        body = []
        for entry in suite.entries:
            iqm, median, mean, gap = (entry.estimates[name] for name in ("IQM", "median", "mean", "optimality gap"))
            values = (_range(iqm), *(f"{one.value:.2f}" for one in (median, mean, gap)), str(len(entry.seeds)))
            body.append(" & ".join((_tex(entry.agent), *values)))
        parts.append(_tabular("lrrrrr", "Agent & IQM & Median & Mean & Gap & Seeds", body, f"{suite.suite}: score"))
        body = [" & ".join((_tex(task), *_task(suite, task))) for task in suite.tasks]
        head = " & ".join(("Task", *(_tex(entry.agent) for entry in suite.entries)))
        columns = "l" + "r" * len(suite.entries)
        parts.append(_tabular(columns, head, body, f"{suite.suite}: mean score of each task"))
    return "% \\usepackage{booktabs}\n" + "\n".join(parts)


def ranked(suite: SuiteResult) -> list[tuple[str, str, Estimate]]:
    """Every pair of agents once, the better IQM first, with P(first > second)."""
    order = [entry.agent for entry in suite.entries]
    return [(a, b, one) for (a, b), one in suite.improvement.items() if order.index(a) < order.index(b)]


def _task(suite: SuiteResult, task: str) -> tuple[str, ...]:
    return tuple(
        f"{entry.scores[:, entry.tasks.index(task)].mean():.2f}" if task in entry.tasks else "-"
        for entry in suite.entries
    )


def rows_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a GitHub table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows)]


def _range(one: Estimate) -> str:
    return f"{one.value:.2f} {{\\footnotesize [{one.low:.2f}, {one.high:.2f}]}}"


def _tabular(columns: str, head: str, body: Sequence[str], caption: str) -> str:
    lines = [f"{row} \\\\" for row in body]
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            f"{head} \\\\",
            "\\midrule",
            *lines,
            "\\bottomrule",
            "\\end{tabular}",
            f"\\caption{{{_tex(caption)}}}",
            "\\end{table}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return "".join({"\\": "\\textbackslash{}"}.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)
