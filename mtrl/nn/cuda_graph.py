"""CUDA graphs: what a GPU is to do, recorded once and from then on launched as a whole.

The update of a small network is many hundred kernels of a few microseconds each; Python takes several times longer to
launch them one by one than the GPU to run them (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). A
recording repeats the very kernels, with the same random numbers: results are those of the work itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    """Calls ``work(task, inputs)``, on a GPU from a recording for each kind of inputs (tasks, shapes, dtypes).

    The work must always do the same for one kind of inputs, without looking at numbers on the GPU.

    Args:
        work: task [n] int64 on the device, tree of inputs -> tree of tensors. Trees are tensors in mappings and tuples.
        device: that it runs on; anything but CUDA calls ``work`` as it is.
        generators: of all random numbers that it draws on the device.
        recording: a context for the recording alone; what it yields is kept as long as the graph.
        on: False calls ``work`` as it is.
    """

    def __init__(
        self,
        work: Callable[[Tensor, Any], Any],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        recording: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        on: bool = True,
    ) -> None:
        self._work, self._device, self._generators, self._recording = work, device, generators, recording
        self._known: dict[Hashable, _Record] = {}
        self._off = not on or device.type != "cuda"

    def forget(self) -> None:
        """Drop all recordings: they hold the memory of tensors that have been replaced since."""
        self._known.clear()

    def __call__(self, task: Array, inputs: Any) -> tuple[Any, bool]:
        """What the work returns, and whether it came from a recording.

        Args:
            task: [n] int64, ids of the rows' tasks.
            inputs: tree of tensors on the device.

        Raises:
            RuntimeError: the work cannot be recorded.
        """
        kind = task.tobytes(), tuple((x.shape, x.dtype) for x in leaves(inputs))
        record = None if self._off else self._known.get(kind)
        if record is None:
            ids = torch.as_tensor(task, device=self._device)
            if self._off or len(self._known) == MOST:
                return self._work(ids, inputs), False
            record = self._known[kind] = _Record(ids, rebuilt(inputs, torch.clone))
        for own, given in zip(leaves(record.inputs), leaves(inputs), strict=True):
            own.copy_(given)
        graph = record.graph or (self._record(record) if record.calls >= WARM else None)
        if graph is None:
            record.calls += 1
            return self._work(record.task, record.inputs), False
        graph.replay()
        return rebuilt(record.outputs, torch.clone), True

    def _record(self, record: _Record) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with self._recording() as record.held, torch.cuda.graph(graph):
                record.outputs = self._work(record.task, record.inputs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"cannot be recorded as a CUDA graph, set agent.cuda_graph=false: {reason}") from error
        # The generators' counters were zeroed on the recording's stream, which the current one does not wait for.
        torch.cuda.synchronize(self._device)
        record.graph = graph
        return graph


class _Record:
    """Inputs of one kind in memory of their own, which the graph reads; the outputs that it writes."""

    def __init__(self, task: Tensor, inputs: Any) -> None:
        self.task, self.inputs = task, inputs
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Any = None
        self.held: object = None


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for part in parts for leaf in leaves(part)]


def rebuilt(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tree with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: rebuilt(part, change) for key, part in tree.items()}
    parts = [rebuilt(part, change) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
