"""Checkpoints: everything comes back exactly, nothing damaged is used, no kill leaves a run without one."""

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict, deque
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch

from mtrl import checkpoint
from mtrl.checkpoint import CheckpointError, load, save


def same(a, b, place="state"):
    """Deep equality of types, dtypes, shapes and bits."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert list(a) == list(b), place
        assert [type(key) for key in a] == [type(key) for key in b], place
        for key in a:
            same(a[key], b[key], f"{place}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{place}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), place
        bits = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
        assert torch.equal(*bits), place
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), place
        assert a.tobytes() == b.tobytes(), place
    else:
        assert repr(a) == repr(b), place  # tells nan and -0.0 apart from others


TENSOR_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16]
TENSOR_DTYPES += [torch.int32, torch.int64, torch.bool]
ARRAY_DTYPES = ["f2", "f4", "f8", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "?"]

STATES = {
    "tensor dtypes": {str(t): torch.tensor([0, 1, 1]).to(t) for t in TENSOR_DTYPES},
    "tensor shapes": {"scalar": torch.tensor(3.5), "empty": torch.zeros(2, 0), "many": torch.zeros(1, 2, 3, 1)},
    "array dtypes": {t: np.array([[0, 1], [1, 0]]).astype(t) for t in ARRAY_DTYPES},
    "array shapes": {"scalar": np.array(3.5), "empty": np.zeros((0, 4), bool), "many": np.zeros((1, 2, 3, 1))},
    "floats": {"x": [0.1, -0.0, 5e-324, float("nan"), float("inf"), -float("inf"), 1.7976931348623157e308]},
    "nan bits": {"t": torch.tensor([float("nan"), -0.0]), "a": np.array([np.nan, -0.0])},
    "numpy scalars": {"x": [np.float32(0.1), np.float64("nan"), np.uint64(2**64 - 1), np.bool_(True), np.int8(-1)]},
    "plain": {"none": None, "true": True, "one": 1, "text": 'a "quoted"\n\u2028 line', "big": -(2**200), "": {}},
    "containers": {"tuple": (), "nested": (1, [2, (3,), []], {"a": ()}), "list of tensors": [torch.ones(1)]},
    "keys": {"x": {0: "int", "0": "str", 0.5: "float", None: "none"}, "y": {True: 1}, "z": {}},
    "keys that print alike": {
        "x": {1: np.ones(1), "1": np.zeros(2)},
        "a": {"b.c": torch.ones(1)},
        "a.b": {"c": torch.zeros(1)},
    },
    "our own tag": {"$": "tensor", "inner": {"$": {"$": "float"}, "name": 1}},
    "numpy generators": {
        "pcg": np.random.default_rng(3).bit_generator.state,
        "philox": np.random.Generator(np.random.Philox(3)).bit_generator.state,
        "mt": np.random.MT19937(3).state,
    },
    "python generator": {"random": random.Random(3).getstate()},
    "torch generator": {"torch": torch.Generator().manual_seed(3).get_state()},
}


@pytest.mark.parametrize("name", STATES)
def test_everything_comes_back_exactly(name, tmp_path):
    save(tmp_path, 7, STATES[name], {"config": {"lr": 1e-3}})
    found = load(tmp_path)
    same(found.state, STATES[name])
    assert (found.step, found.meta, found.path) == (7, {"config": {"lr": 1e-3}}, tmp_path / "step-7")


def test_generators_go_on_where_they_were(tmp_path):
    rng, gen, py = np.random.default_rng(1), torch.Generator().manual_seed(1), random.Random(1)
    for draw in (rng.normal, lambda: torch.randn(3, generator=gen), py.random):
        draw()
    save(tmp_path, 0, {"np": rng.bit_generator.state, "torch": gen.get_state(), "py": py.getstate()}, {})
    expected = rng.normal(size=5), torch.randn(5, generator=gen), [py.gauss(0, 1) for _ in range(5)]
    state = load(tmp_path).state
    rng, gen, py = np.random.default_rng(), torch.Generator(), random.Random()
    rng.bit_generator.state = state["np"]
    gen.set_state(state["torch"])
    py.setstate(state["py"])
    same((rng.normal(size=5), torch.randn(5, generator=gen), [py.gauss(0, 1) for _ in range(5)]), expected)


def test_shared_and_strided_memory(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    array = np.arange(12).reshape(3, 4)
    state = {
        "base": base,
        "tied": base,
        "view": base[1],
        "turned": base.T,
        "part": base[:, ::2],
        "wide": base[:1].expand(5, 4),
    }
    arrays = {
        "base": array,
        "tied": array,
        "turned": array.T,
        "part": array[::2, ::-1],
        "fortran": np.asfortranarray(array),
    }
    save(tmp_path, 0, {"tensors": state, "arrays": arrays, "parameter": torch.nn.Parameter(base[0])}, {})
    found = load(tmp_path).state
    same(found["tensors"], {name: tensor.clone() for name, tensor in state.items()})
    for name, expected in arrays.items():
        np.testing.assert_array_equal(found["arrays"][name], expected)
    assert torch.equal(found["parameter"], base[0])
    found["tensors"]["base"].zero_()  # what is loaded can be written to, and is nobody else's memory
    found["arrays"]["base"][:] = 0
    assert found["tensors"]["tied"].sum() == base.sum()
    assert found["arrays"]["tied"].sum() == array.sum()


def test_memory_layout(tmp_path):
    """Torch's results depend on it in the last bits, and its fused optimisers pair numbers by position."""
    weight = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    array = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)).transpose(1, 0, 2)
    save(tmp_path, 0, {"weight": weight, "turned": torch.randn(3, 4).T, "array": array, "rows": np.ones((1, 1, 4))}, {})
    found = load(tmp_path).state
    assert found["weight"].stride() == weight.stride()
    assert torch.equal(found["weight"], weight)
    assert found["turned"].stride() == (1, 4)
    assert found["array"].strides == array.strides
    np.testing.assert_array_equal(found["array"], array)


