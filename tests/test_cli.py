"""The command line: what a user types, and what a mistake says."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from mtrl.cli import _friendly, app
from mtrl.config import parse_config

PROBES = "mtrl.testing:Probes"


def call(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, list(words))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not wrapped, whatever the width of the terminal that runs the tests."""
    monkeypatch.setattr("mtrl.cli.console", Console(width=400))


def test_lists(wide: None) -> None:
    suites = call("list", "suites").output
    assert "minigrid" in suites
    assert "metaworld" in suites
    agents = call("list", "agents").output
    assert all(name in agents for name in ("random", "ppo", "sac", "sb3-ppo", "sb3-sac"))
    tasks = call("list", "tasks", "minigrid/mt3").output
    assert "minigrid/LavaGapS7" in tasks
    assert "196" in tasks
    mix = call("list", "tasks", f"{PROBES}/action*3+minigrid/mt3").output
    assert [line.split()[:2] for line in mix.splitlines()[1:3]] == [["probe/action", "3"], ["minigrid/LavaGapS7", "1"]]


@pytest.mark.parametrize("agent", ["random", "ppo", "sac", "sb3-ppo", "sb3-sac"])
def test_settings_are_those_that_a_config_takes(agent: str, wide: None) -> None:
    """Every field of the agent's part of a whole configuration, with its default there."""

    def flat(part: Any, place: str) -> dict[str, Any]:
        if not isinstance(part, dict):
            return {place: part}
        return {key: value for name in part for key, value in flat(part[name], f"{place}.{name}").items()}

    options = parse_config({"suite": "minigrid/mt3", "agent": agent}).agent
    told, fields = {}, flat({name: value for name, value in options.items() if name != "kind"}, "agent")
    for line in call("list", "settings", agent).output.splitlines()[1:]:
        if line.startswith(" agent."):
            name, default = line.split(maxsplit=1)
            told[name] = default
    assert told.keys() == fields.keys()
    for name, value in fields.items():
        assert told[name].startswith(value if isinstance(value, str) else json.dumps(value)), name


def test_settings_of_a_run_say_what_they_may_be(wide: None) -> None:
    lines = call("list", "settings").output.splitlines()
    (row,) = (line for line in lines if line.startswith(" eval.every "))
    assert row.split()[:6] == ["eval.every", "null", "integer", ">", "0", "|"]
    assert "environment steps between evaluations" in row
    assert any(
        line.startswith(" init.parts ") and "[perception | trunk | memory | heads, ...]" in line for line in lines
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--suite", "minigird/mt3"), "unknown suite 'minigird'; did you mean 'minigrid'?"),
        (("train", "--suite", "minigrid/mt33"), "did you mean 'mt3'?"),
        (("train", "--suite", "minigrid/mt3", "--agent", "pppo"), "unknown agent 'pppo'; did you mean 'ppo'?"),
        (("train", "--suite", "minigrid/mt3", "agent.gama=1"), "agent.gama: unknown key; did you mean 'gamma'?"),
        (("train", "--suite", "minigrid/mt3", "--steps", "1e-3"), "'1e-3' is no whole number"),
        (("train", "--suite", "minigrid/mt3", "--steps", "many"), "'many' is no whole number"),
        (("train", "--suite", "minigrid/mt3", "--steps", "inf"), "'inf' is no whole number"),
        (("train", "nowhere.yaml"), "no config file 'nowhere.yaml'"),
        (("train", "a.yaml", "b.yaml"), "one config file at most"),
        (("train", "--resume", "nowhere"), "nowhere holds no run"),
        (("train", "--resume", "x", "--seed", "1"), "only --steps may be given with it"),
        (("evaluate", "nowhere"), "nowhere holds no run"),
        (("watch",), "name the folder of a run, or tasks for an untrained agent with --suite"),
        (("watch", "nowhere"), "nowhere holds no run"),
        (("watch", "--suite", "minigrid/mt33"), "did you mean 'mt3'?"),
        (("watch", "--suite", "minigrid/mt3", "--agent", "rndom"), "did you mean 'random'?"),
        (("watch", "--suite", "minigrid/mt3", "--tasks", "LavaGap"), "did you mean 'minigrid/LavaGapS7'?"),
        (("watch", "--suite", "minigrid/mt3", "--pick", "wurst"), "did you mean 'worst'?"),
        (("watch", "--suite", "minigrid/mt3", "--out", "x.mp3"), "unknown kind of video '.mp3'; did you mean '.mp4'?"),
        (("watch", "--suite", "minigrid/mt3", "--training", "best"), "--training shows what a run has recorded"),
        (("watch", "nowhere", "--training", "best", "--seed", "1"), "--training shows what a run has recorded"),
        (("watch", "--suite", f"{PROBES}/discrete", "--out", "x.mp4"), "cannot render: its build takes no render_mode"),
        (
            ("train", "--suite", f"{PROBES}/continuous", "--agent", "sac", f"agent.capacity={10**13}"),
            "lower the capacity",
        ),
        (("train", "--suite", "tests.vector.probes:Probes/lambda", "workers=1"), "cannot be sent to worker processes"),
        (("train", "--suite", "minigrid/mt3*0"), "'minigrid/mt3*0': write copies as a whole number from 1 up"),
        (("train", "--suite", "minigrid/mt3*2", "slots=4", "sampler.kind=uniform"), "slots and '*2' in suite"),
        (("check", "minigrid/mt3*no"), "write copies as a whole number"),
        (("list", "task"), "did you mean 'tasks'?"),
        (("list", "tasks"), "as in: mtrl list tasks minigrid/mt3"),
        (("list", "settings", "pppo"), "did you mean 'ppo'?"),
        (("list", "tasks", "minigrid/DorKey-6x6"), "did you mean 'DoorKey-6x6'?"),
        (("check", "minigird/mt3"), "did you mean 'minigrid'?"),
    ],
)
def test_mistakes_are_one_clear_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    extra = ("--out", str(tmp_path / "run")) if words[0] == "train" and "--resume" not in words else ()
    result = call(*words, *extra)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_versions_are_told() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert {"mtrl", "torch", "gymnasium", "python"} <= {line.split()[0] for line in result.stdout.splitlines()}


