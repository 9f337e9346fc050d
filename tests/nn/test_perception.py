"""Perception: every kind of leaf, one width for all groups, the same numbers as the plain formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete

from mtrl.nn.perception import NatureCNN, Perception, PerceptionConfig
from mtrl.types import Group, Spec, TaskInfo

IDS = np.broadcast_to(np.array([10, 5, 2], np.uint8)[:, None, None], (3, 7, 7))
GRID = Box(np.zeros_like(IDS), IDS, dtype=np.uint8)  # pyright: ignore[reportArgumentType]


def spec(**groups: dict[str, Any]) -> Spec:
    infos = tuple(TaskInfo(name, name, 5) for name in groups)
    return Spec(infos, tuple(Group(name, leaves, Discrete(2), (i,)) for i, (name, leaves) in enumerate(groups.items())))


def grids(n: int) -> torch.Tensor:
    planes = [torch.randint(0, high, (n, 7, 7)) for high in (11, 6, 3)]
    return torch.stack(planes, 1).to(torch.uint8)


def test_one_hot_cells_equal_the_plain_one_hot_and_convolution() -> None:
    perception = Perception(spec(g={"image": GRID}), PerceptionConfig())
    image = grids(5)
    one_hot = torch.cat([F.one_hot(image[:, k].long(), p) for k, p in enumerate((11, 6, 3))], -1).float()
    convs: Any = perception.groups["g"].encoders["image"].convs  # type: ignore[union-attr]
    expected = torch.tanh(convs(one_hot.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1))
    torch.testing.assert_close(perception({"image": image}, "g"), expected)
    assert perception.width == 1024


def test_cast_has_the_size_of_the_published_expert() -> None:
    perception = Perception(spec(g={"image": GRID}), PerceptionConfig(grid="cast"))
    assert sum(p.numel() for p in perception.parameters()) == 10_544  # MOORE's MiniGrid expert
    assert perception({"image": grids(2)}, "g").shape == (2, 1024)


def test_small_pictures_are_scaled_and_not_taken_for_ids() -> None:
    small = Box(0, 255, (3, 8, 8), np.uint8)
    perception = Perception(spec(g={"image": small}), PerceptionConfig())
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    convs: Any = perception.groups["g"].encoders["image"].convs  # type: ignore[union-attr]
    expected = torch.tanh(convs(image.float() / 255).permute(0, 2, 3, 1).flatten(1))
    torch.testing.assert_close(perception({"image": image}, "g"), expected)


def test_pictures_go_through_the_nature_network() -> None:
    perception = Perception(spec(g={"image": Box(0, 255, (4, 84, 84), np.uint8)}), PerceptionConfig())
    assert isinstance(perception.groups["g"].encoders["image"], NatureCNN)  # type: ignore[union-attr]
    assert perception({"image": torch.zeros(2, 4, 84, 84, dtype=torch.uint8)}, "g").shape == (2, 512)


@pytest.mark.parametrize("kind", ["bag", "gru"])
def test_padding_tokens_change_nothing(kind: Any) -> None:
    tokens = Box(0, 9, (6,), np.int32)
    perception = Perception(spec(g={"tokens": tokens}), PerceptionConfig(tokens=kind, token_width=8))
    text = torch.tensor([[3, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]], dtype=torch.int32)
    out = perception({"tokens": text}, "g")
    torch.testing.assert_close(perception({"tokens": text[:1, :2]}, "g"), out[:1])
    if kind == "bag":
        embed: Any = perception.groups["g"].encoders["tokens"].embed  # type: ignore[union-attr]
        torch.testing.assert_close(out[1], embed.weight[1:7].mean(0))


def test_padding_may_lie_between_tokens() -> None:
    """Text in sections: the GRU's state is read at the last real token, wherever that is."""
    tokens = Box(0, 9, (6,), np.int32)
    perception = Perception(spec(g={"tokens": tokens}), PerceptionConfig(tokens="gru", token_width=8))
    text = torch.tensor([[3, 0, 0, 4, 0, 0]], dtype=torch.int32)
    out = perception({"tokens": text}, "g")
    torch.testing.assert_close(perception({"tokens": text[:, :4]}, "g"), out)
    assert not torch.equal(perception({"tokens": text[:, :2]}, "g"), out)


def test_groups_of_different_sizes_get_one_width_and_a_lone_vector_stays_as_it_is() -> None:
    wide, narrow = Box(-1, 1, (9,)), Box(-1, 1, (4,))
    both = Perception(spec(a={"vector": wide}, b={"vector": narrow}), PerceptionConfig())
    assert both({"vector": torch.randn(3, 9)}, "a").shape == (3, 256)
    assert both({"vector": torch.randn(2, 4)}, "b").shape == (2, 256)
    x = torch.randn(3, 9)
    torch.testing.assert_close(Perception(spec(a={"vector": wide}), PerceptionConfig())({"vector": x}, "a"), x)


def test_only_the_critic_reads_the_global_state() -> None:
    leaves = {"vector": Box(-1, 1, (3,)), "state": Box(-1, 1, (5,)), "legal": Box(0, 1, (2,), np.bool_)}  # pyright: ignore
    actor, critic = (Perception(spec(g=leaves), PerceptionConfig(), state=state) for state in (False, True))
    x = {"vector": torch.randn(2, 3), "state": torch.randn(2, 5), "legal": torch.ones(2, 2, dtype=torch.bool)}
    torch.testing.assert_close(actor(x, "g"), x["vector"])
    torch.testing.assert_close(critic(x, "g"), torch.cat((x["vector"], x["state"]), 1))


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"image": Box(0, 255, (3, 20, 20), np.uint8)}, "group 'g': a 20x20 picture is too small"),
        ({"image": Box(0, 5, (1, 3, 3), np.uint8)}, "group 'g': 3 2x2 convolutions need more than a 3x3 grid"),
        ({"image": Box(0, 60, (3, 7, 7), np.uint8)}, "group 'g': 226981 different cells"),
        ({"legal": Box(0, 1, (2,), np.uint8)}, "group 'g' has nothing to perceive"),
    ],
)
def test_what_cannot_be_perceived_is_named(leaves: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Perception(spec(g=leaves), PerceptionConfig())