def test_module_and_optimiser_go_on_as_if_nothing_happened(tmp_path):
    def make():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.8, 0.99))

    def learn(net, optimiser, data):
        for x in data:
            optimiser.zero_grad()
            net(x).square().mean().backward()
            optimiser.step()

    data = torch.randn(6, 16, 4, generator=torch.Generator().manual_seed(1))
    net, optimiser = make()
    learn(net, optimiser, data[:3])
    state = net.state_dict()
    assert isinstance(state, OrderedDict)
    save(tmp_path, 3, {"net": state, "optimiser": optimiser.state_dict()}, {})
    learn(net, optimiser, data[3:])
    other, other_optimiser = make()
    found = load(tmp_path).state
    other.load_state_dict(found["net"])
    other_optimiser.load_state_dict(found["optimiser"])
    learn(other, other_optimiser, data[3:])
    same(dict(other.state_dict()), dict(net.state_dict()))


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        ({1, 2}, "set"),
        (deque([1]), "deque"),
        (b"bytes", "bytes"),
        (Colour.RED, "Colour"),
        (1j, "complex"),
        (torch.Size([1]), "Size"),
        (np.array(["a"]), "<U1"),
        (np.array([object()]), "object"),
        (np.array([1j]), "complex"),
        (np.array([1], ">i4"), ">i4"),
        (np.str_("a"), "str_"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_other_objects_are_refused_with_their_place(value, kind, tmp_path):
    with pytest.raises(TypeError, match=rf"^agent\.replay\.0\.x: cannot store .*{kind}"):
        save(tmp_path, 0, {"agent": {"replay": [{"x": value}]}}, {})
    assert list(tmp_path.iterdir()) == []


def test_other_keys_are_refused_with_their_place(tmp_path):
    with pytest.raises(TypeError, match=r"^agent\.seen: cannot store the key \(1, 2\)"):
        save(tmp_path, 0, {"agent": {"seen": {(1, 2): 3}}}, {})


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_rotation_keeps_the_newest(keep, tmp_path):
    for step in (5, 30, 100, 1000):
        save(tmp_path, step, {"step": step}, {}, keep=keep)
    assert steps(tmp_path) == [5, 30, 100, 1000][-keep:]
    assert json.loads((tmp_path / "latest.json").read_text()) == {"step": 1000, "folder": "step-1000"}
    with pytest.raises(ValueError, match="at least 1"):
        save(tmp_path, 1001, {}, {}, keep=0)


def test_a_run_that_went_back_leaves_its_old_future(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, {"line": "old"}, {}, keep=3)
    save(tmp_path, 15, {"line": "new"}, {}, keep=3)
    assert steps(tmp_path) == [10, 15]
    assert load(tmp_path).state == {"line": "new"}


def test_the_same_step_again(tmp_path):
    save(tmp_path, 10, {"x": 1}, {})
    save(tmp_path, 10, {"x": 2}, {})
    assert load(tmp_path).state == {"x": 2}
    assert steps(tmp_path) == [10]


def two(folder):
    for step in (1, 2):
        save(folder, step, {"step": step, "w": torch.full((50,), float(step)), "a": np.full(50, step)}, {})
    return folder / "step-2"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def disappear(path):
    path.unlink()


def swap_for_a_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch pwned'\ntR.")


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors", "arrays.safetensors"])
@pytest.mark.parametrize("damage", [flip, truncate, disappear, swap_for_a_pickle])
def test_a_damaged_one_is_refused_and_the_previous_one_used(name, damage, tmp_path, caplog):
    newest = two(tmp_path)
    damage(newest / name)
    found = load(tmp_path)
    assert found.step == found.state["step"] == 1
    assert "step-2" in caplog.text
    assert "trying the previous checkpoint" in caplog.text
    with pytest.raises(CheckpointError, match="step-2"):
        load(tmp_path, 2)
    assert load(tmp_path, 1).step == 1


def test_a_pickle_with_a_matching_hash_is_refused_too(tmp_path):
    newest = two(tmp_path)
    evil = newest / "tensors.safetensors"
    torch.save({"w": torch.ones(3)}, evil)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][evil.name] = checkpoint._fingerprint(evil)
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._digest(manifest)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="SafetensorError"):
        load(tmp_path, 2)
    assert load(tmp_path).step == 1


