"""The example package, installed as a stranger would: its suite is found by entry point, keeps the contract, trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "mtrl-classic"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example is installed, without reaching for the network."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(target), str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(code: str, installed: Path, *arguments: str) -> str:
    """Run Python code in a fresh process that sees the installed example; returns what it prints."""
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_entry_point_is_found_and_nothing_imported(installed: Path) -> None:
    code = """
import sys
from mtrl import registry
print("classic" in registry.names(registry.SUITES), "mtrl_classic" in sys.modules)
print([task.name for task in registry.tasks("classic/all")])
print([task.name for task in registry.tasks("mtrl_classic:Classic/acrobot")])
try:
    registry.tasks("clasic/all")
except registry.UnknownNameError as error:
    print("did you mean 'classic'?" in str(error))
"""
    printed = run(code, installed).splitlines()
    assert printed == ["True False", "['classic/cartpole', 'classic/acrobot']", "['classic/acrobot']", "True"]


def test_suite_keeps_the_contract(installed: Path) -> None:
    code = """
from mtrl import registry
from mtrl.testing import check_suite
report = check_suite(registry.suite("classic"), "all", full=True)
assert report.ok and not report.notes, report
"""
    run(code, installed)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ppo_trains_on_it(installed: Path, tmp_path: Path, workers: str) -> None:
    """Through the public entry point, in this process and in workers, which must find the package too."""
    code = """
import json, sys
from pathlib import Path
from mtrl.config import load_config
from mtrl.train import train
out, workers = Path(sys.argv[1]), sys.argv[2]
options = ["agent.rollout=32", "agent.epochs=2", "agent.minibatches=2", "eval.episodes=1", "log.wandb=off",
           "log.terminal=false", f"workers={workers}", "threads=1", "log.every=64"]
summary = train(load_config(None, options, suite="classic/all", agent="ppo", steps=256), out)
assert summary.steps == 256 and summary.signal is None
assert {result.task.name for result in summary.evaluation.results} == {"classic/cartpole", "classic/acrobot"}
records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
print(max(record.get("charts/updates", 0) for record in records))
"""
    assert float(run(code, installed, str(tmp_path / "run"), workers)) == 256 / 2 // 32 - 1  # one step behind the data


def test_readme_shows_the_module() -> None:
    """The code in the README is the module's, so it cannot rot."""
    module = (EXAMPLE / "mtrl_classic" / "__init__.py").read_text()
    assert module[module.index("from functools") :] in (EXAMPLE / "README.md").read_text()
