"""Is this machine ready? What is installed, what can render, how fast it may be, and what to do about the rest.

Nothing heavy is imported here: whatever may crash, hang or take long is asked in a subprocess with a time limit.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from mtrl.machine import usable_cores

GL_BACKENDS = ("egl", "osmesa", "glfw") if sys.platform == "linux" else ("glfw",)
"""What ``MUJOCO_GL`` may be on this platform, best first: EGL renders without a display and uses a GPU if it can."""

_PACKAGES = ("mtrl-suite", "metaworld", "minigrid", "stable-baselines3", "gymnasium", "torch", "wandb")
_TIMEOUT = 60.0  # seconds for one probe; imports alone take several on a busy machine
_MIN_DISK = 2 * 2**30  # bytes that checkpoints with replay buffers easily take

_GL_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='1' rgba='1 1 1 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().max() > 0, "the picture is black"
"""
_TORCH_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
cpu = torch.backends.cpu.get_cpu_capability()
print(json.dumps([cpu, torch.backends.mkldnn.is_available(), gpus]))
"""
_WANDB_PROBE = "from mtrl.sinks import wandb_mode; print(wandb_mode())"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``level`` is ``ok``, ``note`` (nobody needs to act), ``warning`` or ``error``."""

    topic: str
    level: str
    text: str
    fix: str = ""


def diagnose(folder: Path | None = None) -> list[Finding]:
    """Look at everything; takes a few seconds.

    Args:
        folder: where runs will be written; the current one if left out.
    """
    codes = [_TORCH_PROBE, _WANDB_PROBE, *[_GL_PROBE] * len(GL_BACKENDS)]
    variables = [{}, {}, *[{"MUJOCO_GL": name} for name in GL_BACKENDS]]
    with ThreadPoolExecutor(len(codes)) as pool:
        answers = pool.map(_probe, codes, variables)
        findings = [_python(), *_packages(), *_machine(folder or Path.cwd())]
        torch, wandb, *gl = answers
    return [*findings, *_torch(torch), *_gl(dict(zip(GL_BACKENDS, gl, strict=True))), _wandb(wandb)]


def report(findings: Sequence[Finding] | None = None) -> str:
    """The findings as text, one line each and one more for what to do."""
    found = diagnose() if findings is None else findings
    width = max(len(finding.topic) for finding in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.level:<8} {finding.topic:<{width}}  {finding.text}")
        if finding.fix:
            lines.append(f"{'':8} {'':{width}}  -> {finding.fix}")
    bad = sum(finding.level in ("warning", "error") for finding in found)
    return "\n".join([*lines, "", "all is well" if not bad else f"{bad} of {len(found)} need a look"])


def choose_gl() -> str | None:
    """The backend to put into ``MUJOCO_GL`` before mujoco is imported: the user's own, or the first that renders.

    None if no backend renders. Takes about a second for each that is tried.
    """
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    return next((name for name in GL_BACKENDS if renders(name)), None)


def renders(backend: str) -> bool:
    """Whether MuJoCo can draw with ``backend`` on this machine; tried in a process of its own."""
    return _probe(_GL_PROBE, {"MUJOCO_GL": backend})[0]


def _probe(code: str, env: Mapping[str, str]) -> tuple[bool, str]:
    """Whether Python code runs in a process of its own, and what it prints, or the first error if it does not."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {_TIMEOUT:.0f} s"
    if done.returncode == 0:
        return True, done.stdout.strip()
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0] and not line.startswith(" ")]
    return False, (errors[:1] or lines[-1:] or [f"exit code {done.returncode}"])[0]


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.platform()} ({sys.executable})")


def _packages() -> list[Finding]:
    installed = {name: version(name) for name in _PACKAGES if _installed(name)}
    found = [Finding("packages", "ok", ", ".join(f"{name} {number}" for name, number in installed.items()))]
    for name in installed:
        for text in requires(name) or ():
            need = Requirement(text)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            has = version(need.name) if _installed(need.name) else None
            if has is None or not need.specifier.contains(has, prereleases=True):
                state = "is missing" if has is None else f"{has} is installed"
                fix = f"pip install '{need.name}{need.specifier}'"
                found.append(Finding("packages", "error", f"{name} needs {need.name}{need.specifier}: {state}", fix))
    games = sorted({str(one.metadata["Name"]) for one in distributions()} & {"pygame", "pygame-ce"})
    if len(games) == 2:
        text = "pygame and pygame-ce overwrite each other's files"
        fix = "pip uninstall pygame pygame-ce && pip install pygame-ce"
        found.append(Finding("packages", "warning", text, fix))
    return found


def _machine(folder: Path) -> list[Finding]:
    memory = psutil.virtual_memory()
    free = shutil.disk_usage(folder).free
    low = free < _MIN_DISK
    return [
        Finding("cores", "ok", f"{usable_cores()} usable, {psutil.cpu_count(logical=False) or '?'} physical"),
        Finding("memory", "ok", f"{_gib(memory.available)} of {_gib(memory.total)} available"),
        Finding(
            "disk",
            "warning" if low else "ok",
            f"{_gib(free)} free in {folder}",
            "free some space or choose another --out: checkpoints of replay buffers are large" if low else "",
        ),
    ]


def _torch(result: tuple[bool, str]) -> list[Finding]:
    worked, text = result
    if not worked:
        return [Finding("torch", "error", text, "pip install torch")]
    capability, onednn, gpus = json.loads(text.splitlines()[-1])
    return [
        Finding("torch", "ok", capability + (", oneDNN" if onednn else "")),
        Finding("gpu", "ok", ", ".join(gpus) or "none: device=auto means cpu"),
    ]


def _gl(results: Mapping[str, tuple[bool, str]]) -> list[Finding]:
    works = [name for name, (worked, _) in results.items() if worked]
    found = []
    for name, (worked, text) in results.items():
        level = "ok" if worked else "note" if works else "error"  # one that works is enough
        found.append(Finding(f"gl {name}", level, "renders" if worked else f"cannot render: {text}"))
    chosen = os.environ.get("MUJOCO_GL")
    if not works:
        fix = "apt-get install libegl1 libgl1-mesa-dri (or libosmesa6); only videos of MuJoCo tasks need it"
        found.append(Finding("MUJOCO_GL", "error", "no backend renders", fix))
    elif chosen and chosen not in works:
        found.append(
            Finding("MUJOCO_GL", "error", f"is {chosen!r}, which cannot render", f"export MUJOCO_GL={works[0]}")
        )
    else:
        text = (
            f"is {chosen!r}"
            if chosen
            else f"is not set; `mtrl watch` and `mtrl evaluate --video` set {works[0]!r} by themselves"
        )
        fix = "" if chosen else f"export MUJOCO_GL={works[0]} before rendering in your own scripts"
        found.append(Finding("MUJOCO_GL", "ok", text, fix))
    return found


def _wandb(result: tuple[bool, str]) -> Finding:
    worked, text = result
    if not worked:
        return Finding("wandb", "warning", f"does not start: {text}", "pip install wandb, or log.wandb=off")
    mode = text.splitlines()[-1]
    fix = "wandb login, if runs shall appear online" if mode == "offline" else ""
    return Finding("wandb", "ok", f"{mode}", fix)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
