"""Names to things: ``"minigrid/mt3"``, ``"metaworld/mt10+atari/8*4"`` and ``"module:Attr/group"`` to tasks, agent
names to classes.

Suites and agents are found through the entry-point groups ``mtrl.suites`` and ``mtrl.agents`` or through
``"module:Attr"``; only what is named is imported. Built-in ones use the same mechanism as third parties.
"""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from mtrl.types import Suite, Task

SUITES = "mtrl.suites"
AGENTS = "mtrl.agents"
_AN_AGENT = (
    "an agent is a class with Config, a pydantic model of its options, made as cls(spec, config, seed=..., "
    "device=...), see mtrl.types.Agent"
)


class Part(NamedTuple):
    """One part of a mix: ``suite``, its ``group`` ("" where the suite has only one) and ``copies`` of every task."""

    suite: str
    group: str
    copies: int

    @property
    def name(self) -> str:
        """Without copies: ``"suite/group"``."""
        return f"{self.suite}/{self.group}" if self.group else self.suite


class Mix(NamedTuple):
    """What a mix names: T tasks in the order written, the ``copies`` [T] it asks for, and the part [T] each is from."""

    tasks: tuple[Task, ...]
    copies: tuple[int, ...]
    parts: tuple[str, ...]


class UnknownNameError(ValueError):
    """A name that nothing answers to. The message names the place and the nearest valid choice."""

    def __init__(self, what: str, given: str, choices: Iterable[str], hint: str = "") -> None:
        self.what, self.given, self.choices = what, given, sorted(set(choices))
        near = nearest(given, self.choices)
        message = f"unknown {what} {given!r}"
        if near:
            message += f"; did you mean {near!r}?"
        if self.choices:
            shown = ", ".join(self.choices[:12]) + (", ..." if len(self.choices) > 12 else "")
            message += f" (valid: {shown})"
        super().__init__(message + (f" {hint}" if hint else ""))


class MissingPackageError(ModuleNotFoundError):
    """An optional package that is not installed; the message names it and the command that installs it."""


class MixError(ValueError):
    """A mix that is written wrongly; the message says how to write it."""


class PluginError(UnknownNameError):
    """A name that leads to something that is no suite or agent, or a suite that fails; the message says what is wrong.

    It is an ``UnknownNameError``, so that all who turn a user's mistake into one line do so here too.
    """

    def __init__(self, message: str) -> None:
        ValueError.__init__(self, message)
        self.what, self.given, self.choices = "", "", []


def nearest(given: str, choices: Iterable[str]) -> str | None:
    """The choice closest to ``given``, ignoring case, or None if nothing is near."""
    lower = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=0.5)
    return lower[match[0]] if match else None


def names(kind: str) -> list[str]:
    """Installed entry points of ``kind`` (``SUITES`` or ``AGENTS``), sorted; imports none of them."""
    return sorted({point.name for point in entry_points(group=kind)})


_modules: dict[str, str] = {}  # suite, as it was asked for -> its module
_homes: dict[str, str] = {}  # task -> the module of the suite that it is from


def modules(tasks: Iterable[str]) -> list[str]:
    """The modules of the suites that these tasks, by name, are from.

    Worker processes import them first: what they register (as with Gymnasium) is nowhere in a pickled task.
    """
    return list(dict.fromkeys(_homes[name] for name in tasks if name in _homes))


def load(kind: str, name: str) -> Any:
    """The object behind an entry-point name or ``"module:Attr"``.

    Raises:
        UnknownNameError: no entry point, no such module, or no such attribute in it.
        ImportError: something that the module needs is missing; passed through, since it names what.
    """
    what = "suite" if kind == SUITES else "agent"
    if ":" in name:
        module, _, attr = name.partition(":")
        try:
            target = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            hint = "- install its package, or put its folder on the path, as in PYTHONPATH=. mtrl ..."
            raise UnknownNameError("module", module, (), hint) from None
        if not hasattr(target, attr):
            # Suites may be classes, instances or functions: all names of the module could be meant.
            valid = [n for n, thing in vars(target).items() if n[0] != "_" and (kind == SUITES or is_agent(thing))]
            raise UnknownNameError(f"{what} in module {module!r}", attr, valid, "" if valid else f"- {_AN_AGENT}")
        if kind == SUITES:
            _modules[name] = module
        return getattr(target, attr)
    points: dict[str, EntryPoint] = {point.name: point for point in entry_points(group=kind)}
    if name not in points:
        raise UnknownNameError(
            what, name, points, f'- or name one as "module:Attr", or install a package with the entry point {kind!r}'
        )
    found = points[name].load()
    if kind == SUITES:
        _modules[name] = points[name].module
    return found


