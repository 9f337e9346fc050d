"""What a multi-task network does inside: use and likeness of experts, rank, dormant units, conflicting gradients.

All functions are pure and cheap; agents call ``inspect`` every so many updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn.aggregation import task_jacobian, task_parameters
from mtrl.nn.heads import TaskMLP
from mtrl.nn.patches import unfolded
from mtrl.nn.trunk.mixture import MixtureTrunk

DORMANT = 0.025
"""Units below this share of their layer's mean activation are dormant (MENTOR, and ReDo's smaller setting)."""


def expert_usage(weights: Tensor) -> Tensor:
    """Each expert's share of the task's weights, |w| / sum |w|: [T, K] -> [T, K], rows sum to 1 (0 for a zero row)."""
    size = weights.abs()
    return size / size.sum(1, keepdim=True).clamp(min=1e-12)


def task_similarity(weights: Tensor) -> Tensor:
    """Cosines [T, T] of the tasks' weights [T, K]: with orthonormal experts, the likeness of the tasks' features."""
    unit = F.normalize(weights, dim=1)
    return unit @ unit.T


def expert_cosine(outputs: Tensor) -> Tensor:
    """Mean over rows of the absolute cosine between the outputs [n, K, D] of each pair of experts: [K, K]."""
    unit = F.normalize(outputs, dim=2)
    return (unit @ unit.mT).abs().mean(0)


def residual_share(outputs: Tensor) -> Tensor:
    """Mean over rows of what Gram-Schmidt leaves of each expert, |r_k| / |u_k|: [n, K, D] -> [K], 1 for the first.

    Beyond the D-th nothing is left.

    Near 0, an expert repeats the ones before it, and its gradient through the basis explodes like the inverse.
    """
    unit = F.normalize(outputs.double(), dim=2)
    upper = torch.linalg.qr(unit.mT, mode="r").R
    share = upper.diagonal(dim1=1, dim2=2).abs().mean(0).to(outputs.dtype)
    return F.pad(share, (0, outputs.shape[1] - len(share)))


def effective_rank(features: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values of the features [n, D], a scalar in [1, min(n, D)].

    Roy & Vetterli 2007 (https://ieeexplore.ieee.org/document/7098875). 0 for features that are all zero.
    """
    x = features.double()  # also where autocast would multiply in bfloat16, in which rank one looks like rank 60
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if not bool(values.any()):
        return features.new_zeros(())
    share = values / values.sum()
    return torch.exp(-(share * share.clamp(min=1e-300).log()).sum()).to(features.dtype)


def dormant_units(activations: Tensor, threshold: float = DORMANT) -> Tensor:
    """Which units [D] have a mean |activation| of at most ``threshold`` times the layer's mean, from [n, D].

    ReDo (Sokar et al. 2023, https://arxiv.org/abs/2302.12902), on what the activation function returns. A layer that is
    all zero is all dormant.
    """
    score = activations.abs().mean(0)
    return score <= threshold * score.mean()


class Conflict(NamedTuple):
    """Scalars about K tasks' gradients: share of the pairs with negative inner product, mean cosine of the pairs, and
    the largest norm divided by the smallest one that is not zero."""

    negative: Tensor
    cosine: Tensor
    imbalance: Tensor


def gradient_conflict(gramian: Tensor) -> Conflict:
    """From the Gramian [K, K] of the tasks' gradients; tasks without gradient are left out."""
    square = gramian.diagonal()
    seen = square > 0
    norm = square[seen].sqrt()
    k = len(norm)
    if k < 2:
        return Conflict(gramian.new_zeros(()), gramian.new_zeros(()), gramian.new_ones(()))
    cosine = gramian[seen][:, seen] / (norm[:, None] * norm)
    pairs = cosine[tuple(torch.triu_indices(k, k, 1))]
    return Conflict((pairs < 0).to(gramian.dtype).mean(), pairs.mean(), norm.max() / norm.min())


