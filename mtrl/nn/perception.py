"""Perception: one group's leaves to latents of one width, so that every group can share the trunk behind it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mtrl.nn.patches import Patches, find_patches, one_hot_cells, strides
from mtrl.types import Group, Spec

SMALL = 16
"""Images of at most this height and width go through 2x2 convolutions, larger ones through the Nature CNN."""

IDS = 64
"""Small images whose space says that all values are below this are grids of ids (MiniGrid: object, colour, state)."""

CELLS = 65536
"""Most different cells of a grid of ids that are kept as a table of one-hots."""

JOINED = 256
"""Width of the latents where groups come with different ones and the config names none."""


class View(NamedTuple):
    """Where latents hold a small picture as it came: from column ``start``, flat, of ``shape`` (h, w, c). ``planes``:
    if its cells are one-hots of ids, how many of each."""

    start: int
    shape: tuple[int, int, int]
    planes: tuple[int, ...] = ()


class PerceptionConfig(BaseModel):
    """How leaves become latents."""

    model_config = ConfigDict(extra="forbid")

    ignore: tuple[Literal["vector", "image", "tokens"], ...] = Field(
        default=(), description="leaves that stay unseen (MOORE: vector, which is the direction in MiniGrid)"
    )

    width: int | None = Field(
        default=None, ge=1, description="of the latents; None: as they come, or 256 if the groups would disagree"
    )
    vector: tuple[int, ...] = Field(default=(), description="hidden layers on the vector leaf; () leaves it as it is")
    grid: Literal["onehot", "cast"] = Field(
        default="onehot", description="cells of a grid of ids: one-hots, or raw numbers"
    )
    channels: tuple[int, ...] = Field(
        default=(16, 32, 64),
        description="2x2 convolutions on small images (MOORE's MiniGrid CNN); () leaves them to the trunk's experts",
    )
    tokens: Literal["bag", "gru"] = Field(
        default="bag", description="token ids: masked mean of embeddings, or the GRU's end state"
    )
    token_width: int = Field(default=32, ge=1)
    activation: Literal["relu", "tanh"] = Field(default="relu", description="between the layers of vector and join")


# ReLU in place: its backward needs only its output, and a fresh 2 MB tensor per layer costs more than the ReLU itself.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": functools.partial(nn.ReLU, inplace=True), "tanh": nn.Tanh}


def mlp(sizes: tuple[int, ...], activation: str, *, layer_norm: bool = False, last: bool = True) -> nn.Sequential:
    """Linear layers ``sizes[0] -> ... -> sizes[-1]``, each with its activation (the last one only if ``last``)."""
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(inner, outer))
        if last or i < len(sizes) - 2:
            layers += [nn.LayerNorm(outer)] if layer_norm else []
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


class GridCNN(nn.Module):
    """2x2 convolutions over a small image, [n, c, h, w] uint8 -> [n, out]; tanh after the last one.

    Without ``channels`` it hands on the cells as they are, flat [n, h * w * planes]; ``view`` is their shape.

    The network of MOORE's MiniGrid baselines (https://arxiv.org/abs/2311.11385), with one-hot cells as an option. Data
    are kept channels last, where oneDNN's convolutions are fastest at this size.

    Args:
        shape: (c, h, w).
        planes: number of ids per channel, for one-hot cells; None: the numbers times ``scale``.
        channels: outputs of each convolution.
        scale: of raw numbers.
    """

    cells: Tensor
    strides: Tensor

    def __init__(
        self, shape: tuple[int, ...], planes: tuple[int, ...] | None, channels: tuple[int, ...], scale: float = 1.0
    ) -> None:
        super().__init__()
        c, h, w = shape
        self.scale, self.planes = scale, planes or ()
        if planes is not None:
            # All possible cells, one-hot, in a table: looking a cell up is ten times cheaper than building its one-hot.
            self.register_buffer("cells", one_hot_cells(planes), persistent=False)
            self.register_buffer("strides", strides(planes), persistent=False)
        sizes = (c if planes is None else sum(planes), *channels)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Conv2d(a, b, 2), ACTIVATIONS["relu"]()]
        self.convs = _channels_last(nn.Sequential(*layers[:-1]))
        self.activation = nn.Tanh()
        self.layers = len(channels)
        self.out = (h - self.layers) * (w - self.layers) * sizes[-1]
        self.view = None if channels else (h, w, sizes[0])

    def forward(self, image: Tensor) -> Tensor:
        if self.planes:
            cells = (image * self.strides[:, None, None]).sum(1, dtype=torch.int32)
            patches = find_patches(cells.long(), self.layers)
            if patches is not None:
                return self._by_patch(patches)
            x = F.embedding(cells, self.cells).permute(0, 3, 1, 2)
        else:
            x = (image.float() * self.scale).contiguous(memory_format=torch.channels_last)
        x = self.convs(x)
        return (x if self.view else self.activation(x)).permute(0, 2, 3, 1).flatten(1)

    def _by_patch(self, patches: Patches) -> Tensor:
        x, parts = self.cells, iter(patches.parts)
        for layer in self.convs:
            if isinstance(layer, nn.Conv2d):
                weight = layer.weight.permute(0, 2, 3, 1).flatten(1)  # [out, 4 * in]
                x = F.linear(F.embedding(next(parts), x).flatten(1), weight, layer.bias)
            else:
                x = layer(x)
        return F.embedding(patches.place.flatten(1), self.activation(x)).flatten(1)


class NatureCNN(nn.Module):
    """Pictures [n, c, h, w] uint8 -> [n, 512] (Mnih et al. 2015, https://doi.org/10.1038/nature14236)."""

    out = 512

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = _channels_last(
            nn.Sequential(
                nn.Conv2d(shape[0], 32, 8, 4),
                nn.ReLU(inplace=True),
                nn.Conv2d(32, 64, 4, 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(64, 64, 3),
                nn.ReLU(inplace=True),
            )
        )
        with torch.no_grad():
            flat = self.convs(torch.zeros(1, *shape)).numel()
        self.linear = nn.Linear(flat, self.out)
        self.activation = nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        x = image.contiguous(memory_format=torch.channels_last).float() / 255.0
        return self.activation(self.linear(self.convs(x).flatten(1)))


class Tokens(nn.Module):
    """Token ids [n, l] int32, 0 = padding -> [n, width]: mean embedding of the real tokens, or the GRU's state at the
    last real one (padding may also lie between them)."""

    def __init__(self, vocabulary: int, width: int, kind: Literal["bag", "gru"]) -> None:
        super().__init__()
        self.out = width
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.gru = nn.GRU(width, width, batch_first=True) if kind == "gru" else None

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.long()
        count = (tokens != 0).cumsum(1)
        x = self.embed(tokens)
        if self.gru is None:
            return x.sum(1) / count[:, -1:].clamp(min=1)
        out = self.gru(x)[0]
        return out[torch.arange(len(out), device=out.device), count.argmax(1)]


class _GroupPerception(nn.Module):
    """The encoders of one group's leaves and, where the widths must agree, the layer that joins them."""

    def __init__(self, group: Group, config: PerceptionConfig, state: bool) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.natural = 0
        self.view: View | None = None
        for leaf, box in group.leaves.items():
            if leaf in ("legal", "alive", *config.ignore) or (leaf == "state" and not state):
                continue
            encoder: nn.Module
            if leaf in ("vector", "state"):
                size = int(np.prod(box.shape))
                sizes = (size, *config.vector)
                encoder, width = mlp(sizes, config.activation), sizes[-1]
            elif leaf == "image":
                encoder = _image(group, config)
                width = int(encoder.out)  # type: ignore[arg-type]
                if isinstance(encoder, GridCNN) and encoder.view:
                    self.view = View(self.natural, encoder.view, encoder.planes)
            else:
                encoder = Tokens(int(box.high.max()) + 1, config.token_width, config.tokens)
                width = encoder.out
            self.encoders[leaf] = encoder
            self.natural += width
        if not self.encoders:
            raise ValueError(f"group {group.name!r} has nothing to perceive: its leaves are {sorted(group.leaves)}")
        self.join: nn.Module = nn.Identity()

    def forward(self, leaves: Mapping[str, Tensor]) -> Tensor:
        parts = [encoder(leaves[leaf]) for leaf, encoder in self.encoders.items()]
        return self.join(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


class Perception(nn.Module):
    """Latents of every group.

    Args:
        spec: its groups' leaves decide the encoders.
        config: see ``PerceptionConfig``.
        state: also read a team's global ``state`` (critics do, actors must not).

    Attributes:
        width: D of the latents, the same for all groups.
        lone: the groups that have one task.
        view: where the latents of every group hold the same small picture as it came, if they do.

    Raises:
        ValueError: a group that cannot be perceived; the message names it.
    """

    def __init__(self, spec: Spec, config: PerceptionConfig, *, state: bool = False) -> None:
        super().__init__()
        self.groups = nn.ModuleDict({group.name: _GroupPerception(group, config, state) for group in spec.groups})
        self.lone = frozenset(group.name for group in spec.groups if len(group.tasks) == 1)
        natural = [int(one.natural) for one in self.groups.values()]  # type: ignore[arg-type]
        self.width = config.width or (natural[0] if len(set(natural)) == 1 else JOINED)
        for one in self.groups.values():
            if one.natural != self.width:
                one.join = mlp((int(one.natural), self.width), config.activation)  # type: ignore[arg-type]
        views = {None if isinstance(one.join, nn.Sequential) else one.view for one in self.groups.values()}
        self.view: View | None = views.pop() if len(views) == 1 else None  # type: ignore[assignment]

    def forward(self, leaves: Mapping[str, Tensor], group: str) -> Tensor:
        """Leaves {leaf: [n, ...]} of one group -> latents [n, width] float32."""
        return self.groups[group](leaves)


def _channels_last(convs: nn.Sequential) -> nn.Sequential:
    for conv in convs:
        if isinstance(conv, nn.Conv2d):
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    return convs


def _image(group: Group, config: PerceptionConfig) -> nn.Module:
    box = group.leaves["image"]
    _, h, w = box.shape
    if max(h, w) > SMALL:
        if min(h, w) < 36:
            raise ValueError(f"group {group.name!r}: a {h}x{w} picture is too small for the Nature CNN (36x36)")
        return NatureCNN(box.shape)
    if min(h, w) <= len(config.channels):
        raise ValueError(f"group {group.name!r}: {len(config.channels)} 2x2 convolutions need more than a {h}x{w} grid")
    highest = [int(plane.max()) for plane in box.high]
    if max(highest) >= IDS:  # not ids: a small picture
        return GridCNN(box.shape, None, config.channels, scale=1 / 255)
    if config.grid == "cast":
        return GridCNN(box.shape, None, config.channels)
    planes = tuple(high + 1 for high in highest)
    if math.prod(planes) > CELLS:
        raise ValueError(
            f"group {group.name!r}: {math.prod(planes)} different cells are too many for grid='onehot'; use 'cast'"
        )
    return GridCNN(box.shape, planes, config.channels)


def to_tensors(leaves: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, Tensor]:
    """One group's leaves as tensors on ``device`` (no copy on the CPU)."""
    return {leaf: torch.as_tensor(array, device=device) for leaf, array in leaves.items()}


def flat_width(group: Group) -> int:
    """Width of the action as a network input: one-hot of a Discrete action, the numbers of a Box action."""
    return int(getattr(group.action, "n", 0)) or int(np.prod(group.action.shape or (0,)))


def flat_action(group: Group, action: Tensor) -> Tensor:
    """An action [n] int64 or [n, a] float32 as a network input [n, flat_width]."""
    return action if action.is_floating_point() else F.one_hot(action, flat_width(group)).float()


def with_action(group: Group) -> dict[str, Box]:
    """The leaves of a critic: the group's, with the flat action in [-1, 1] behind the ``vector`` leaf."""
    own = [group.leaves["vector"]] if "vector" in group.leaves else []
    ends = np.ones(flat_width(group), np.float32)
    low = np.concatenate([*(box.low for box in own), -ends])
    high = np.concatenate([*(box.high for box in own), ends])
    return {**group.leaves, "vector": Box(low, high, dtype=np.float32)}