@pytest.mark.parametrize(
    ("cpu", "route", "told"), [("AVX2", "bf16", True), ("AVX2", "auto", False), ("AVX512", "bf16", False)]
)
def test_a_slow_route_is_told(
    cpu: str, route: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: cpu)
    words = ("--steps", "64", "workers=0", "copies=1", "agent.rollout=8", "log.wandb=off", f"agent.matmul={route}")
    result = call("train", "--suite", f"{PROBES}/discrete", "--agent", "ppo", *words, "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert ("agent.matmul=bf16: this CPU has no bf16" in result.output) == told


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "c.yaml").write_text(f"suite: {PROBES}/discrete\nagent: random\nsteps: 60\neval: {{episodes: 1}}\n")
    result = call("train", str(folder / "c.yaml"), "seed=3", "--out", str(folder / "run"))
    assert result.exit_code == 0, result.output
    assert "seed: 3" in (folder / "run" / "config.yaml").read_text()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "run")
    trained = call("train", "--suite", f"{PROBES}/discrete", "--steps", "20", "workers=0", "--out", out)
    assert (trained.exit_code, "Traceback" in trained.output) == (2, False)
    assert f"cannot make the run folder {out}: Not a directory" in trained.stderr
    run = tmp_path / "run"
    call("train", "--suite", f"{PROBES}/discrete", "--steps", "2e1", "workers=0", "log.wandb=off", "--out", str(run))
    copied = call("export", str(run), out)
    assert (copied.exit_code, "Traceback" in copied.output) == (2, False)
    assert "Not a directory" in copied.stderr


def test_no_folder_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ("train", "--suite", f"{PROBES}/discrete", "log.tensorboard=true", "--out", str(tmp_path / "run"))
    result = call(*words)
    assert result.exit_code == 2
    assert "pip install 'mtrl-suite[track]'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_train_evaluate_export(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["workers=0", "threads=1", "log.wandb=off", "eval.episodes=4", "agent.rollout=16"]
    trained = call("train", "--suite", f"{PROBES}/discrete", "--steps", "300", "--out", str(out), *options)
    assert trained.exit_code == 0, trained.output
    assert "probe/constant" in trained.output
    assert "mean over tasks" in trained.output
    again = call("train", "--suite", f"{PROBES}/discrete", "--out", str(out))
    assert again.exit_code == 2
    assert "already holds a run: resume it" in again.stderr

    found = json.loads(call("evaluate", str(out), "--episodes", "6", "--json").stdout)
    assert found["actions"] == "greedy"
    assert found["metrics"]["eval/probe/constant/return"] == 1.0
    assert len(found["tasks"]["probe/action"]["episodes"]) == 6
    shown = call("evaluate", str(out), "--episodes", "2", "--sampled")
    assert "probe/endless" in shown.output

    assert call("export", str(out), str(tmp_path / "policy")).exit_code == 0
    exported = json.loads(call("evaluate", str(tmp_path / "policy"), "--episodes", "6", "--json").stdout)
    assert exported == found


def test_watch(tmp_path: Path) -> None:
    options = ["workers=0", "threads=1", "log.wandb=off", "eval.episodes=2"]
    suite, out = "minigrid/Empty-5x5", tmp_path / "run"
    assert call("train", "--suite", suite, "--steps", "1500", "--out", str(out), *options).exit_code == 0
    for words, name in (
        ((), "all.mp4"),
        (("--pick", "worst", "--sampled", "--step", "1500"), "worst-sampled.mp4"),
        (("--training", "best"), "training-best.mp4"),
        (("--episodes", "2", "--out", str(tmp_path / "own.gif"), "--height", "48"), "../../own.gif"),
    ):
        shown = call("watch", str(out), *words)
        assert shown.exit_code == 0, shown.output
        assert shown.output.count(suite) == (2 if "--episodes" in words else 1)
        assert (out / "watch" / name).stat().st_size > 1000


def test_check_passes_on_good_tasks_and_fails_on_bad_ones() -> None:
    good = call("check", f"{PROBES}/discrete")
    assert good.exit_code == 0, good.output
    assert "probe/constant" in good.output


def test_check_takes_the_parts_of_a_mix() -> None:
    both = call("check", f"{PROBES}/action*4+{PROBES}/constant")
    assert both.exit_code == 0, both.output
    assert "group action" in both.output
    assert "group constant" in both.output


def test_doctor_reports() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    assert all(word in result.output.lower() for word in ("python", "torch", "wandb", "cores"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "cannot use /x: Read-only file system"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "cannot use /x: Is a directory"),
        (OSError(errno.ECHILD, "No child processes"), None),
    ],
)
def test_what_a_disk_refuses_is_one_line(error: OSError, told: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError if told is None else typer.Exit), _friendly():
        raise error
    assert (told or "") in capsys.readouterr().err
