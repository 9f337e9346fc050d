"""Observations that are stacks of their last frames, kept with every frame stored once.

A suite declares such leaves in ``Task.frames``. A memory puts stacks in and keeps indices; what it gets back are the
same bits. What a stack shares with an earlier one of its row is found by comparing bytes, not by rules about episodes:
starts, restarts, slots that change tasks, rows that pause and runs that resume need no care, and a leaf that is no
stack would cost memory but never be wrong. (Storing frames once goes back to the replay of deep Q-networks, Mnih et al.
2015, https://doi.org/10.1038/nature14236, whose single stream of frames needs such rules.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from mtrl.types import Array


class Frames:
    """A pool of frames: stacks [m, k * c, ...] go in, indices [m, k] int32 come out, and the other way round.

    Memory is reserved, not filled, at construction. A pool that proves too small grows by an eighth.

    Args:
        box: of one stack, [k * c, ...].
        k: frames in a stack, oldest first along its first axis.
        size: frames to reserve.

    Attributes:
        used: frames [0, used) have ever been written to.
    """

    def __init__(self, box: Box, k: int, size: int) -> None:
        self.shape, self.dtype, self.k = box.shape, np.dtype(box.dtype), k
        # Compared as bytes: what is equal as a number may differ in bits (0.0 and -0.0), or the reverse (NaN).
        self._bytes = np.empty((size, frame_bytes(box, k)), np.uint8)
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self.used = 0
        self._free = np.zeros(0, np.int32)  # frames below ``used`` that no stack needs, a pile
        self._holders = np.zeros(len(self._bytes), np.int32)  # of each frame, the stacks that need it

    def put(self, stacks: Array, before: Array, shift: int) -> Array:
        """Store stacks; what they share with earlier ones of theirs is not stored again.

        Args:
            stacks: [m, k * c, ...].
            before: [m, k], the indices of a stack that each may continue; any valid ones if there is none.
            shift: by how many frames (0 to k - 1) it would continue it.

        Returns:
            [m, k] indices, to ``get`` by and, in the end, to ``drop``.
        """
        m, keep = len(stacks), self.k - shift
        frames = np.ascontiguousarray(stacks, self.dtype).reshape(-1).view(np.uint8)
        frames = frames.reshape(m, self.k, self._bytes.shape[1])
        index = np.empty((m, self.k), np.int32)
        index[:, :keep] = before[:, shift:]
        old = index[:, :keep]
        # A dropped frame may still lie there, but the next one may take its place.
        follows = (self._holders[old] > 0).all(1) & (self._bytes[old] == frames[:, :keep]).all((1, 2))
        fresh = np.ones((m, self.k), bool)
        fresh[follows, :keep] = False
        start = np.flatnonzero(~follows)
        # Many stacks start with one frame, repeated.
        fresh[start, 1:] = (frames[start, 1:] != frames[start, :-1]).any(2)
        index[fresh] = at = self._take(int(fresh.sum()))
        self._bytes[at] = frames[fresh]
        for j in range(1, self.k):
            same = start[~fresh[start, j]]
            index[same, j] = index[same, j - 1]
        np.add.at(self._holders, index, 1)
        return index

    def get(self, index: Array, out: Array | None = None) -> Array:
        """The stacks [..., k * c, ...] of ``index`` [..., k]; written to ``out`` (contiguous) if given."""
        out = np.empty((*index.shape[:-1], *self.shape), self.dtype) if out is None else out
        flat = out.reshape(-1).view(np.uint8).reshape(-1, self._bytes.shape[1])
        # mode="clip" because numpy buffers the output in the default mode; the indices are in range.
        np.take(self._bytes, index.reshape(-1), axis=0, out=flat, mode="clip")
        return out

    def drop(self, index: Array) -> None:
        """Give up stacks that were put once each; frames that no other stack needs make room for new ones."""
        np.subtract.at(self._holders, index, 1)
        self._free = np.concatenate((self._free, np.unique(index[self._holders[index] == 0])))

    def tensor(self, device: torch.device) -> Tensor:
        """All used frames on ``device``, [used, c, ...]; on the CPU they share this pool's memory."""
        frames = self._bytes[: self.used].view(self.dtype)
        return torch.as_tensor(frames, device=device).view(-1, self.shape[0] // self.k, *self.shape[1:])

    def state_dict(self) -> Array:
        """The bytes of all used frames, without a copy; the indices are the memory's to save."""
        return self._bytes[: self.used]

    def load_state_dict(self, frames: Array, *held: Array) -> None:
        """Continue from ``state_dict``'s answer; ``held`` are the indices of all stacks that were not dropped."""
        self.clear()
        self._take(len(frames))
        self._bytes[: len(frames)] = frames
        for index in held:
            np.add.at(self._holders, index, 1)
        self._free = np.flatnonzero(self._holders[: self.used] == 0).astype(np.int32)

    def _take(self, count: int) -> Array:
        """Places of so many new frames: those that were given up, then untouched ones."""
        again = min(count, len(self._free))
        cut = len(self._free) - again
        self._free, reused = self._free[:cut], self._free[cut:]
        start, self.used = self.used, self.used + count - again
        size = len(self._bytes)
        if self.used > size:
            more = max(self.used - size, size // 8)
            grown = np.empty((size + more, self._bytes.shape[1]), np.uint8)
            grown[:size] = self._bytes
            self._bytes, self._holders = grown, np.pad(self._holders, (0, more))
        return np.concatenate((reused, np.arange(start, self.used, dtype=np.int32)))


class Stacks:
    """Looks like an array [length, n, k * c, ...] of stacks, written step by step.

    Any index of the first axes gives an array, as numpy's would: ``x[t]``, ``x[:, rows]``, ``x[ts, rows]``, ``x[:]``.

    Args:
        length, n: steps and rows.
        box: of one stack.
        k: frames in a stack.
    """

    def __init__(self, length: int, n: int, box: Box, k: int) -> None:
        # Each step brings a row one frame, but the first may come in the midst of an episode.
        self.frames = Frames(box, k, n * (length + k - 1))
        self.index = np.zeros((length, n, k), np.int32)
        self.shape, self.dtype = (length, n, *box.shape), self.frames.dtype

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: Any) -> Array:
        return self.frames.get(self.index[at])

    def __setitem__(self, t: int, stacks: Array) -> None:
        """Write step ``t``, which follows step t - 1; step 0 begins anew."""
        if t == 0:
            self.frames.clear()
        self.index[t] = self.frames.put(stacks, self.index[t - 1], 1)

    def state_dict(self, steps: int) -> dict[str, Any]:
        """The first ``steps`` steps as plain data."""
        return {"frames": self.frames.state_dict().copy(), "index": self.index[:steps].copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``'s answer."""
        held = np.asarray(state["index"])
        self.index[: len(held)] = held
        self.frames.load_state_dict(state["frames"], held)


class DrawnStacks:
    """Like a tensor [items, steps, k * c, ...] of stacks, to draw items from: ``x[own]``.

    Args:
        frames: [used, c, ...].
        index: [items, steps, k] int32 or int64, on the same device.
    """

    def __init__(self, frames: Tensor, index: Tensor) -> None:
        self.frames, self.index = frames, index

    def __getitem__(self, own: Tensor) -> Tensor:
        index = self.index[own]
        return self.frames.index_select(0, index.flatten()).view(*index.shape, *self.frames.shape[1:]).flatten(2, 3)


def frame_bytes(box: Box, k: int) -> int:
    """Bytes of one of the k frames in a stack."""
    return int(np.prod(box.shape)) * np.dtype(box.dtype).itemsize // k
