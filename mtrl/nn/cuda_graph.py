"""CUDA graphs: what a GPU is to do, recorded once and from then on launched as a whole.

The update of a small network is many hundred kernels of a few microseconds each; Python takes several times longer to
launch them one by one than the GPU to run them (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). A
recording repeats the very kernels on new inputs, of which random numbers are a part.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mtrl.types import Array

WARM = 2
"""Calls with inputs of a new kind before the next one is recorded: libraries set themselves up, optimisers make their
moments, and ``TaskRows`` reads the tasks, none of which may happen in a recording."""

MOST = 4
"""Kinds of inputs that are recorded; others are computed kernel by kernel."""


class Graphed:
    """Calls work, on a GPU from a recording for each kind of inputs (tasks, shapes, dtypes).

    The work must always do the same for one kind of inputs, without looking at numbers on the GPU. Recordings should
    live as long as the process learns: torch frees memory that they share when it destroys one.

    Args:
        on: False calls the work as it is.
        recording: a context for the recording alone; what it yields is kept as long as the graph.

    Attributes:
        replays: how often a recording was used.
    """

    def __init__(self, *, on: bool, recording: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self.on, self.replays = on, 0
        self._recording = recording
        self._known: dict[Hashable, _Record] = {}

    def forget(self) -> None:
        """Drop all recordings: they hold the memory of tensors that have been replaced since."""
        self._known.clear()

    def __call__(self, work: Callable[[Any], Any], task: Array, inputs: Any) -> tuple[Any, bool]:
        """What the work returns, and whether it came from a recording.

        Args:
            work: tree of inputs -> tree of tensors; the same one at every call. Trees are tensors in mappings and
                tuples.
            task: [n] int64, ids of the rows' tasks, which the part of the inputs that is called ``task`` holds, too.
            inputs: on the device.

        Raises:
            RuntimeError: the work cannot be recorded; says why.
        """
        if not self.on:
            return work(inputs), False
        kind = task.tobytes(), tuple((x.shape, x.dtype) for x in leaves(inputs))
        record = self._known.get(kind)
        if record is None:
            if len(self._known) == MOST:
                fresh = next((key for key, other in self._known.items() if other.graph is None), None)
                if fresh is None:
                    return work(inputs), False
                del self._known[fresh]
            record = self._known[kind] = _Record(rebuilt(inputs, torch.clone))
        for own, given in zip(leaves(record.inputs), leaves(inputs), strict=True):
            own.copy_(given)
        if record.graph is None and record.calls == WARM:
            self._record(work, record)
        if record.graph is None:
            record.calls += 1
            return work(record.inputs), False
        record.graph.replay()
        self.replays += 1
        return rebuilt(record.outputs, torch.clone), True

    def _record(self, work: Callable[[Any], Any], record: _Record) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Torch stays on the recording's stream if it fails: the first context leads back.
            back = torch.cuda.stream(torch.cuda.current_stream())
            with back, self._recording() as record.held, _no_collection(), torch.cuda.graph(graph):
                record.outputs = work(record.inputs)
        except RuntimeError as error:
            reason = str(error.__context__ or error).splitlines()[0]
            raise RuntimeError(f"no CUDA graph can be made of it: {reason}") from error
        record.graph = graph


class _Record:
    """Inputs of one kind in memory of their own, which the graph reads; the outputs that it writes."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Any = None
        self.held: object = None


@contextmanager
def _no_collection() -> Iterator[None]:
    """A graph that Python's collector destroys during a recording would spoil it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order, without the part called ``task``."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for name, part in _parts(tree) if name != "task" for leaf in leaves(part)]


def rebuilt(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tree with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    parts = {name: rebuilt(part, change) for name, part in _parts(tree)}
    if isinstance(tree, Mapping):
        return parts
    return type(tree)(**parts) if hasattr(tree, "_fields") else tuple(parts.values())


def _parts(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    return list(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
