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
from mtrl.nn.perception import ACTIVATIONS
from mtrl.nn.trunk.config import TrunkConfig


class MixtureTrunk(nn.Module):
    """tanh(sum_k w[task, k] u_k(latents)); with ``orthogonal`` the u_k of each row are orthonormalised first.

    Experts are MLPs over the latents or, with ``channels``, convolutions over the raw view as in MOORE's MiniGrid
    networks (``widths`` then follow each expert's own convolutions, if there are any).

    Args:
        config: reads ``experts``, ``widths``, ``channels``, ``activation``.
        width: of the latents.
        num_tasks: T.
        view: (h, w, c) that the latents are, flat, if perception left a picture as it is.
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
        view: tuple[int, int, int] | None = None,
        *,
        orthogonal: bool,
    ) -> None:
        super().__init__()
        if not config.widths and not config.channels:
            raise ValueError(f"the experts of {config.kind} need layers: set trunk.widths (or trunk.channels)")
        if config.channels and view is None:
            raise ValueError(
                "trunk.channels makes experts of convolutions on a small picture: set perception.channels=[] so that "
                "it arrives unchanged; all groups must consist of one picture of the same size"
            )
        self.orthogonal = orthogonal
        self.convs = ExpertCNN(config.experts, view, config.channels) if config.channels and view else None
        inner = self.convs.out if self.convs is not None else width
        self.layers = ExpertMLP(config.experts, (inner, *config.widths), config.activation) if config.widths else None
        self.activation = ACTIVATIONS[config.activation]()
        self.out = config.widths[-1] if config.widths else inner
        if orthogonal and config.experts > self.out:
            raise ValueError(f"{config.experts} experts cannot be orthogonal in {self.out} dimensions: fewer or wider")
        bound = 1 / math.sqrt(num_tasks)  # as a Linear layer over the task's one-hot
        self.weights = nn.Parameter(torch.empty(num_tasks, config.experts).uniform_(-bound, bound))

    def outputs(self, latents: Tensor) -> Tensor:
        """What each expert says: latents [n, width] -> [n, K, out]."""
        x = latents if self.convs is None else self.convs(latents)
        if self.layers is not None:
            x = self.layers(x if self.convs is None else self.activation(x))
        return x.transpose(0, 1)

    def forward(self, latents: Tensor, task: Tensor) -> Tensor:
        outputs, weights = self.outputs(latents), F.embedding(task, self.weights)[:, None]
        mixed = orthonormal_mixture(outputs, weights) if self.orthogonal else weights.to(outputs.dtype) @ outputs
        return torch.tanh(mixed[:, 0])