def test_another_format_is_refused(tmp_path):
    newest = two(tmp_path)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99"):
        load(tmp_path, 2)


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(tmp_path / "missing")
    two(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .*\[1, 2\]"):
        load(tmp_path, 3)
    for step in (1, 2):
        truncate(tmp_path / f"step-{step}" / "state.json")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint .*step-2.*step-1"):
        load(tmp_path)


class Killed(BaseException):
    pass


def kill(*args, **kwargs):
    raise Killed


@pytest.mark.parametrize(
    "where", ["safetensors.numpy.save_file", "mtrl.checkpoint._fingerprint", "pathlib.Path.rename"]
)
def test_killed_while_writing(where, tmp_path, monkeypatch):
    two(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(where, kill)
        with pytest.raises(Killed):
            save(tmp_path, 3, {"step": 3}, {})
    assert (tmp_path / "step-3.tmp").exists()
    assert load(tmp_path).step == 2
    save(tmp_path, 4, {"step": 4}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-2", "step-4"]


def test_killed_between_rename_and_pointer(tmp_path, monkeypatch):
    two(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", kill)
        with pytest.raises(Killed):
            save(tmp_path, 3, {"step": 3}, {})
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 2
    assert load(tmp_path).step == 3  # complete, so nothing is lost
    save(tmp_path, 4, {"step": 4}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-3", "step-4"]


_WRITER = """
import sys, torch, numpy as np
from pathlib import Path
from mtrl.checkpoint import save
for step in range(10**6):
    w, a = torch.full((10_000,), float(step)), np.full(10_000, step)
    save(Path(sys.argv[1]), step, {"step": step, "w": w, "a": a}, {})
"""


def test_kill_minus_nine_at_any_time(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)])
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "latest.json").exists() and writer.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(random.random() * 0.2)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    found = load(tmp_path)
    same(
        found.state,
        {"step": found.step, "w": torch.full((10_000,), float(found.step)), "a": np.full(10_000, found.step)},
    )
    save(tmp_path, found.step + 1, {}, {})
    assert not list(tmp_path.glob("*.tmp"))


def test_a_slow_git_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    def slow(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("git", 10)

    monkeypatch.setattr(checkpoint.subprocess, "run", slow)
    found = checkpoint.read_versions()
    assert "git" not in found
    assert found["torch"] == checkpoint.versions()["torch"]


def test_versions_name_what_a_result_depends_on():
    found = checkpoint.versions()
    assert found["torch"] == torch.__version__
    assert {"python", "platform", "mtrl", "numpy", "gymnasium"} <= set(found)
    json.dumps(found)


def test_the_core_never_unpickles():
    for path in Path(checkpoint.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
                assert not (node.value.id == "pickle" and node.attr in ("load", "loads", "Unpickler")), path
