"""The doctor: what it finds is true, and what it asks in subprocesses stays out of this process."""

import os
import subprocess
import sys

import pytest

from mtrl import doctor
from mtrl.doctor import Finding, choose_gl, report

_RUN = """
import sys, time
from mtrl import doctor
print(doctor.report())
heavy = [name for name in ("torch", "mujoco", "wandb", "numpy", "gymnasium") if name in sys.modules]
assert not heavy, heavy
"""


def test_the_whole_report_in_a_clean_process():
    done = subprocess.run([sys.executable, "-W", "error", "-c", _RUN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    topics = {
        line.split()[1] for line in done.stdout.splitlines() if line.startswith(("ok", "note", "warning", "error"))
    }
    assert topics >= {"python", "packages", "cores", "memory", "disk", "torch", "gpu", "gl", "MUJOCO_GL", "wandb"}
    assert sys.version.split()[0] in done.stdout


@pytest.fixture
def rendering(monkeypatch):
    """Pretends that only some backends render; returns a function that says which."""

    def pretend(*works):
        tried = []

        def probe(code, env):
            tried.append(env["MUJOCO_GL"])
            return (True, "") if env["MUJOCO_GL"] in works else (False, "ImportError: no library")

        monkeypatch.setattr(doctor, "_probe", probe)
        monkeypatch.setattr(doctor, "GL_BACKENDS", ("egl", "osmesa", "glfw"))
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        return tried

    return pretend


def test_choose_gl_takes_the_first_that_renders(rendering):
    tried = rendering("osmesa", "glfw")
    assert choose_gl() == "osmesa"
    assert tried == ["egl", "osmesa"]
    rendering()
    assert choose_gl() is None


def test_choose_gl_respects_the_user(rendering, monkeypatch):
    tried = rendering("egl")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert choose_gl() == "osmesa"
    assert tried == []


def results(*works):
    return {name: (name in works, "" if name in works else "no library") for name in ("egl", "osmesa", "glfw")}


@pytest.mark.parametrize(
    ("works", "chosen", "levels", "fix"),
    [
        (("egl",), None, ["ok", "note", "note", "ok"], "export MUJOCO_GL=egl"),
        (("osmesa", "glfw"), "osmesa", ["note", "ok", "ok", "ok"], ""),
        (("egl",), "glfw", ["ok", "note", "note", "error"], "export MUJOCO_GL=egl"),
        ((), None, ["error"] * 4, "libegl1"),
    ],
)
def test_what_to_do_about_rendering(works, chosen, levels, fix, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if chosen:
        monkeypatch.setenv("MUJOCO_GL", chosen)
    found = doctor._gl(results(*works))
    assert [finding.level for finding in found] == levels
    assert fix in found[-1].fix


def test_a_probe_that_fails_hangs_or_dies(monkeypatch):
    assert doctor._probe("print('hello')", {}) == (True, "hello")
    assert doctor._probe("import os; print(os.environ['MUJOCO_GL'])", {"MUJOCO_GL": "x"}) == (True, "x")
    assert "MUJOCO_GL" not in os.environ or os.environ["MUJOCO_GL"] != "x"
    assert doctor._probe("raise ValueError('no way')", {}) == (False, "ValueError: no way")
    worked, text = doctor._probe("import os; os._exit(3)", {})
    assert (worked, text) == (False, "exit code 3")
    monkeypatch.setattr(doctor, "_TIMEOUT", 0.5)
    assert doctor._probe("import time; time.sleep(60)", {}) == (False, "no answer in 0 s")


def test_a_pin_that_is_not_kept(monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "3.17.0" if name == "mujoco" else real(name))
    bad = [finding for finding in doctor._packages() if finding.level == "error"]
    assert [(f.text, f.fix) for f in bad] == [
        ("metaworld needs mujoco==3.3.0: 3.17.0 is installed", "pip install 'mujoco==3.3.0'")
    ]


def test_a_missing_package(monkeypatch):
    real = doctor.version

    def version(name):
        if name == "safetensors":
            raise doctor.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", version)
    bad = [finding for finding in doctor._packages() if finding.level == "error"]
    assert [finding.text for finding in bad] == ["mtrl-suite needs safetensors>=0.5: is missing"]


def test_report_says_what_to_do():
    text = report(
        [Finding("a", "ok", "fine"), Finding("longer", "error", "broken", "mend it"), Finding("b", "note", "-")]
    )
    assert text.splitlines() == [
        "ok       a       fine",
        "error    longer  broken",
        "                 -> mend it",
        "note     b       -",
        "",
        "1 of 3 need a look",
    ]
    assert report([Finding("a", "ok", "fine")]).endswith("all is well")
