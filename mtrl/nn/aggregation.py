"""Gradient aggregation: one direction out of K tasks' gradients.

The Jacobian J [K, P] holds each task's gradient of the shared parameters, computed from the task's own rows: exact and
cheap as long as no layer couples rows of different tasks. A method sees the Gramian J J^T alone and answers with
weights; J^T w replaces the gradient. Parameters that belong to one task keep its gradient, divided by K as in the mean.

Methods are those of TorchJD (https://github.com/TorchJD/torchjd; the extra ``gradients``), which also names the papers.
Around them, four traps measured with TorchJD 0.18.0 are taken out: gradients much smaller than 1, for which some
methods quietly do nothing; tasks without gradient, which stop MGDA and CAGrad; draws from the global generator; and
GradVac's running targets, which belong to pairs of tasks, but start anew there when a batch lacks one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtrl.registry import MissingPackageError

Method = Literal[
    "mean",
    "pcgrad",
    "gradvac",
    "cagrad",
    "mgda",
    "imtl_g",
    "nash_mtl",
    "fairgrad",
    "aligned_mtl",
    "upgrad",
    "dual_proj",
]

PER_GROUP = ("groups", "heads", "action_values")
"""Modules that hold one module per group of tasks, by its name."""

SILENT = 1e-12
"""A task whose squared gradient is below this share of the mean one has no say: it is solved, masked or absent."""


class Aggregated(NamedTuple):
    """What an aggregation saw and chose: weights [K] and Gramian [K, K] of the tasks, in the order of the losses."""

    weights: Tensor
    gramian: Tensor


class Aggregator:
    """Chooses the weights of K gradients. Where gradients do not conflict, PCGrad, UPGrad and DualProj agree with
    ``mean`` (1/K); the others weight them as they would otherwise (GradVac lifts cosines to what they usually are).

    Args:
        method: PCGrad and GradVac return the mean, not the sum, of the corrected gradients. FairGrad has alpha = 1, its
            result length sqrt(K); Nash-MTL is the same direction limited to length 1. CAGrad's c is 0.5.
        seed: of the order in which PCGrad and GradVac visit the tasks.

    Raises:
        ImportError: the method needs a package that is missing; the message says which extra installs it.
    """

    def __init__(self, method: Method, *, seed: int = 0) -> None:
        self.method: Method = method
        self.generator = torch.Generator().manual_seed(seed)
        self.targets = torch.zeros(0, 0, dtype=torch.float64)  # GradVac's, of pairs of tasks
        self._weighting: Any = _weighting(method)
        self._jacobian: Tensor | None = None  # kept, since fresh pages for megabytes cost a tenth of a backward pass

    def weights(self, gramian: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Weights [K] of gradients with this Gramian [K, K], in its dtype; computed in float64 on the CPU.

        ``tasks``: whose they are; None: 0 to K - 1.
        """
        gram = gramian.detach().double().cpu()
        k = len(gram)
        found = torch.full((k,), 1 / k, dtype=torch.float64)
        square = gram.diagonal()
        heard = square > SILENT * square.mean()
        if heard.any():
            own = gram[heard][:, heard]
            scale = own.trace() / len(own)
            seed = int(torch.randint(2**31, (1,), generator=self.generator))
            with torch.random.fork_rng(devices=[]), self._targeted(torch.arange(k) if tasks is None else tasks, heard):
                torch.manual_seed(seed)
                chosen = self._weighting(own / scale)
            found[heard] = self._length(chosen, own, scale, k)
        return found.to(gramian)

    @contextmanager
    def _targeted(self, tasks: Sequence[int] | Tensor, heard: Tensor) -> Iterator[None]:
        """While GradVac's weighting holds the targets of the tasks that are heard."""
        if self.method != "gradvac":
            yield
            return
        own = torch.as_tensor(tasks)[heard]
        missing = int(own.max()) + 1 - len(self.targets)
        if missing > 0:
            self.targets = nn.functional.pad(self.targets, (0, missing, 0, missing))
        mine = own[:, None], own
        self._weighting._phi_t, self._weighting._state_key = self.targets[mine], (len(own), self.targets.dtype)
        yield
        self.targets[mine] = self._weighting._phi_t

    def _length(self, weights: Tensor, gram: Tensor, scale: Tensor, k: int) -> Tensor:
        """Undo what the rescaled Gramian changed; make sums means over all k tasks."""
        if self.method == "fairgrad":
            return weights / scale.sqrt()
        if self.method == "nash_mtl":
            weights = weights / scale.sqrt()
            return weights / (weights @ gram @ weights).clamp(min=1e-24).sqrt().clamp(min=1.0)
        return weights / k if self.method in ("pcgrad", "gradvac") else weights * len(weights) / k

    def backward(self, losses: Sequence[Tensor], net: nn.Module, tasks: Sequence[int] | None = None) -> Aggregated:
        """Set ``.grad`` of all parameters of ``net`` from the tasks' losses; clip and step afterwards.

        Args:
            losses: mean loss of each task that is present, from a forward pass of its own rows (a common one is as
                right, but costs a backward pass over all rows for each task).
            net: see ``task_parameters`` for how its parameters are told apart.
            tasks: which ones these are; None: 0 to K - 1.
        """
        shared, own = task_parameters(net)
        first, kept = losses[0], self._jacobian
        size = len(losses), sum(p.numel() for p in shared)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (size, first.dtype, first.device):
            kept = self._jacobian = first.new_empty(size)
        jacobian = task_jacobian(losses, shared, own, out=kept)
        with torch.autocast(jacobian.device.type, enabled=False):  # angles between gradients are no matter for bfloat16
            gramian = jacobian @ jacobian.T
            weights = self.weights(gramian, tasks)
            parts = (weights @ jacobian).split([p.numel() for p in shared])
        for parameter, part in zip(shared, parts, strict=True):
            # In the parameter's memory layout: torch's fused Adam pairs a channels-last weight's numbers with those of
            # a contiguous gradient by position, silently wrong (seen with torch 2.13).
            grad = part.view_as(parameter)
            parameter.grad = grad if parameter.is_contiguous() else torch.empty_like(parameter).copy_(grad)
        return Aggregated(weights, gramian)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "targets": self.targets.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.targets = state["targets"].clone()


