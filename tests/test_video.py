"""Videos can be read back with the right size, number and content of frames."""

import subprocess

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageSequence

from mtrl import video
from mtrl.video import tile, write_video


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


def test_tile_holds_the_last_frame():
    short, long = ramp(2, 40, 40, 1), ramp(5, 40, 40, 2)
    out = tile([short, long], ["short", "long"], height=40)
    assert (len(out), out.shape[-1], out.dtype) == (5, 3, np.uint8)
    left, right = out[:, -6, out.shape[2] // 4, 0], out[:, -6, 3 * out.shape[2] // 4, 0]
    last = short[-1, 0, 0, 0]
    assert left.tolist() == [*short[:, 0, 0, 0], *[last // 2] * 3]
    assert right.tolist() == long[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (10, 2, 5), (50, 5, 10)]
)
def test_tile_grid(count, rows, columns):
    one = tile([ramp(1, 20, 20)], ["a"], height=20)
    out = tile([ramp(1, 20, 20)] * count, ["a"] * count, height=20)
    gap = 4
    assert out.shape[1] - gap == rows * (one.shape[1] - gap)
    assert out.shape[2] - gap == columns * (one.shape[2] - gap)


def test_tile_scales_and_labels():
    out = tile([ramp(1, 100, 50), ramp(1, 30, 30)], ["a label that is far too long to fit", ""], height=60)
    lit = (out[0] > 150).all(-1)
    half = out.shape[2] // 2
    assert lit[:18, :half].any()
    assert not lit[:18, half:].any()
    with pytest.raises(ValueError, match="1 pictures and 2 labels"):
        tile([ramp(1, 8, 8)], ["a", "b"])
