"""Dense experts summed with one learned weight per expert and task: MOORE, and the same without orthogonality.

Hendawy et al. 2024 (https://arxiv.org/abs/2311.11385; AhmedMagdyHendawy/MOORE). All experts serve every row. Their
outputs are linear; the task's weights may be negative; the tanh comes behind the sum; every task has its own head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.experts import ExpertCNN, ExpertMLP
from mtrl.nn.orthogonal import orthonormal_mixture
from mtrl.nn.perception import ACTIVATIONS, View
from mtrl.nn.trunk.config import TrunkConfig


class MixtureTrunk(nn.Module):
    """tanh(sum_k w[task, k] u_k(latents)); with ``orthogonal`` the u_k of each row are orthonormalised first.

    Experts are MLPs over the latents or, with ``channels``, convolutions over the raw view as in MOORE's MiniGrid
    networks (``widths`` then follow each expert's own convolutions, if there are any). What the latents hold beside the
    view passes by the experts and joins the features.

    Args:
        config: reads ``experts``, ``widths``, ``channels``, ``activation``.
        width: of the latents.
        num_tasks: T.
        view: where the latents hold a picture, if perception left one as it is.
        orthogonal: MOORE if true, its "MoE" baseline otherwise.

    Raises:
        ValueError: there is no layer to make experts of, no view for ``channels``, or more experts than features.
    """

    per_task = True

    def __init__(
        self,
        config: TrunkConfig,
        width: int,
        num_tasks: int,
        view: View | None = None,
        *,
        orthogonal: bool,
    ) -> None:
        super().__init__()
        if not config.widths and not config.channels:
            raise ValueError(f"the experts of {config.kind} need layers: set trunk.widths (or trunk.channels)")
        if config.channels and view is None:
            raise ValueError(
                "trunk.channels makes experts of convolutions on a small picture: set perception.channels=[] so that "
                "it arrives unchanged; all groups must have the same leaves, one of them the picture"
            )
        self.orthogonal = orthogonal
        self.convs, self.view, inner = None, slice(0, width), width
        if config.channels and view is not None:
            self.convs = ExpertCNN(config.experts, view, config.channels)
            self.view, inner = slice(view.start, view.start + math.prod(view.shape)), self.convs.out
        self.layers = ExpertMLP(config.experts, (inner, *config.widths), config.activation) if config.widths else None
        self.activation, self.tanh = ACTIVATIONS[config.activation](), nn.Tanh()
        self.mixed = config.widths[-1] if config.widths else inner
        self.out = self.mixed + width - (self.view.stop - self.view.start)
        if orthogonal and config.experts > self.mixed:
            raise ValueError(
                f"{config.experts} experts cannot be orthogonal in {self.mixed} dimensions: fewer or wider"
            )
        bound = 1 / math.sqrt(num_tasks)  # as a Linear layer over the task's one-hot
        self.weights = nn.Parameter(torch.empty(num_tasks, config.experts).uniform_(-bound, bound))

    def outputs(self, latents: Tensor) -> Tensor:
        """What each expert says: latents [n, width] -> [n, K, mixed]."""
        x = latents if self.convs is None else self.convs(latents[:, self.view])
        if self.layers is not None:
            x = self.layers(x if self.convs is None else self.activation(x))
        return x.transpose(0, 1)

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        outputs, weights = self.outputs(latents), F.embedding(task, self.weights)
        if self.orthogonal:
            mixed = orthonormal_mixture(outputs, weights[:, None])[:, 0]
        else:  # no product of matrices: their libraries are made for more than one row
            mixed = (weights[..., None].to(outputs.dtype) * outputs).sum(1)
        features = self.tanh(mixed)
        if self.out == self.mixed:
            return features
        return torch.cat((latents[:, : self.view.start], features, latents[:, self.view.stop :]), 1)
