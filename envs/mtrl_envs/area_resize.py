"""Shrinking of grey images by area averaging, in numpy alone."""

from __future__ import annotations

import math

import numpy as np


class AreaResize:
    """Shrinks grey images to ``size`` x ``size``: each new pixel is the mean of the area that it covers.

    It computes the means exactly, in integers small enough for float32, and rounds halves to even. OpenCV's
    ``INTER_AREA``, which adds rounded float32 weights, gives the same but for some of the exact halves, where it may
    be one grey level off; it takes about twice as long and 150 MB on disk.

    Args:
        height, width: of the images, in pixels.
        size: of the results, in pixels; at most ``height`` and ``width``.
    """

    def __init__(self, height: int, width: int, size: int) -> None:
        # The overlaps repeat: 5 lines of an Atari screen make 2 new ones, and 40 columns make 21.
        tall, wide = math.gcd(height, size), math.gcd(width, size)
        self._rows = _overlaps(height // tall, size // tall)
        self._columns = _overlaps(width // wide, size // wide).T
        self._area = float(height // tall * (width // wide))
        self._image = np.empty((tall, height // tall, width), np.float32)
        self._flat = np.empty((tall, size // tall, width), np.float32)
        self._sums = np.empty((size * wide, size // wide), np.float32)

    def __call__(self, image: np.ndarray, out: np.ndarray) -> None:
        """Shrink ``image`` [height, width] uint8 into ``out`` [size, size] uint8."""
        self._image[:] = image.reshape(self._image.shape)
        np.matmul(self._rows, self._image, out=self._flat)
        np.matmul(self._flat.reshape(len(self._sums), -1), self._columns, out=self._sums)
        self._sums /= self._area
        out[:] = np.rint(self._sums, out=self._sums).reshape(out.shape)


def _overlaps(old: int, new: int) -> np.ndarray:
    """Lengths that ``new`` equal parts of a line share with ``old`` equal parts of it, in 1 / (old * new) of the line,
    [new, old] float32."""
    a, b = np.arange(new)[:, None] * old, np.arange(old) * new
    return np.maximum(np.minimum(a + old, b + new) - np.maximum(a, b), 0).astype(np.float32)
