"""Names to suites, tasks and agents, and what is said to those who misspell them."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from mtrl import registry
from mtrl.registry import UnknownNameError
from mtrl.types import Task

HERE = "mtrl_registry_fixture"


def build() -> Any:
    raise AssertionError("listing tasks must not build environments")


class Fruit:
    """Three tasks in two groups; remembers what was asked for."""

    name = "fruit"
    groups: Sequence[str] = ("all", "sweet")
    tasks_of = {"all": ("apple", "lemon", "pear"), "sweet": ("pear", "apple")}

    def tasks(self, group: str) -> list[Task]:
        names = self.tasks_of.get(group, (group,) if group in self.tasks_of["all"] else ())
        if not names:
            raise UnknownNameError("group", group, (*self.groups, *self.tasks_of["all"]))
        return [Task(f"fruit/{name}", build, 5) for name in names]


class Single(Fruit):
    name = "single"
    groups = ("only",)
    tasks_of = {"all": ("stone",), "only": ("stone",)}


class Stump:
    name = "stump"


class Learner:
    """What tells an agent before it is made is its ``Config``."""

    class Config: ...

    def __init__(self, spec: Any, config: Any) -> None: ...


class Fussy(Fruit):
    def __init__(self, sort: str) -> None: ...


def factory() -> Fruit:
    return Fruit()


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module to name things in, and entry points that lead there: ``fruit``, ``single`` and ``gone``."""
    module = types.ModuleType(HERE)
    for thing in (Fruit, Single, Stump, Learner, Fussy, factory):
        setattr(module, thing.__name__, thing)
    vars(module)["instance"] = Fruit()
    monkeypatch.setitem(sys.modules, HERE, module)
    points = [
        EntryPoint("fruit", f"{HERE}:Fruit", registry.SUITES),
        EntryPoint("single", f"{HERE}:Single", registry.SUITES),
        EntryPoint("gone", "mtrl_no_such_module:Suite", registry.SUITES),
        EntryPoint("picker", f"{HERE}:Learner", registry.AGENTS),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints(points).select(group=group))


def named(text: str) -> list[str]:
    return [task.name for task in registry.tasks(text)]


def test_groups_and_single_tasks() -> None:
    assert named("fruit/all") == ["fruit/apple", "fruit/lemon", "fruit/pear"]
    assert named("fruit/sweet") == ["fruit/pear", "fruit/apple"]  # the suite's order, not the alphabet's
    assert named("fruit/lemon") == ["fruit/lemon"]


def test_mixes_keep_the_order_written() -> None:
    assert named("fruit/lemon+single/only+fruit/sweet") == ["fruit/lemon", "fruit/stone", "fruit/pear", "fruit/apple"]
    assert named(" fruit/lemon + fruit/pear ") == ["fruit/lemon", "fruit/pear"]


def test_copies_belong_to_a_part() -> None:
    found = registry.mix("fruit/lemon + fruit/sweet*3+single * 2")
    assert [task.name for task in found.tasks] == ["fruit/lemon", "fruit/pear", "fruit/apple", "fruit/stone"]
    assert found.copies == (1, 3, 3, 2)
    assert found.parts == ("fruit/lemon", "fruit/sweet", "fruit/sweet", "single")
    assert registry.tasks("fruit/sweet*3") == registry.tasks("fruit/sweet")
    assert registry.mix(f"{HERE}:Fruit/pear*12").copies == (12,)


