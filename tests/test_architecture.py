"""The rules of the house that a machine can check: import arrows, light imports, lengths, no pickle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "mtrl").rglob("*.py"))
SUITES = sorted((ROOT / "envs" / "mtrl_envs").rglob("*.py"))
AGENTS = sorted((ROOT / "agents" / "mtrl_agents").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# A module imports its own layer and those before it. A name stands for a module or a whole package.
LAYERS = (
    ("types", "files", "machine", "signals"),
    ("opengl", "spaces", "registry", "frames"),
    ("vector", "nn", "rollout", "replay", "levels"),
    ("sampler",),
    ("highlights", "video"),
    ("checkpoint", "config", "doctor", "evaluate", "log", "monitor", "runs", "sinks", "terminal", "testing"),
    ("watch", "tables", "transfer"),
    ("train",),
    ("benchmark",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PLUGIN_LEVEL = LEVEL["vector"]  # what suites and agents may import of the core
ENVIRONMENTS = {
    *("metaworld", "minigrid", "mujoco", "numba", "pettingzoo", "ale_py", "dm_control", "gymnasium_robotics"),
    *("textworld", "jericho", "lbforaging", "rware"),
}


def ident(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of modules imported anywhere in a file, also inside functions, but not for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {package}: write the full name"
            module = str(node.module)
            # "from mtrl import registry" imports the module mtrl.registry
            yield from ((f"mtrl.{alias.name}" for alias in node.names) if module == "mtrl" else (module,))
        yield from imported(node, package)


def imports_of(path: Path) -> list[str]:
    return list(imported(ast.parse(path.read_text()), ident(path)))


def layer(module: str) -> int:
    """Layer of a module of the core, named in full."""
    name = module.split(".")[1]
    assert name in LEVEL, f"mtrl.{name} is in no layer: give it a place in LAYERS"
    return LEVEL[name]


def wrong_arrows(name: str, modules: list[str]) -> list[str]:
    """Imports that the module called ``name`` must not have."""
    home = name.split(".")[0]
    wrong = []
    for module in modules:
        top = module.split(".")[0]
        if home == "mtrl":
            if top in ("mtrl_envs", "mtrl_agents", *ENVIRONMENTS) and name != "mtrl.testing.team":
                wrong.append(f"{name} imports {module}: the core knows no environment and no agent")
            elif top == "mtrl" and name != "mtrl" and module != "mtrl" and layer(module) > layer(name):
                wrong.append(f"{name} imports {module}, which is above it")
        elif top in ("mtrl_envs", "mtrl_agents") and top != home:
            wrong.append(f"{name} imports {module}: suites and agents do not know each other")
        elif top == "mtrl" and module != "mtrl" and layer(module) > PLUGIN_LEVEL:
            wrong.append(f"{name} imports {module}: a plug-in uses the contract and the tools, not the programs")
    return wrong


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] in ("envs", "agents") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", [*CORE, *SUITES, *AGENTS], ids=ident)
def test_import_arrows(path: Path) -> None:
    assert wrong_arrows(module_name(path), imports_of(path)) == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("mtrl.train", "mtrl_envs.minigrid"),
        ("mtrl.spaces", "minigrid"),
        ("mtrl.vector.env", "mtrl.train"),
        ("mtrl.nn.trunk", "mtrl.cli"),
        ("mtrl.types", "mtrl.spaces"),
        ("mtrl_envs.minigrid", "mtrl_agents.ppo"),
        ("mtrl_agents.ppo", "mtrl_envs.minigrid"),
        ("mtrl_agents.ppo", "mtrl.train"),
    ],
)
def test_wrong_arrows_are_noticed(name: str, module: str) -> None:
    assert len(wrong_arrows(name, ["numpy", module])) == 1


def test_imports_are_seen_wherever_they_are() -> None:
    code = """
from typing import TYPE_CHECKING
from mtrl import registry
if TYPE_CHECKING:
    import hidden
def f():
    import mtrl.cli
"""
    assert list(imported(ast.parse(code), "here")) == ["typing", "mtrl.registry", "mtrl.cli"]


@pytest.mark.parametrize(
    "module", ["mtrl", "mtrl.types", "mtrl.registry", "mtrl.vector", "mtrl.vector.views", "mtrl.testing", "mtrl_envs"]
)
def test_imports_stay_light(module: str) -> None:
    """Processes that step environments import these: every megabyte counts once per worker."""
    heavy = {"torch", "wandb", "ray", "matplotlib", "pandas", "stable_baselines3", "tensorboard", *ENVIRONMENTS}
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numpy" in done.stdout or module == "mtrl"
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize("path", [*CORE, *SUITES, *AGENTS], ids=ident)
def test_nothing_is_unpickled(path: Path) -> None:
    """Except in the pipe between a process and the workers that it started itself."""
    pickles = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"} & set(imports_of(path))
    assert not pickles or module_name(path) == "mtrl.vector.workers"
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not {"torch.load", "torch.save", "np.load", "numpy.load"} & calls


@pytest.mark.parametrize("path", [*CORE, *SUITES, *AGENTS], ids=ident)
def test_import_leaves_the_process_environment_alone(path: Path) -> None:
    """No environment variable is read or set outside functions."""
    at_import = [
        node
        for statement in ast.parse(path.read_text()).body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "putenv", "getenv")
    ]
    assert at_import == []


def test_inheritance_is_shallow() -> None:
    """A class of ours may extend one of ours that itself extends none of ours."""
    bases: dict[str, list[str]] = {}
    for path in [*CORE, *SUITES, *AGENTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
    ours = {name: [base for base in found if base in bases and base != name] for name, found in bases.items()}
    deep = [name for name, found in ours.items() if any(ours[base] for base in found)]
    assert deep == []


@pytest.mark.parametrize("path", AGENTS, ids=ident)
def test_an_agent_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


def test_the_loop_is_short() -> None:
    tree = ast.parse((ROOT / "mtrl" / "train.py").read_text())
    (loop,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 < 100


def test_configs_are_short() -> None:
    assert CONFIGS
    assert [ident(path) for path in CONFIGS if len(path.read_text().splitlines()) > 25] == []


def test_public_names_are_not_shadowed_by_modules() -> None:
    code = (
        "import types, mtrl, mtrl.cli, mtrl.evaluate, mtrl.runs, mtrl.train, mtrl.testing\n"
        "assert not [n for n in mtrl.__all__ if isinstance(getattr(mtrl, n), types.ModuleType)]\n"
        "assert mtrl.__all__ == sorted(mtrl.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
