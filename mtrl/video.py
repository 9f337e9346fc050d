"""Videos from frames: mp4 through ffmpeg, gif through Pillow, and several tasks side by side in one picture."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw, ImageFont

from mtrl.types import Array

_BACKGROUND = (24, 24, 28)
_GAP = 4  # pixels between tiles


def write_video(path: Path, frames: Array | Sequence[Array], fps: float = 30.0) -> Path:
    """Write ``frames`` to ``path``, atomically; the suffix (.mp4 or .gif) chooses the format.

    Args:
        path: the file; its folder is made if missing.
        frames: [t, h, w, 3] uint8, t >= 1. An mp4 gets odd heights and widths padded by one pixel, since H.264 stores
            colour for blocks of 2 x 2 pixels.
        fps: frames per second. A gif stores hundredths of a second per frame, so 50 is its maximum.

    Raises:
        ValueError: no frames, another shape or dtype, or another suffix.
        OSError: the file cannot be written.
    """
    video = np.asarray(frames)
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not video.size:
        raise ValueError(f"{path}: frames must be [t, h, w, 3] uint8 with t >= 1, got {video.shape} {video.dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.tmp{path.suffix}")  # the writers look at the suffix
    try:
        match path.suffix:
            case ".mp4":
                _mp4(part, video, fps)
            case ".gif":
                images = [Image.fromarray(frame) for frame in video]
                duration = max(20, round(1000 / fps / 10) * 10)
                images[0].save(part, save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=True)
            case other:
                raise ValueError(f"{path}: cannot write {other or 'a file without suffix'}; use .mp4 or .gif")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def tile(frames: Sequence[Array], labels: Sequence[str], height: int = 224) -> Array:
    """Several episodes side by side, each under its label; a shorter one holds its last frame, darkened.

    Args:
        frames: for each episode [t_i, h_i, w_i, 3] uint8.
        labels: one for each, for instance ``"reach-v3  1.00"``; one too long for its picture is shortened.
        height: pixels that every picture is scaled to, without its label.

    Returns:
        [max t_i, H, W, 3] uint8.
    """
    if not frames or len(frames) != len(labels):
        raise ValueError(f"{len(frames)} episodes and {len(labels)} labels: there must be as many, at least one")
    scaled = [_scale(video, height) for video in frames]
    width = max(video.shape[2] for video in scaled)
    size = max(10, height // 14)
    font = ImageFont.load_default(size)
    bar = round(size * 1.6)
    # A landscape page, with as few empty cells at its end as that allows.
    rows = math.ceil(len(frames) / math.ceil(math.sqrt(1.7 * len(frames))))
    columns = math.ceil(len(frames) / rows)
    length = max(len(video) for video in frames)
    cell_h, cell_w = height + bar + _GAP, width + _GAP
    out = np.empty((length, rows * cell_h + _GAP, columns * cell_w + _GAP, 3), np.uint8)
    out[:] = _BACKGROUND
    for index, (video, label) in enumerate(zip(scaled, labels, strict=True)):
        top, left = _GAP + index // columns * cell_h, _GAP + index % columns * cell_w
        out[:, top : top + bar, left : left + width] = _label(label, width, bar, font)
        top, left = top + bar, left + (width - video.shape[2]) // 2
        out[: len(video), top : top + height, left : left + video.shape[2]] = video
        out[len(video) :, top : top + height, left : left + video.shape[2]] = video[-1] // 2
    return out


def _mp4(path: Path, video: Array, fps: float) -> None:
    odd = ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0))
    video = np.pad(video, odd, mode="edge")
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{video.shape[2]}x{video.shape[1]}", "-r", str(fps), "-i", "-"]
    h264 = ["-c:v", "libx264", "-crf", "20", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]  # plays in browsers
    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", *raw, *h264, str(path)]
    done = subprocess.run(command, input=video.tobytes(), capture_output=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ffmpeg cannot write {path}: {done.stderr.decode(errors='replace').strip()}")


def _scale(video: Array, height: int) -> Array:
    if video.shape[1] == height:
        return video
    size = (max(1, round(video.shape[2] * height / video.shape[1])), height)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in video])


def _label(text: str, width: int, height: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Array:
    image = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    while draw.textlength(text, font) > width - 4 and len(text) > 1:
        text = text[:-2] + "…"
    draw.text((width // 2, height // 2), text, fill=(235, 235, 235), font=font, anchor="mm")
    return np.asarray(image)
