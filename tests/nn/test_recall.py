"""What is recalled is what was computed, once, until the network changes."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from mtrl.nn import recall as module
from mtrl.nn.actor_critic import Rows
from mtrl.nn.recall import Recall
from mtrl.types import Group

CPU = torch.device("cpu")
GRID = Box(0, 10, (3, 2, 2), np.uint8)
VECTOR = Box(-1, 1, (4,), np.float32)


def _group(name: str = "grid", **leaves: Box) -> Group:
    return Group(name, leaves or {"image": GRID, "vector": VECTOR}, Discrete(3), (0, 1))


def _rows(values: list[int], task: list[int], name: str = "grid") -> Rows:
    value = torch.tensor(values)[None, :]
    image = value[..., None, None, None].expand(1, len(values), 3, 2, 2).to(torch.uint8)
    vector = value[..., None].expand(1, len(values), 4).float()
    tasks = torch.tensor([task])
    return Rows({name: {"image": image, "vector": vector}}, tasks, torch.zeros_like(tasks, dtype=torch.bool))


class _Network:
    """Features of a row: its value, its task and how many rows were computed before it."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, rows: Rows) -> Tensor:
        (leaves,) = rows.leaves.values()
        value = leaves["vector"][..., 0]
        count = torch.arange(value.shape[1])[None] + sum(self.asked)
        self.asked.append(value.shape[1])
        return torch.stack((value, rows.task.float(), count.float()), 2)


def test_rows_are_computed_once() -> None:
    memory, net = Recall([_group()], CPU), _Network()
    lookup = memory.lookup(1)
    assert lookup is not None
    assert lookup(_rows([5, 7, 5, 5], [0, 0, 0, 1]), net).tolist() == [[[5, 0, 0], [7, 0, 1], [5, 0, 0], [5, 1, 2]]]
    assert lookup(_rows([7, 8], [0, 0]), net).tolist() == [[[7, 0, 1], [8, 0, 3]]]
    assert lookup(_rows([8, 5], [0, 1]), net).tolist() == [[[8, 0, 3], [5, 1, 2]]]
    assert net.asked == [3, 1]


def test_another_version_of_the_network_is_asked_anew() -> None:
    memory, net = Recall([_group()], CPU), _Network()
    for version in (1, 1, 2, 1):
        lookup = memory.lookup(version)
        assert lookup is not None
        lookup(_rows([5], [0]), net)
    assert net.asked == [1, 1, 1]


def test_state_continues_and_is_renamed() -> None:
    memory, net = Recall([_group()], CPU), _Network()
    rows = _rows([5, 7], [0, 1])
    lookup = memory.lookup(4)
    assert lookup is not None
    before = lookup(rows, net)
    again = Recall([_group()], CPU)
    again.load_state_dict(memory.state_dict(4), 1)
    lookup = again.lookup(1)
    assert lookup is not None
    assert torch.equal(lookup(rows, net), before)
    lookup(_rows([9, 5], [0, 0]), net)
    assert net.asked == [2, 1]
    assert len(memory.state_dict(5)["lengths"]) == 0


def test_state_of_nothing_continues() -> None:
    memory, net = Recall([_group()], CPU), _Network()
    memory.load_state_dict(Recall([_group()], CPU).state_dict(0), 3)
    lookup = memory.lookup(3)
    assert lookup is not None
    assert lookup(_rows([5], [0]), net).tolist() == [[[5, 0, 0]]]


def test_too_many_rows_are_forgotten() -> None:
    memory, net = Recall([_group()], CPU), _Network()
    lookup = memory.lookup(1)
    assert lookup is not None
    for start in range(0, module.MOST + 200, 100):
        lookup(_rows([start % 50] * 100, list(range(start, start + 100))), net)
    lookup(_rows([0], [0]), net)
    assert net.asked[-1] == 1
    assert sum(net.asked) == module.MOST // 100 * 100 + 200 + 1 + (module.MOST % 100 > 0) * 100


def test_nothing_is_remembered_where_little_repeats() -> None:
    assert Recall([_group()], torch.device("meta")).lookup(0) is None
    assert Recall([_group(vector=VECTOR)], CPU).lookup(0) is None
    assert Recall([_group(), _group("picture", image=Box(0, 255, (4, 84, 84), np.uint8))], CPU).lookup(0) is None


def test_a_leaf_may_be_a_number() -> None:
    """As ``alive`` of a team."""
    alive = Box(0, 1, (), np.bool_)  # type: ignore[call-overload]
    memory, net = Recall([_group(image=GRID, vector=VECTOR, alive=alive)], CPU), _Network()
    lookup = memory.lookup(1)
    assert lookup is not None
    rows = _rows([5, 5, 5], [0, 0, 0])
    leaves = {"grid": {**rows.leaves["grid"], "alive": torch.tensor([[True, False, True]])}}
    assert lookup(rows._replace(leaves=leaves), net).tolist() == [[[5, 0, 0], [5, 0, 1], [5, 0, 0]]]
