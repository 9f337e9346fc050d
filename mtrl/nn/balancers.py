"""Loss balancing: K tasks' losses to one loss, with weights that follow the losses. One backward pass.

All of these weight by logarithms or ratios of losses, so losses must be positive: they are for critics, not for actors.
In reinforcement learning a loss that falls is no progress, and its size follows the reward's: bring the tasks to one
scale first (``mtrl.nn.normalizers``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mtrl.nn.optim import load_optimizer_state, optimizer_state

EPS = 1e-8


class Balancer(Protocol):
    """``loss = balancer(losses)``, backward and optimiser step, then ``balancer.step(...)``.

    ``present`` [K] bool: tasks that the batch holds (None: all); the others neither count nor learn a weight.

    ``needs_after`` says whether ``step`` wants the losses [K] of the same batch, computed anew behind the optimiser's
    step; others take None.
    """

    needs_after: bool

    def __call__(self, losses: Tensor, present: Tensor | None = None) -> Tensor: ...
    def step(self, after: Tensor | None = None) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, absent: Tensor | None) -> None:
    """Step, but leave absent tasks' entries where they were, which Adam's momentum and weight decay would move."""
    before = parameter.clone()
    optimizer.step()
    if absent is not None:
        parameter.copy_(before.where(absent, parameter))


class Uncertainty:
    """Weights by learned noise (Kendall et al. 2018, https://arxiv.org/abs/1705.07115): sum_k e^-s_k L_k / 2 + s_k / 2.

    The best s_k is log L_k, which weights a task by 1 / (2 L_k). The s_k start at 0 and follow their own Adam; they are
    on the losses' ``device``.
    """

    needs_after = False

    def __init__(self, num_tasks: int, *, lr: float = 0.025, device: torch.device | str = "cpu") -> None:
        self.log_variance = nn.Parameter(torch.zeros(num_tasks, device=device))
        self.optimizer = torch.optim.Adam([self.log_variance], lr)
        self._absent: Tensor | None = None

    def __call__(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Losses [K] -> a scalar; its backward pass also reaches the s_k."""
        self._absent = None if present is None else ~present
        terms = torch.exp(-self.log_variance) * losses + self.log_variance
        return (terms if present is None else terms[present]).sum() / 2

    def step(self, after: Tensor | None = None) -> None:
        _step(self.optimizer, self.log_variance, self._absent)
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"log_variance": self.log_variance.detach(), "optimizer": optimizer_state(self.optimizer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.log_variance.copy_(state["log_variance"])
        load_optimizer_state(self.optimizer, state["optimizer"])


class IGB:
    """Improvable-gap balancing, version 1 (Dai et al. 2023, https://proceedings.mlr.press/v216/dai23a.html).

    sum_k lambda_k log L_k with lambda = K softmax(L / L_base): what is still far from its base counts more. A task's
    base is its mean loss in the second period; until then lambda is 1.

    Args:
        num_tasks: K.
        period: calls that make up a period (an epoch in the paper, YanqiDai/IGB4MTL).
    """

    needs_after = False

    def __init__(self, num_tasks: int, *, period: int = 1000) -> None:
        self.period = period
        self.calls = 0
        self.total, self.count = (torch.zeros(num_tasks, dtype=torch.float64) for _ in range(2))

    def __call__(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Losses [K] -> a scalar."""
        seen = losses.detach().double().cpu()
        here = torch.ones(len(seen), dtype=torch.bool) if present is None else present.cpu()
        self.calls += 1
        if self.period < self.calls <= 2 * self.period:
            self.total, self.count = self.total + seen * here, self.count + here
        weights = here.double()
        if self.calls > 2 * self.period:
            # A task that was absent from the second period has no base: it counts as one that stands where it stood.
            base = torch.where(self.count > 0, self.total / self.count.clamp(min=1), seen).clamp(min=EPS)
            weights = here.sum() * torch.softmax((seen / base).masked_fill(~here, -torch.inf), 0)
        return (weights.to(losses) * torch.log(losses + EPS)).sum()

    def step(self, after: Tensor | None = None) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "total": self.total.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = int(state["calls"])
        self.total, self.count = state["total"].clone(), state["count"].clone()


class FAMO:
    """Fast adaptive multitask optimisation (Liu et al. 2023, https://arxiv.org/abs/2306.03792).

    Losses c sum_k z_k log L_k with z = softmax(xi) and a constant c = 1 / sum_k z_k / L_k; afterwards xi moves so that
    tasks whose log-loss fell least gain weight. Costs a second forward pass.

    Args:
        num_tasks: K.
        lr: Adam's, of xi (paper: 0.025).
        decay: weight decay of xi (paper: 1e-3; the authors' RL runs: 0.01).
        device: of the losses.
    """

    needs_after = True

    def __init__(
        self, num_tasks: int, *, lr: float = 0.025, decay: float = 1e-3, device: torch.device | str = "cpu"
    ) -> None:
        self.logits = nn.Parameter(torch.zeros(num_tasks, device=device))
        self.optimizer = torch.optim.Adam([self.logits], lr, weight_decay=decay)
        self._before: Tensor | None = None
        self._absent: Tensor = torch.zeros(num_tasks, dtype=torch.bool, device=device)

    def __call__(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Losses [K] -> a scalar whose gradient is a weighted mean of theirs."""
        self._absent = torch.zeros_like(losses, dtype=torch.bool) if present is None else ~present
        weights = torch.softmax(self.logits.detach().masked_fill(self._absent, -torch.inf), 0)
        self._before = losses.detach()
        scale = 1 / (weights / (self._before + EPS)).sum()
        return scale * (weights * torch.log(losses + EPS)).sum()

    def step(self, after: Tensor | None = None) -> None:
        """Move the weights by what the optimiser's step achieved.

        Raises:
            RuntimeError: there was no loss before, or there is none after.
        """
        if self._before is None or after is None:
            raise RuntimeError("FAMO compares a batch's losses before and after a step: pass it the losses after")
        fall = torch.log(self._before + EPS) - torch.log(after.detach() + EPS)
        self._before = None
        with torch.enable_grad():
            weights = torch.softmax(self.logits.masked_fill(self._absent, -torch.inf), 0)
            gradient = torch.autograd.grad(weights, self.logits, grad_outputs=fall)
        self.logits.grad = gradient[0]
        _step(self.optimizer, self.logits, self._absent)

    def state_dict(self) -> dict[str, Any]:
        return {"logits": self.logits.detach(), "optimizer": optimizer_state(self.optimizer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        load_optimizer_state(self.optimizer, state["optimizer"])


BalancerName = Literal["uncertainty", "igb", "famo"]


def make_balancer(name: BalancerName, num_tasks: int, device: torch.device | str = "cpu") -> Balancer:
    """The balancer of this name with its published settings, for losses on ``device``."""
    if name == "igb":
        return IGB(num_tasks)
    return {"uncertainty": Uncertainty, "famo": FAMO}[name](num_tasks, device=device)
