"""Videos can be read back with the right size, number and content of frames."""

import subprocess

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageSequence

from mtrl import video
from mtrl.video import page, write_video


def ramp(t, h, w, seed=0):
    """Frames of one colour each, all different: [t, h, w, 3] uint8."""
    colours = np.random.default_rng(seed).permuted(np.arange(t) * (200 // t) + 20)
    return np.broadcast_to(colours[:, None, None, None], (t, h, w, 3)).astype(np.uint8)


def read_mp4(path, h, w):
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([get_ffmpeg_exe(), "-i", str(path), *raw], capture_output=True, check=True)
    assert f" {w}x{h}" in done.stderr.decode()
    assert " 10 fps" in done.stderr.decode()
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, h, w, 3)


@pytest.mark.parametrize(("h", "w"), [(64, 48), (33, 47)])
def test_mp4(h, w, tmp_path):
    frames = ramp(7, h, w)
    path = write_video(tmp_path / "videos" / "x.mp4", frames, fps=10)
    read = read_mp4(path, h + h % 2, w + w % 2)
    assert len(read) == 7
    np.testing.assert_allclose(read.mean((1, 2, 3)), frames.mean((1, 2, 3)), atol=4)  # lossy
    assert [p.name for p in path.parent.iterdir()] == ["x.mp4"]


def test_gif(tmp_path):
    frames = ramp(7, 33, 47)
    path = write_video(tmp_path / "x.gif", list(frames), fps=10)
    with Image.open(path) as image:
        read = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert image.info["duration"] == 100
    np.testing.assert_array_equal(np.stack(read), frames)


def test_an_old_video_is_replaced_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "x.gif"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            write_video(path, ramp(2, 8, 8))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_encoder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "get_ffmpeg_exe", lambda: "false")
    with pytest.raises(OSError, match="ffmpeg cannot write"):
        write_video(tmp_path / "x.mp4", ramp(2, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("x.mp4", np.zeros((2, 8, 8, 3)), "float64"),
        ("x.mp4", np.zeros((2, 8, 8), np.uint8), r"frame 0 must be .*, got \(8, 8\)"),
        ("x.mp4", np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        ("x.gif", np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        ("x.mp4", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], r"frame 1 has shape \(8, 9, 3\)"),
        ("x.avi", np.zeros((2, 8, 8, 3), np.uint8), r"cannot write \.avi; use \.mp4 or \.gif"),
    ],
)
def test_what_cannot_be_written(name, frames, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames)


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (10, 2, 5), (50, 5, 10)]
)
def test_page_grid(count, rows, columns):
    picture = np.zeros((20, 20, 3), np.uint8)
    one, out = page([picture], ["a"], height=20), page([picture] * count, ["a"] * count, height=20)
    gap = 4
    assert out.shape[0] - gap == rows * (one.shape[0] - gap)
    assert out.shape[1] - gap == columns * (one.shape[1] - gap)


def test_page_scales_and_labels():
    pictures = [np.full((100, 50, 3), 60, np.uint8), np.full((30, 30, 3), 90, np.uint8)]
    out = page(pictures, ["a label that is far too long to fit", ""], height=60)
    lit = np.all(out > 150, axis=-1)
    half = out.shape[1] // 2
    assert lit[:18, :half].any()
    assert not lit[:18, half:].any()
    assert np.count_nonzero(np.all(out == 60, axis=-1)) == 60 * 30
    assert np.count_nonzero(np.all(out == 90, axis=-1)) == 60 * 60
    wide = page([*pictures, np.full((10, 40, 3), 99, np.uint8)], [""] * 3, height=60)
    assert np.count_nonzero(np.all(wide == 99, axis=-1)) == 80 * 20
    assert page(pictures, ["a\nb", "c\n"], height=60).shape[0] > out.shape[0]
    with pytest.raises(ValueError, match="1 pictures and 2 labels"):
        page(pictures[:1], ["a", "b"])


def test_mp4_frames_may_come_one_by_one(tmp_path):
    frames = ramp(7, 64, 48)
    alive = []

    def stream():
        for frame in frames:
            alive.append(len(alive))
            yield frame

    read = read_mp4(write_video(tmp_path / "x.mp4", stream(), fps=10), 64, 48)
    np.testing.assert_array_equal(read, read_mp4(write_video(tmp_path / "y.mp4", frames, fps=10), 64, 48))
    assert len(alive) == 7


def test_a_gif_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "GIF_BYTES", 3 * 64)
    write_video(tmp_path / "x.gif", ramp(3, 8, 8))
    with pytest.raises(video.GifTooLongError, match="too long for a gif"):
        write_video(tmp_path / "y.gif", ramp(4, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["x.gif"]
