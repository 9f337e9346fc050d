"""Videos from frames: mp4 through ffmpeg, gif through Pillow, and several tasks side by side in one picture.

Frames may come one by one, from a generator: an mp4 holds one at a time. A gif is written when all have come, so it
holds them, a byte per pixel, up to ``GIF_BYTES``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw, ImageFont

from mtrl.types import Array

FORMATS = (".mp4", ".gif")
GIF_BYTES = 2**30
"""Pixels of all frames of a gif together, which takes as many bytes of memory while it is made."""

_BACKGROUND = (24, 24, 28)
_GAP = 4  # pixels between tiles


class GifTooLongError(ValueError):
    """More frames than a gif may hold in memory while it is made."""


def write_video(path: Path, frames: Iterable[Array], fps: float = 30.0) -> Path:
    """Write ``frames`` to ``path``, atomically; the suffix (.mp4 or .gif) chooses the format.

    Args:
        path: the file; its folder is made if missing.
        frames: [h, w, 3] uint8 each, all of one size, at least one. An mp4 gets odd heights and widths padded by one
            pixel, since H.264 stores colour for blocks of 2 x 2 pixels.
        fps: frames per second. A gif stores hundredths of a second per frame, so 50 is its maximum.

    Raises:
        ValueError: no frames, another shape or dtype, or another suffix.
        GifTooLongError: more than ``GIF_BYTES``.
        OSError: the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; use .mp4 or .gif")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.tmp{path.suffix}")  # the writers look at the suffix
    writer = _mp4 if path.suffix == ".mp4" else _gif
    try:
        writer(part, _checked(path, frames), fps)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def page(pictures: Sequence[Array], labels: Sequence[str], height: int = 224) -> Array:
    """Several pictures side by side, each under its label.

    Args:
        pictures: [h_i, w_i, 3] uint8 each.
        labels: one for each, for instance ``"reach-v3\\nreturn 1.00"``; a line too long for its picture is shortened.
            All have as many lines.
        height: pixels of a picture without its label; one wider than 4/3 of that is made to fit.

    Returns:
        [H, W, 3] uint8.
    """
    if not pictures or len(pictures) != len(labels):
        raise ValueError(f"{len(pictures)} pictures and {len(labels)} labels: there must be as many, at least one")
    scaled = [_scale(picture, height) for picture in pictures]
    width = max(picture.shape[1] for picture in scaled)
    size = max(10, height // 14)
    font = ImageFont.load_default(size)
    bar = round(size * 1.4) * (labels[0].count("\n") + 1) + size // 4
    # A landscape page, with as few empty cells at its end as that allows.
    rows = math.ceil(len(pictures) / math.ceil(math.sqrt(1.7 * len(pictures))))
    columns = math.ceil(len(pictures) / rows)
    cell_h, cell_w = height + bar + _GAP, width + _GAP
    out = np.empty((rows * cell_h + _GAP, columns * cell_w + _GAP, 3), np.uint8)
    out[:] = _BACKGROUND
    for index, (picture, label) in enumerate(zip(scaled, labels, strict=True)):
        top, left = _GAP + index // columns * cell_h, _GAP + index % columns * cell_w
        out[top : top + bar, left : left + width] = _label(label, width, bar, font)
        high, wide = picture.shape[:2]
        top, left = top + bar + (height - high) // 2, left + (width - wide) // 2
        out[top : top + high, left : left + wide] = picture
    return out


def _checked(path: Path, frames: Iterable[Array]) -> Iterator[Array]:
    first = None
    for number, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8 or not frame.size:
            raise ValueError(f"{path}: frame {number} must be [h, w, 3] uint8, got {frame.shape} {frame.dtype}")
        first = frame.shape if first is None else first
        if frame.shape != first:
            raise ValueError(f"{path}: frame {number} has shape {frame.shape}, those before it have {first}")
        yield frame
    if first is None:
        raise ValueError(f"{path}: no frames to write")


def _gif(path: Path, frames: Iterator[Array], fps: float) -> None:
    def images() -> Iterator[Image.Image]:
        size = 0
        for frame in frames:
            size += frame.shape[0] * frame.shape[1]
            if size > GIF_BYTES:
                raise GifTooLongError(
                    f"{path}: too long for a gif, which is held in memory; write an .mp4 or fewer frames"
                )
            yield Image.fromarray(frame)

    waiting = images()
    duration = max(20, round(1000 / fps / 10) * 10)
    next(waiting).save(path, save_all=True, append_images=waiting, duration=duration, loop=0, optimize=True)


def _mp4(path: Path, frames: Iterator[Array], fps: float) -> None:
    first = next(frames)
    h, w = first.shape[:2]
    odd = ((0, h % 2), (0, w % 2), (0, 0))
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w + w % 2}x{h + h % 2}", "-r", str(fps), "-i", "-"]
    h264 = ["-c:v", "libx264", "-crf", "20", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]  # plays in browsers
    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", *raw, *h264, str(path)]
    with tempfile.TemporaryFile() as errors:  # not a pipe, which could fill up while nobody reads it
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors)
        assert process.stdin is not None
        try:
            # A process that ends early breaks the pipe; its exit status and message say why.
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                for frame in itertools.chain([first], frames):
                    pipe.write(np.pad(frame, odd, mode="edge").tobytes())
        finally:
            process.wait()
        if process.returncode != 0:
            errors.seek(0)
            raise OSError(f"ffmpeg cannot write {path}: {errors.read().decode(errors='replace').strip()}")


def _scale(picture: Array, height: int) -> Array:
    factor = min(height / picture.shape[0], height * 4 / 3 / picture.shape[1])
    if factor == 1:
        return picture
    size = (max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _label(text: str, width: int, height: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Array:
    image = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    lines = text.split("\n")
    for number, line in enumerate(lines):
        while draw.textlength(line, font) > width - 4 and len(line) > 1:
            line = line[:-2] + "…"
        middle = height * (2 * number + 1) // (2 * len(lines))
        draw.text((width // 2, middle), line, fill=(235, 235, 235), font=font, anchor="mm")
    return np.asarray(image)
