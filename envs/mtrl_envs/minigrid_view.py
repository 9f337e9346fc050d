"""MiniGrid's observation, bit for bit, at a fraction of its cost.

``MiniGridEnv.gen_obs`` takes 80-95 % of a step: it copies the view cell by cell, rotates the copy up to four times,
spreads visibility in Python loops and encodes object by object. Here the 49 cells are fetched by one precomputed
``itemgetter`` per (position, direction), each object is reduced to one byte, its *kind*, and everything after that is
table lookups on byte strings: visibility takes seven, one per row of the view.

Nothing is mirrored, so nothing can go stale: every call reads the environment's own grid. Only the kind of an object
is remembered for the length of an episode; doors, the only objects that change in place, are read anew each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np

SIZE = 7
"""Cells along one side of the view; every registered id has this size."""
EXACT_VERSIONS = ("3.2.0",)
"""Versions of minigrid that this module has been compared with, bit for bit."""

_CELLS = SIZE * SIZE
_AGENT = (SIZE - 1) * SIZE + SIZE // 2  # flat index of the agent's own cell: bottom row, centre
_WALL, _DOOR, _OPEN = 2, 4, 0  # minigrid.core.constants
_COLORS, _STATES = 6, 3


def _kind(object_id: int, color_id: int, state: int) -> int:
    """One byte for an encoded cell; 0 is an unseen one. 11 objects x 6 colours x 3 states fit."""
    return (object_id * _COLORS + color_id) * _STATES + state


_EMPTY = _kind(1, 0, 0)
_OUTSIDE = _kind(_WALL, 5, 0)  # beyond the border minigrid shows grey walls

# For bytes.translate: kind -> object, colour, state, and kind -> "1" where one can see through, else "0".
_OBJECT = bytes(kind // (_COLORS * _STATES) for kind in range(256))
_COLOR = bytes(kind // _STATES % _COLORS for kind in range(256))
_STATE = bytes(kind % _STATES for kind in range(256))
_CLEAR = bytes(
    ord("0") if obj == _WALL or (obj == _DOOR and state != _OPEN) else ord("1")
    for obj, state in zip(_OBJECT, _STATE, strict=True)
)


class _Kinds(dict[Any, int]):
    """Object (by identity) to kind; ``None`` is an empty cell. Doors are never stored: they open and close."""

    def __missing__(self, cell: Any) -> int:
        kind = _kind(*cell.encode())
        if cell.type != "door":
            self[cell] = kind
        return kind


class FastView:
    """Replaces one environment's ``gen_obs``; same keys, values and dtypes as the original.

    Args:
        env: a ``MiniGridEnv`` with the usual 7x7 view.
    """

    def __init__(self, env: Any) -> None:
        assert env.agent_view_size == SIZE, f"FastView needs a {SIZE}x{SIZE} view, got {env.agent_view_size}"
        self.env = env
        self._outside = object()  # stands for every cell beyond the border
        self._kinds = _Kinds()
        self.clear()

    def clear(self) -> None:
        """Forget the objects of the past episode; call it before the environment's ``reset``."""
        self._kinds.clear()
        self._kinds[None] = _EMPTY
        self._kinds[self._outside] = _OUTSIDE

    def gen_obs(self) -> dict[str, Any]:
        """``image`` [7, 7, 3] uint8 (column, row, channel), ``direction``, ``mission``."""
        env = self.env
        grid = env.grid
        x, y = env.agent_pos
        fetch = _fetcher(grid.width, grid.height, int(x), int(y), int(env.agent_dir))
        kinds = bytearray(map(self._kinds.__getitem__, fetch([*grid.grid, self._outside])))
        seen = None if env.see_through_walls else _visible(kinds)
        # The agent's own cell shows what it carries; that it is always seen follows from where visibility starts.
        kinds[_AGENT] = self._kinds[env.carrying]
        if seen is not None:
            kinds = (int.from_bytes(kinds, "big") & int.from_bytes(seen, "big")).to_bytes(_CELLS, "big")
        planes = kinds.translate(_OBJECT) + kinds.translate(_COLOR) + kinds.translate(_STATE)
        # A bytearray, since users may write into an observation.
        image = np.frombuffer(bytearray(planes), np.uint8).reshape(3, SIZE, SIZE).transpose(2, 1, 0)
        return {"image": image, "direction": env.agent_dir, "mission": env.mission}


def _visible(kinds: bytearray) -> bytes:
    """Which of the 49 cells (row by row, top row first) are seen: 255 or 0 each. ``Grid.process_vis`` by tables."""
    rows, spread = _visibility_tables()
    clear = int(kinds.translate(_CLEAR), 2)  # bit 6 - i of row j's seven is cell (i, j)
    mask = 1 << (SIZE // 2)  # in the bottom row only the agent's cell is known to be seen
    seen = b""
    for _ in range(SIZE):
        key = mask << SIZE | clear & 127
        seen = rows[key] + seen
        mask = spread[key]
        clear >>= SIZE
    return seen


@functools.cache
def _visibility_tables() -> tuple[list[bytes], list[int]]:
    """One row's step of ``Grid.process_vis`` for all 2^14 inputs.

    Index: (cells already seen) * 128 + (cells one can see through), bit 6 - i for column i. First table: the row's
    seen cells as seven bytes 0 or 255; second: the cells it shows in the row above, as bits.
    """
    index = np.arange(1 << (2 * SIZE))
    bits = [SIZE - 1 - column for column in range(SIZE)]
    seen = [(index >> SIZE >> bit & 1).astype(bool) for bit in bits]
    clear = [(index >> bit & 1).astype(bool) for bit in bits]
    above = [np.zeros(len(index), bool) for _ in bits]
    # The two sweeps in minigrid's order; each leaves out its last column, which therefore shows nothing above it.
    for columns, side in ((range(SIZE - 1), 1), (range(SIZE - 1, 0, -1), -1)):
        for i in columns:
            spreads = seen[i] & clear[i]
            seen[i + side] = seen[i + side] | spreads
            above[i + side] = above[i + side] | spreads
            above[i] = above[i] | spreads
    row_of = [bytes(255 * (row >> bit & 1) for bit in bits) for row in range(1 << SIZE)]
    weights = 1 << np.array(bits)
    return [row_of[row] for row in weights @ np.stack(seen)], (weights @ np.stack(above)).tolist()


@functools.cache
def _fetcher(width: int, height: int, x: int, y: int, direction: int) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Fetches the view of an agent at (x, y) from the flat grid, row by row, far row first.

    The flat grid has one more element, for all cells outside. Cached per process: at most four per cell of a grid.
    """
    forward = ((1, 0), (0, 1), (-1, 0), (0, -1))[direction]
    right = (-forward[1], forward[0])
    indices = []
    for row in range(SIZE):
        for column in range(SIZE):
            ahead, aside = SIZE - 1 - row, column - SIZE // 2
            cell_x = x + ahead * forward[0] + aside * right[0]
            cell_y = y + ahead * forward[1] + aside * right[1]
            inside = 0 <= cell_x < width and 0 <= cell_y < height
            indices.append(cell_y * width + cell_x if inside else width * height)
    return itemgetter(*indices)
