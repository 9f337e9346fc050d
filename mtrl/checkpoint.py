"""Checkpoints that survive kill -9 and never run code: safetensors for numbers, JSON for the rest, hashes for both.

::

    checkpoints/step-4000/manifest.json         format, step, meta, size and sha256 of every file
    checkpoints/step-4000/state.json            the tree of the state, with references to tensors and arrays
    checkpoints/step-4000/tensors.safetensors   every torch tensor
    checkpoints/step-4000/arrays.safetensors    every numpy array
    checkpoints/latest.json                     names the newest one, for people and tools

A checkpoint is written to ``step-N.tmp`` and renamed when all of it is on the disk, so a folder ``step-N`` is complete
whenever the process or the machine dies. Loading trusts no folder: it verifies sizes and hashes and goes to the next
older one if they do not match. Nothing is ever pickled or unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

FORMAT = 1
LATEST, MANIFEST, STATE, TENSORS, ARRAYS = (
    "latest.json",
    "manifest.json",
    "state.json",
    "tensors.safetensors",
    "arrays.safetensors",
)
PACKAGES = (
    "torch",
    "numpy",
    "gymnasium",
    "metaworld",
    "mujoco",
    "minigrid",
    "pettingzoo",
    "stable-baselines3",
    "safetensors",
    "wandb",
)
_TAG = "$"  # marks a JSON object that stands for something else than a dict with string keys
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another format; the message names the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """What ``load`` returns. Tensors are on the CPU, whatever device they were on when saved."""

    step: int
    state: dict[str, Any]
    meta: dict[str, Any]
    path: Path


def save(folder: Path, step: int, state: Mapping[str, Any], meta: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write ``folder/step-{step}`` atomically and remove all but the newest ``keep`` checkpoints.

    Checkpoints of later steps are removed too: they were left behind when the run resumed from an earlier one.

    Args:
        folder: holds all checkpoints of a run; made if missing.
        step: the environment step.
        state: a tree of dicts (keys: str, int, float, bool, None), lists and tuples. Its leaves are torch tensors and
            numpy arrays of any numeric dtype, numpy scalars, str, int of any size, float, bool and None. All come back
            with their type, tensors and arrays with the order of their axes in memory but without aliases: tied
            parameters are stored twice.
        meta: plain JSON data to store in the manifest (config, versions, ...).
        keep: how many checkpoints stay, at least 1.

    Returns:
        The new checkpoint's folder.

    Raises:
        TypeError: something else is in ``state``; the message names its place in the tree.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: a run keeps at least 1 checkpoint")
    encode = _Encoder()
    tree = encode(state, "")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("step-*.tmp"):  # of a process that was killed while saving
        shutil.rmtree(left)
    final = folder / f"step-{step}"
    part = folder / f"step-{step}.tmp"
    part.mkdir()
    _write_json(part / STATE, tree)
    safetensors.torch.save_file(encode.tensors, part / TENSORS)
    safetensors.numpy.save_file(encode.arrays, part / ARRAYS)
    for name in (TENSORS, ARRAYS):  # safetensors makes files that only their owner may read
        shutil.copymode(part / STATE, part / name)
    files = {name: _fingerprint(part / name) for name in (STATE, TENSORS, ARRAYS)}
    manifest = {"format": FORMAT, "step": step, "meta": meta, "files": files}
    _write_json(part / MANIFEST, {**manifest, "sha256": _digest(manifest)}, indent=1)
    for name in (STATE, TENSORS, ARRAYS, MANIFEST):
        _sync(part / name)
    _sync(part)
    if final.exists():  # a folder cannot be renamed onto another one
        final.rename(folder / f"step-{step}.old.tmp")
    part.rename(final)
    _sync(folder)
    _write_json(folder / (LATEST + ".tmp"), {"step": step, "folder": final.name})
    _sync(folder / (LATEST + ".tmp"))
    (folder / (LATEST + ".tmp")).replace(folder / LATEST)
    _sync(folder)
    older = [path for number, path in sorted(saved_in(folder).items(), reverse=True) if number <= step]
    for path in set(saved_in(folder).values()) - set(older[:keep]) | set(folder.glob("step-*.tmp")):
        shutil.rmtree(path)
    return final


def load(folder: Path, step: int | None = None) -> Checkpoint:
    """The newest intact checkpoint in ``folder``, or the one of ``step``.

    A damaged checkpoint is reported through ``logging`` (stderr by default) and the next older one is used. There is no
    such retreat when ``step`` is given.

    Raises:
        CheckpointError: there is none, or none is intact.
    """
    found = saved_in(folder)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}")
    if step is not None:
        if step not in found:
            raise CheckpointError(f"no checkpoint of step {step} in {folder} (there are {sorted(found)})")
        return _read(found[step])
    reasons: list[str] = []
    for _, path in sorted(found.items(), reverse=True):
        try:
            checkpoint = _read(path)
        except CheckpointError as error:
            reasons.append(str(error))
            _log.warning("%s; trying the previous checkpoint", error)
        else:
            return checkpoint
    raise CheckpointError(f"no intact checkpoint in {folder}: " + "; ".join(reasons))


@functools.cache
def versions() -> dict[str, str]:
    """``read_versions`` of when it was first called: a process runs the code that it began with."""
    return read_versions()


def read_versions() -> dict[str, str]:
    """Versions that a result depends on: python, platform, mtrl (with its git revision, if any) and packages."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name, package in (("mtrl", "mtrl-suite"), *((name, name) for name in PACKAGES)):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # a slow disk must not end a training
            result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            if result.returncode == 0:
                found["git"] = result.stdout.strip()
    return found


