"""The tables that commands print."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

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
        table.add_row(name, doc.strip().splitlines()[0].replace("``", "") if doc.strip() else "")
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


def settings(agent: str | None) -> Table:
    """Settings of a run, or of an agent: how each is called in a config and on the command line, and what it may be."""
    from mtrl.config import RunConfig

    schema = (RunConfig if agent is None else registry.agent(agent).Config).model_json_schema()
    table = Table(box=None, header_style="bold")
    table.add_column("setting", no_wrap=True)
    for column in ("default", "values", "what it is"):
        table.add_column(column)
    for row in _settings(schema, schema, "" if agent is None else "agent.", set()):
        table.add_row(*map(Text, row))  # lists are no markup
    if not table.row_count:
        table.add_row("", "", "", f"{agent} has no settings")
    return table


def _settings(part: Mapping[str, Any], schema: Mapping[str, Any], prefix: str, seen: set[str]) -> Iterator[list[str]]:
    """A row for each field of ``part``, those of its models included, each kind of model once."""
    for name, field in part.get("properties", {}).items():
        models = [option["$ref"].rpartition("/")[2] for option in field.get("anyOf", [field]) if "$ref" in option]
        default = field.get("default", ...)
        if default is None or not models:
            shown = default if isinstance(default, str) else "" if default is ... else json.dumps(default)
            yield [f"{prefix}{name}", shown, _values(field), field.get("description", "")]
        for model in models:
            if model in seen:
                continue
            seen.add(model)
            found = copy.deepcopy(schema["$defs"][model])
            for key, value in (default or {}).items() if isinstance(default, dict) else ():
                found["properties"][key]["default"] = value
            yield from _settings(found, schema, f"{prefix}{name}.", seen)


_BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}


def _values(field: Mapping[str, Any]) -> str:
    """What a field of a JSON schema may be, in a few words."""
    if "anyOf" in field:
        return " | ".join(_values(option) for option in field["anyOf"])
    if "$ref" in field:
        return "settings of its own"
    if "enum" in field or "const" in field:
        return " | ".join(str(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        parts = field.get("prefixItems", [field.get("items", {})])
        return f"[{', '.join(_values(item) for item in parts)}{'' if 'prefixItems' in field else ', ...'}]"
    bounds = [text.format(f"{field[key]:g}") for key, text in _BOUNDS.items() if key in field]
    return " ".join([str(field.get("type", "any")), *bounds])
