"""The tables that commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mtrl import registry

if TYPE_CHECKING:
    from mtrl.evaluate import Evaluation
    from mtrl.watch import Reel


def evaluation(found: Evaluation) -> Table:
    """Return, score and success of every task, and their means."""
    from mtrl.evaluate import table as rows

    table = Table(title="evaluation", header_style="bold")
    table.add_column("task", no_wrap=True)
    for column in ("episodes", "return", "score", "success"):
        table.add_column(column, justify="right")
    entries = rows(found)
    for row in entries:
        success = "-" if row["success"] is None else f"{100 * row['success']:.1f} %"
        table.add_row(row["task"], str(row["episodes"]), f"{row['return']:.3f}", f"{row['score']:.3f}", success)
    if len(entries) > 1:
        known: list[Any] = [row["success"] for row in entries if row["success"] is not None]
        success = f"{100 * sum(known) / len(known):.1f} %" if known else "-"
        score = sum(row["score"] for row in entries) / len(entries)
        table.add_section()
        table.add_row("mean over tasks", "", "", f"{score:.3f}", success)
    return table


def episodes(reels: Sequence[Reel]) -> Table:
    """The episodes of a video."""
    table = Table(title="episodes shown", header_style="bold")
    table.add_column("task", no_wrap=True)
    for column in ("seed", "return", "success", "steps"):
        table.add_column(column, justify="right")
    for task, episode in ((reel.task, episode) for reel in reels for episode in reel.episodes):
        success = {None: "-", True: "yes", False: "no"}[episode.success]
        table.add_row(task.name, str(episode.seed), f"{episode.ret:.3f}", success, str(episode.length))
    return table


def suites() -> Table:
    """Installed suites and their groups."""
    table = Table(box=None, header_style="bold")
    table.add_column("suite")
    table.add_column("groups")
    for name in registry.names(registry.SUITES):
        groups = registry.suite(name).groups
        table.add_row(name, ", ".join(groups[:20]) + (f", ... ({len(groups)})" if len(groups) > 20 else ""))
    return table


def agents() -> Table:
    """Installed agents."""
    table = Table(box=None, header_style="bold")
    table.add_column("agent")
    table.add_column("what it is")
    for name in registry.names(registry.AGENTS):
        doc = registry.agent(name).__doc__ or ""
        table.add_row(name, doc.strip().splitlines()[0] if doc.strip() else "")
    return table


def tasks(suite: str) -> Table:
    """Tasks of a mix, with their score scales and where these come from."""
    found = registry.mix(suite)
    table = Table(box=None, header_style="bold")
    table.add_column("task", no_wrap=True)
    for column in ("copies", "horizon", "rows", "score 0 .. 1"):
        table.add_column(column, justify="right")
    for task, copies in zip(found.tasks, found.copies, strict=True):
        scale = f"{task.score[0]:g} .. {task.score[1]:g}"
        table.add_row(task.name, str(copies), str(task.horizon), str(task.agents), scale)
    sources = dict.fromkeys(task.score_source for task in found.tasks if task.score_source)
    table.caption = "\n".join(f"score: {source}" for source in sources)
    table.caption_justify = "left"
    return table
