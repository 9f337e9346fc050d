"""Optional packages: found, or missed in one line."""

from __future__ import annotations

import json.decoder
import sys
from pathlib import Path

import pytest

from mtrl_envs.extras import needs


def test_the_named_module_is_returned() -> None:
    assert needs("json.decoder", "some", "thing") is json.decoder


@pytest.mark.parametrize("module", ["absent_package", "absent_package.part"])
def test_a_missing_package_is_named_with_the_command(module: str) -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        needs(module, "some", "thing", "licence: other")
    assert str(caught.value) == (
        "the suite 'thing' needs absent_package (licence: other): pip install 'mtrl-suite[some]'"
    )
    assert caught.value.name == "absent_package"
    with pytest.raises(ModuleNotFoundError, match=r"needs absent_package: pip"):
        needs(module, "some", "thing")


def test_what_a_package_misses_itself_is_passed_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent_dependency'"):
        needs("half_installed", "some", "thing")
    assert "half_installed" not in sys.modules