def conflict_metrics(name: str, loss: Tensor, task: Tensor, net: nn.Module) -> dict[str, float]:
    """``diagnostics/<name>/gradient_*``: how much the tasks' gradients of the parameters that they share disagree.

    ``loss`` [n] with its graph, which stays usable, and ``task`` [n]. One backward pass per task: look now and then.
    Empty for a single task or if nothing is shared. The balancing loss of ``moe_topk`` is in each task's gradient.
    """
    losses = [loss[task == k].mean() for k in task.unique()]
    shared, _ = task_parameters(net)
    if len(losses) < 2 or not shared:
        return {}
    jacobian = task_jacobian(losses, shared, retain_graph=True)
    with torch.autocast(jacobian.device.type, enabled=False):
        found = gradient_conflict(jacobian @ jacobian.T)
    return {f"diagnostics/{name}/gradient_{key}": float(value) for key, value in found._asdict().items()}


def inspect(nets: Mapping[str, nn.Module], forward: Callable[[], object], tasks: Sequence[str]) -> dict[str, float]:
    """Run ``forward`` once without gradients and measure perception and trunk of each net that takes part.

    Returns:
        ``diagnostics/<net>/...``: ``dormant`` (of all units behind an activation layer), ``effective_rank`` of the
        trunk's features; of a mixture also ``expert_cosine`` (mean over pairs), ``expert_residual`` (the least one),
        and per task ``<task>_weight_norm`` and ``<task>_expert<k>``, the share that expert k has in its weights.
    """
    watches = {name: _Watch(net) for name, net in nets.items()}
    try:
        with torch.no_grad(), unfolded():
            forward()
    finally:
        for watch in watches.values():
            watch.close()
    found = {name: watch.metrics(tasks) for name, watch in watches.items()}
    return {f"diagnostics/{name}/{key}": value for name, own in found.items() for key, value in own.items()}


class _Watch:
    """Sees what the activation layers of perception and trunk, and the trunk itself, return in a forward pass."""

    def __init__(self, net: nn.Module) -> None:
        self.dormant: list[Tensor] = []
        self.rows: list[int] = []
        self.trunk: tuple[nn.Module, Tensor, Tensor] | None = None
        self.handles = []
        for name, module in net.named_modules():
            parts = name.split(".")
            if parts[-1] == "trunk":
                self.handles.append(module.register_forward_hook(self._features))
            elif isinstance(module, TaskMLP) and "trunk" in parts:
                self.handles.append(module.register_forward_pre_hook(self._serving))
            elif ("trunk" in parts or "perception" in parts) and isinstance(module, nn.ReLU | nn.Tanh):
                of_served = isinstance(net.get_submodule(".".join(parts[:-1])), TaskMLP)
                self.handles.append(module.register_forward_hook(self._served if of_served else self._activation))

    def _activation(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 4:  # channels are the units of a convolution
            output = output.permute(0, 2, 3, 1).flatten(0, 2)
        elif output.ndim == 3:  # [K, n, D]: every expert has its own
            output = output.transpose(0, 1).flatten(1)
        self.dormant.append(dormant_units(output.float()))

    def _serving(self, module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        self.rows = torch.bincount(inputs[1], minlength=int(module.num_tasks)).tolist()  # type: ignore[arg-type]

    def _served(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Of experts that serve rows of their own, each a slice [n_k, D] of the output; one that serves none sleeps."""
        size = [part.abs().sum(0) / max(1, len(part)) for part in output.float().split(self.rows)]
        self.dormant.append(dormant_units(torch.cat(size)[None]))

    def _features(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.trunk = module, inputs[0], output.float()

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def metrics(self, tasks: Sequence[str]) -> dict[str, float]:
        found = {"dormant": float(torch.cat(self.dormant).float().mean())} if self.dormant else {}
        if self.trunk is not None:
            module, latents, output = self.trunk
            found["effective_rank"] = float(effective_rank(output))
            if isinstance(module, MixtureTrunk):
                found |= _mixture(module, latents, tasks)
        return found


@torch.no_grad()
def _mixture(trunk: MixtureTrunk, latents: Tensor, tasks: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    outputs = trunk.outputs(latents).float()
    k = outputs.shape[1]
    if k > 1:
        pairs = expert_cosine(outputs)[tuple(torch.triu_indices(k, k, 1))]
        found = {"expert_cosine": float(pairs.mean()), "expert_residual": float(residual_share(outputs).min())}
    norms, shares = trunk.weights.norm(dim=1).tolist(), expert_usage(trunk.weights).tolist()
    for name, norm, row in zip(tasks, norms, shares, strict=True):
        found[f"{name}_weight_norm"] = norm
        found |= {f"{name}_expert{i}": share for i, share in enumerate(row)}
    return found