@pytest.mark.parametrize("part", ["fruit/pear*0", "fruit/pear*", "fruit/pear*-1", "fruit/pear*2.5", "4*fruit/pear"])
def test_copies_that_are_no_number_are_errors(part: str) -> None:
    message = (
        f"{part!r} in suite 'fruit/lemon+{part}': write copies as a whole number from 1 up, as in 'minigrid/mt3*4'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        registry.tasks(f"fruit/lemon+{part}")
    with pytest.raises(ValueError, match="empty part"):
        registry.tasks("*4")


def test_group_may_be_left_out_if_there_is_one() -> None:
    assert named("single") == ["fruit/stone"]
    with pytest.raises(ValueError, match="suite 'fruit' needs a group, as in 'fruit/all'"):
        registry.tasks("fruit")


@pytest.mark.parametrize("attr", ["Fruit", "instance", "factory"])
def test_import_paths(attr: str) -> None:
    """A class, an instance and a function without arguments all name a suite."""
    assert named(f"{HERE}:{attr}/lemon") == ["fruit/lemon"]


def test_task_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'fruit/pear' appears twice in 'fruit/all\+fruit/pear': ask for more copies"):
        registry.tasks("fruit/all+fruit/pear")
    with pytest.raises(ValueError, match="appears twice"):
        registry.tasks(f"fruit/pear+{HERE}:Fruit/pear")


@pytest.mark.parametrize("text", ["", "fruit/pear+", "+fruit/pear", "/pear"])
def test_empty_parts_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="empty part"):
        registry.tasks(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("friut/all", r"unknown suite 'friut'; did you mean 'fruit'\? \(valid: fruit, gone, single\)"),
        ("FRUIT/all", "unknown suite 'FRUIT'; did you mean 'fruit'"),
        ("fruit/swet", r"unknown group 'swet'; did you mean 'sweet'\? \(valid: all, apple, lemon, pear, sweet\)"),
        ("fruit/Lemon", "did you mean 'lemon'"),
        ("zzz/all", r"unknown suite 'zzz' \(valid: fruit, gone, single\) - or name one as \"module:Attr\""),
        (f"{HERE}:Friut/all", f"unknown suite in module '{HERE}' 'Friut'; did you mean 'Fruit'"),
    ],
)
def test_near_misses(text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        registry.tasks(text)


def test_long_lists_are_cut() -> None:
    error = UnknownNameError("task", "t99", [f"t{i:02}" for i in range(20)])
    assert str(error).endswith("t10, t11, ...)")
    assert len(error.choices) == 20


def test_what_cannot_be_imported_is_let_through() -> None:
    with pytest.raises(ModuleNotFoundError, match="mtrl_no_such_module"):
        registry.tasks("gone/all")


def test_unknown_modules_are_told_from_missing_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nowhere:Suite/all", "nowhere.inside:Suite/all"):
        with pytest.raises(UnknownNameError, match=r"unknown module 'nowhere.*' - install its package, or put"):
            registry.tasks(name)
    (tmp_path / "needs_more.py").write_text("import mtrl_no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="mtrl_no_such_dependency"):
        registry.tasks("needs_more:Suite/all")


def test_what_is_no_suite_is_told_what_it_lacks() -> None:
    with pytest.raises(UnknownNameError, match="is not a suite: it lacks groups, tasks; a suite has name, groups and"):
        registry.suite(f"{HERE}:Stump")
    message = r"^'.*:Learner' is an agent, not a suite; check it with mtrl.testing.check_agent\(Learner\)$"
    with pytest.raises(UnknownNameError, match=message):
        registry.suite(f"{HERE}:Learner")
    message = r"Fussy' is not a suite: calling it raised TypeError: .* argument: 'sort'; name a suite, or a class or"
    with pytest.raises(UnknownNameError, match=message):
        registry.suite(f"{HERE}:Fussy")


def test_agents() -> None:
    assert registry.agent("picker") is Learner
    assert registry.agent(f"{HERE}:Learner") is Learner
    assert registry.names(registry.AGENTS) == ["picker"]
    with pytest.raises(UnknownNameError, match=r"unknown agent 'piker'; did you mean 'picker'\?"):
        registry.agent("piker")


@pytest.mark.parametrize(("attr", "lack"), [("Stump", "it lacks Config"), ("factory", "it is no class")])
def test_what_is_no_agent_is_told_what_it_needs(attr: str, lack: str) -> None:
    with pytest.raises(UnknownNameError, match=f"{attr}' is not an agent: {lack}; an agent is a class with Config, a"):
        registry.agent(f"{HERE}:{attr}")


def test_only_agents_are_suggested_for_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"'Laerner'; did you mean 'Learner'\? \(valid: Learner\)$"):
        registry.agent(f"{HERE}:Laerner")
    monkeypatch.delattr(sys.modules[HERE], "Learner")
    with pytest.raises(UnknownNameError, match="'Stum' - an agent is a class with Config"):
        registry.agent(f"{HERE}:Stum")


@pytest.mark.parametrize(
    ("given", "choices", "found"),
    [
        ("mt1O", ["mt10", "mt50"], "mt10"),
        ("Reach-V3", ["reach-v3", "push-v3"], "reach-v3"),
        ("banana", ["mt10", "mt50"], None),
        ("x", [], None),
    ],
)
def test_nearest(given: str, choices: list[str], found: str | None) -> None:
    assert registry.nearest(given, choices) == found


def test_listing_imports_nothing() -> None:
    code = "import sys\nfrom mtrl import registry\nprint(*registry.names(registry.SUITES))\n"
    code += "print(*{name.split('.')[0] for name in sys.modules} & {'mtrl_envs', 'metaworld', 'minigrid'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    suites, modules = done.stdout.split("\n")[:2]
    assert {"metaworld", "minigrid"} <= set(suites.split())
    assert modules == ""
