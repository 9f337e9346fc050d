"""The guides' code runs as it is printed."""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtrl import registry
from mtrl.testing import check_agent, check_suite

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(name: str) -> list[str]:
    """The Python code blocks of a guide, in order."""
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


Module = Callable[[str, str], types.ModuleType]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Imports code as a module, from a file, as worker processes do."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(name: str, code: str) -> types.ModuleType:
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        return importlib.import_module(name)

    yield made
    for name in ("my_agents", "my_suite"):
        sys.modules.pop(name, None)


def test_the_guides_agent_keeps_the_contract(module: Module) -> None:
    whole = module("my_agents", next(code for code in blocks("add-an-agent.md") if "# my_agents.py" in code))
    assert registry.agent("my_agents:Reinforce") is whole.Reinforce
    report = check_agent(whole.Reinforce, options={"rollout": 8}, copies=1)
    assert report.ok, report
    refused = {note.task for note in report.notes if note.what.startswith("refuses")}
    assert refused == {"probe/continuous", "probe/mix"}


def test_the_guides_agent_learns(module: Module, capsys: pytest.CaptureFixture[str]) -> None:
    whole = module("my_agents", next(code for code in blocks("add-an-agent.md") if "# my_agents.py" in code))
    driving = next(code for code in blocks("add-an-agent.md") if "import Probes, drive" in code)
    exec(driving, {"Reinforce": whole.Reinforce})
    assert float(capsys.readouterr().out) > 0.9


def test_the_guides_suite_keeps_the_contract(module: Module) -> None:
    module("my_suite", next(code for code in blocks("add-a-suite.md") if "# my_suite.py" in code))
    report = check_suite(registry.suite("my_suite:Corridors"), "all", full=True)
    assert report.findings == (), report


def test_the_readmes_suite_keeps_the_contract(module: Module) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    module("my_suite", next(block for block in code if "# my_suite.py" in block))
    report = check_suite(registry.suite("my_suite:Classic"), "all")
    assert report.ok, report
    with pytest.raises(registry.UnknownNameError, match="did you mean 'cartpole'"):
        registry.tasks("my_suite:Classic/cartpol")
