"""Trunks steered by an embedding of the task: CARE and FiLM, as in facebookresearch/mtrl.

There the embedding starts from a language model's encoding of the task's description; here it is learned, since tasks
of all suites have numbers but not descriptions.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.experts import ExpertMLP
from mtrl.nn.perception import mlp
from mtrl.nn.trunk.config import TrunkConfig


class TaskContext(nn.Module):
    """Embeddings of all tasks, [T, width]: a learned vector each, then a common layer of ReLUs and a linear one."""

    def __init__(self, num_tasks: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tasks, width))
        self.layers = mlp((width, width, width), "relu", last=False)

    def forward(self) -> Tensor:
        return self.layers(self.embedding)


class CareTrunk(nn.Module):
    """CARE (Sodhani et al. 2021, https://arxiv.org/abs/2102.06177): encoders mixed by attention of the task.

    e = sum_k softmax(MLP(z_t))_k encoder_k(latents), where no gradient flows from the attention into z_t; layers over
    e joined with z_t. In the original, actor and critic share encoders and z_t, which the critic's loss alone trains;
    here every network has its own and trains it.

    Args:
        config: ``experts`` encoders of the layers ``encoder``; then ``widths``.
        width: of the latents.
        num_tasks: T.
    """

    per_task = False

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        encoder = _encoder(config)
        self.context = TaskContext(num_tasks, config.context)
        self.encoders = ExpertMLP(config.experts, (width, *encoder), "relu")
        self.attention = mlp((config.context, config.context, config.experts), "relu", last=False)
        sizes = (encoder[-1] + config.context, *config.widths)
        self.layers = mlp(sizes, config.activation, layer_norm=config.layer_norm)
        self.out = sizes[-1]

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        context = self.context()
        weights = torch.softmax(self.attention(context.detach()), 1)
        encoded = F.embedding(task, weights)[:, None] @ self.encoders(latents).transpose(0, 1)
        return self.layers(torch.cat((encoded[:, 0], F.embedding(task, context)), 1))


class FilmTrunk(nn.Module):
    """FiLM (Perez et al. 2018, https://arxiv.org/abs/1709.07871): the task scales and shifts each encoder layer.

    h <- gamma * ReLU(Linear(h)) + beta, the last encoder layer without ReLU; then layers over h joined with z_t. At the
    start gamma is 1 and beta 0 for all tasks.

    Args:
        config: modulated layers ``encoder``, then ``widths``; ``modulation`` per channel, or one pair per layer.
        width: of the latents.
        num_tasks: T.
    """

    per_task = False

    def __init__(self, config: TrunkConfig, width: int, num_tasks: int) -> None:
        super().__init__()
        encoder = _encoder(config)
        self.context = TaskContext(num_tasks, config.context)
        self.hidden = nn.Linear(config.context, config.context)
        self.activation = nn.ReLU()
        self.sizes = encoder if config.modulation == "channel" else (1,) * len(encoder)
        # A parameter, not a layer: whoever initialises layers anew must not touch the neutral start.
        self.modulation = nn.Parameter(torch.zeros(config.context, 2 * sum(self.sizes)))
        self.encoder = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise((width, *encoder)))
        sizes = (encoder[-1] + config.context, *config.widths)
        self.layers = mlp(sizes, config.activation, layer_norm=config.layer_norm)
        self.out = sizes[-1]

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        context = self.context()
        change = F.embedding(task, self.activation(self.hidden(context)) @ self.modulation)
        factors, shifts = (part.split(self.sizes, 1) for part in change.chunk(2, 1))
        h = latents
        for i, (layer, factor, shift) in enumerate(zip(self.encoder, factors, shifts, strict=True)):
            h = layer(h)
            h = (1 + factor) * (self.activation(h) if i < len(self.encoder) - 1 else h) + shift
        return self.layers(torch.cat((h, F.embedding(task, context)), 1))


def _encoder(config: TrunkConfig) -> tuple[int, ...]:
    encoder = (50, 50) if config.encoder is None else config.encoder
    if not encoder:
        raise ValueError(f"{config.kind} needs trunk.encoder to have layers")
    return encoder