def saved_in(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint in ``folder``, intact or not; what else lies there, such as copies, is not."""
    return {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}


def _read(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']}, this version of mtrl reads {FORMAT}")
        if manifest.pop("sha256") != _digest(manifest):
            raise CheckpointError(f"{path / MANIFEST} is damaged: it does not match its own hash")
        for name in (STATE, TENSORS, ARRAYS):
            expected, actual = manifest["files"][name], _fingerprint(path / name)
            if actual != expected:
                raise CheckpointError(f"{path / name} is damaged: {actual} instead of {expected}")
        tensors = safetensors.torch.load_file(path / TENSORS)
        arrays = safetensors.numpy.load_file(path / ARRAYS)
        state = _decode(json.loads((path / STATE).read_text(encoding="utf-8")), tensors, arrays)
        return Checkpoint(manifest["step"], state, manifest["meta"], path)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


class _Encoder:
    """Turns a tree into JSON data; tensors and arrays go to the side, under their place in the tree."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self._storages: set[int] = set()

    def __call__(self, value: Any, place: str) -> Any:
        # Types are compared exactly: a subclass (an IntEnum, a namedtuple) would come back as its base.
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, place)
        if kind in (np.ndarray, np.memmap):
            if not _plain(value.dtype):
                raise TypeError(f"{place}: cannot store an array of dtype {value.dtype}")
            order = _order(value.strides)
            array = value.transpose(order)
            if not array.flags.c_contiguous:
                order, array = list(range(value.ndim)), value.copy(order="C")
            return {_TAG: "array", "name": _put(self.arrays, place, array), "order": order}
        if kind is list or kind is tuple:
            items = [self(item, f"{place}.{i}") for i, item in enumerate(value)]
            return items if kind is list else {_TAG: "tuple", "items": items}
        if isinstance(value, np.generic) and _plain(value.dtype):
            return {_TAG: "scalar", "dtype": value.dtype.name, "value": self(value.item(), place)}
        if isinstance(value, Mapping):
            for key in value:
                if key is not None and type(key) not in (str, int, float, bool):
                    raise TypeError(f"{place}: cannot store the key {key!r} of {type(key)}")
            pairs = [(key, self(item, f"{place}.{key}" if place else str(key))) for key, item in value.items()]
            if all(type(key) is str and key != _TAG for key, _ in pairs):
                return dict(pairs)
            return {_TAG: "dict", "items": [[self(key, place), item] for key, item in pairs]}
        raise TypeError(
            f"{place}: cannot store a {kind}; state holds tensors, arrays, numbers, strings, booleans and None"
        )

    def _tensor(self, value: torch.Tensor, place: str) -> dict[str, Any]:
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise TypeError(f"{place}: cannot store a {value.layout} tensor of {value.dtype}")
        # The file holds contiguous tensors. One that is merely transposed (a channels-last weight) comes back so: torch
        # adds up in the order of memory, so that another layout would give other last bits.
        value = value.detach().cpu()
        order = _order(value.stride())
        tensor = value.permute(order)
        if not tensor.is_contiguous():
            order, tensor = list(range(value.dim())), value.contiguous()
        # safetensors refuses tensors that share memory, and views of a larger storage.
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in self._storages:
            tensor = tensor.clone()
        elif storage.nbytes():
            self._storages.add(storage.data_ptr())
        return {_TAG: "tensor", "name": _put(self.tensors, place, tensor), "order": order}


def _order(strides: Sequence[int]) -> list[int]:
    """The axes from the slowest to the fastest in memory."""
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])


def _plain(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def _put(values: dict[str, Any], place: str, value: Any) -> str:
    """File ``value`` under its place, numbered where places print alike (the keys 1 and "1")."""
    name, number = place, 1
    while name in values:
        number += 1
        name = f"{place}#{number}"
    values[name] = value
    return name


def _decode(node: Any, tensors: Mapping[str, torch.Tensor], arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    match node.get(_TAG):
        case None:
            return {key: _decode(item, tensors, arrays) for key, item in node.items()}
        case "float":
            return float(node["value"])
        case "tensor":
            return tensors[node["name"]].permute(_inverse(node["order"]))
        case "array":
            return arrays[node["name"]].transpose(_inverse(node["order"]))
        case "scalar":
            return np.dtype(node["dtype"]).type(_decode(node["value"], tensors, arrays))
        case "tuple":
            return tuple(_decode(item, tensors, arrays) for item in node["items"])
        case "dict":
            return {_decode(key, tensors, arrays): _decode(item, tensors, arrays) for key, item in node["items"]}
        case other:
            raise ValueError(f"unknown kind of entry {other!r} in {STATE}")


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda axis: order[axis])


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()  # JSON keeps the order of keys


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, data: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(data, indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
