"""Packages that only some suites need: found when they are used, and missed with the command that installs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mtrl.registry import MissingPackageError


def needs(module: str, extra: str, suite: str, note: str = "") -> Any:
    """Import and return a module of an optional package.

    Args:
        module: its full name, such as ``"ale_py.roms"``.
        extra: the extra of this distribution that installs its package.
        suite: the suite that needs it, for the message.
        note: what one should know before installing it, such as a licence that differs.

    Raises:
        MissingPackageError: the package is not installed; one line says how to install it. A package that is there but
            misses one of its own is passed through, since that error names what.
    """
    package = module.partition(".")[0]
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        what = f"the suite {suite!r} needs {package}{f' ({note})' if note else ''}: pip install 'mtrl-suite[{extra}]'"
        raise MissingPackageError(what, name=package) from error
    return import_module(module)