def suite(name: str) -> Suite:
    """The suite called ``name``; a class or a function without arguments is called to make it."""
    found = load(SUITES, name)
    if is_agent(found) and not hasattr(found, "tasks"):
        hint = f"check it with mtrl.testing.check_agent({found.__name__})"
        raise PluginError(f"{name!r} is an agent, not a suite; {hint}")
    try:
        made = found() if callable(found) else found
    except TypeError as error:
        hint = "name a suite, or a class or function that makes one without arguments"
        raise PluginError(f"{name!r} is not a suite: calling it raised {raised(error)}; {hint}") from error
    if not isinstance(made, Suite):
        missing = [part for part in ("name", "groups", "tasks") if not hasattr(made, part)]
        hint = "a suite has name, groups and tasks(group), see mtrl.types.Suite"
        raise PluginError(f"{name!r} is not a suite: it lacks {', '.join(missing)}; {hint}")
    return made


def agent(name: str) -> Any:
    """The agent class called ``name``.

    Raises:
        UnknownNameError: no such agent, or no agent.
    """
    found = load(AGENTS, name)
    if not is_agent(found):
        lack = "it lacks Config" if isinstance(found, type) else "it is no class"
        raise PluginError(f"{name!r} is not an agent: {lack}; {_AN_AGENT}")
    return found


def is_agent(thing: Any) -> bool:
    """Whether it looks like an agent class: only its ``Config`` can be told without making one."""
    return isinstance(thing, type) and hasattr(thing, "Config")


def raised(error: Exception) -> str:
    """A caught exception in one line, with the file and line that raised it."""
    place = raised_at(error)
    return f"{type(error).__name__}: {error}" + (f" ({place})" if place else "")


def raised_at(error: Exception) -> str:
    """File and line that raised a caught exception; empty if the call itself had wrong arguments."""
    inside = traceback.extract_tb(error.__traceback__)[1:]
    return f"{inside[-1].filename}:{inside[-1].lineno}" if inside else ""


def parts(text: str) -> tuple[Part, ...]:
    """The parts of a mix as they are written; nothing is looked up.

    Raises:
        MixError: an empty part, or copies that are no whole number from 1 up.
    """
    found = []
    for part in text.split("+"):
        name, star, count = part.partition("*")
        source, _, group = name.strip().partition("/")
        if not source:
            raise MixError(f"empty part in suite {text!r}: write 'suite/group' parts joined by '+'")
        if star and not (count.strip().isdecimal() and int(count)):
            example = "write copies as a whole number from 1 up, as in 'minigrid/mt3*4'"
            raise MixError(f"{part.strip()!r} in suite {text!r}: {example}")
        found.append(Part(source, group, int(count) if star else 1))
    return tuple(found)


def mix(text: str) -> Mix:
    """Tasks and copies of a mix: ``"suite/group"`` parts joined by ``+``, each with ``*N`` for N copies of its tasks.

    ::

        found = mtrl.mix("metaworld/mt10+minigrid/mt7*4")
        envs = mtrl.MultiTaskVectorEnv(found.tasks, found.copies)  # 10 + 4 * 7 environments

    Raises:
        UnknownNameError: a suite or a group that does not exist, or that ``tasks_of`` refuses.
        MixError: a part without a group where the suite has several, a task named twice, or what ``parts`` refuses.
    """
    found: list[tuple[Task, int, str]] = []
    for part in parts(text):
        source, group = suite(part.suite), part.group
        if not group:
            if len(source.groups) != 1:
                example = f"{part.suite}/{next(iter(source.groups), 'TASK')}"
                raise MixError(f"suite {part.suite!r} needs a group, as in {example!r}")
            group = source.groups[0]
        for task in tasks_of(source, group):
            found.append((task, part.copies, part.name))
            if part.suite in _modules:
                _homes[task.name] = _modules[part.suite]
    seen: set[str] = set()
    for task, _, _ in found:
        if task.name in seen:
            raise MixError(f"task {task.name!r} appears twice in {text!r}: ask for more copies instead")
        seen.add(task.name)
    return Mix(
        tuple(task for task, _, _ in found),
        tuple(copies for _, copies, _ in found),
        tuple(part for _, _, part in found),
    )


def tasks_of(source: Suite, group: str) -> tuple[Task, ...]:
    """The tasks of one group of a suite.

    Raises:
        UnknownNameError: the suite has no such group.
        MissingPackageError: it needs another package.
        PluginError: it raised something else, or has no tasks.
    """
    try:
        found = tuple(source.tasks(group))
    except (UnknownNameError, MissingPackageError):
        raise
    except Exception as error:
        raise PluginError(f"suite {source.name!r}, group {group!r}: tasks() raised {raised(error)}") from error
    if not found:
        raise PluginError(f"suite {source.name!r}, group {group!r}: tasks() returned no tasks")
    if wrong := [one for one in found if not isinstance(one, Task)]:
        raise PluginError(
            f"suite {source.name!r}, group {group!r}: tasks() returned {wrong[0]!r}, not a mtrl.types.Task"
        )
    return found


def tasks(text: str) -> tuple[Task, ...]:
    """The tasks of a mix, each once: how many copies of them are trained on (``mix``) is no part of what they are."""
    return mix(text).tasks