def task_parameters(net: nn.Module, *, by_group: bool = False) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that all tasks share, and those of which every task has its own (heads, task weights, embeddings).

    Perception and heads of a group with one task (``lone``) are that task's own, unless they are asked for
    ``by_group``: another run's task may take their place. Frozen ones are neither.
    """
    per_task = any(getattr(module, "per_task", False) for module in net.modules())
    lone = {group for module in net.modules() for group in getattr(module, "lone", ())}
    shared, own = [], []
    for name, parameter in net.named_parameters():
        parts = name.split(".")
        if not parameter.requires_grad:
            continue
        if "trunk" in parts:
            # Of a mixture, of PaCo; of a task's context; of a layer on the task's one-hot, which is an embedding.
            single = parts[-1] in ("weights", "embedding") or parts[-2:] == ["task", "weight"]
        else:
            single = per_task and "perception" not in parts and "memory" not in parts
            if not by_group:
                single |= any(a in PER_GROUP and b in lone for a, b in itertools.pairwise(parts))
        (own if single else shared).append(parameter)
    return shared, own


def task_jacobian(
    losses: Sequence[Tensor],
    shared: Sequence[Tensor],
    own: Sequence[Tensor] = (),
    *,
    retain_graph: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Gradients [K, P] of the losses for the flattened ``shared``; ``own`` get the mean gradient as their ``.grad``.

    ``out`` [K, P]: where to write them.
    """
    sizes = [p.numel() for p in shared]
    jacobian = losses[0].new_empty(len(losses), sum(sizes)) if out is None else out
    for parameter in own:
        parameter.grad = None
    for row, loss in zip(jacobian, losses, strict=True):
        keep = retain_graph or loss is not losses[-1]  # losses may share a graph
        grads = torch.autograd.grad(loss, [*shared, *own], allow_unused=True, retain_graph=keep)
        for part, grad in zip(row.split(sizes), grads, strict=False):
            if grad is None:
                part.zero_()
            else:
                part.copy_(grad.flatten())
        for parameter, grad in zip(own, grads[len(shared) :], strict=True):
            if grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter).copy_(grad).div_(len(losses))
            else:
                parameter.grad.add_(grad, alpha=1 / len(losses))
    for parameter in own:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return jacobian


def _weighting(method: Method) -> Callable[[Tensor], Tensor]:
    """The function from a Gramian of mean diagonal 1 to weights."""
    if method == "mean":
        return lambda gram: torch.full((len(gram),), 1 / len(gram), dtype=gram.dtype)
    try:
        if method == "cagrad":
            return _cagrad()
        from torchjd import aggregation as jd

        return {
            "pcgrad": jd.PCGradWeighting,
            "gradvac": jd.GradVacWeighting,
            "mgda": jd.MGDAWeighting,
            "imtl_g": jd.IMTLGWeighting,
            "nash_mtl": lambda: jd.FairGradWeighting(alpha=1.0),  # the same equation, without Nash-MTL's solver
            "fairgrad": lambda: jd.FairGradWeighting(alpha=1.0),
            "aligned_mtl": jd.AlignedMTLWeighting,
            "upgrad": jd.UPGradWeighting,
            "dual_proj": jd.DualProjWeighting,
        }[method]()
    except ImportError as error:
        what = f"{method} needs {error.name or error}: pip install 'mtrl-suite[gradients]'"
        raise MissingPackageError(what, name=error.name) from error


def _cagrad(c: float = 0.5) -> Callable[[Tensor], Tensor]:
    """CAGrad (Liu et al. 2021, https://arxiv.org/abs/2110.14048), solved with SciPy as in the authors' code.

    The least <g_w, g_0> + c |g_0| |g_w| over the simplex; the result is g_0 + c |g_0| g_w / |g_w|.
    """
    from scipy.optimize import minimize

    def weights(gram: Tensor) -> Tensor:
        k = len(gram)
        m, mean = gram.numpy(), np.full(k, 1 / k)
        radius = c * np.sqrt(max(mean @ m @ mean, 0.0))

        def norm(w: np.ndarray) -> float:
            return float(np.sqrt(max(w @ m @ w, 1e-16)))

        best = minimize(
            lambda w: w @ m @ mean + radius * norm(w),
            mean,
            jac=lambda w: m @ mean + radius * (m @ w) / norm(w),
            method="SLSQP",
            bounds=[(0, 1)] * k,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(k)},
            options={"ftol": 1e-12, "maxiter": 200},
        ).x
        # Where |g_w| vanishes, tasks are in balance (Pareto-stationary): nothing to add to the mean.
        return torch.from_numpy(mean + (radius / norm(best) * best if norm(best) > 1e-6 else 0.0))

    return weights
