"""One gradient step on the losses of many tasks: plain, with balanced losses, or with aggregated gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from mtrl.nn.aggregation import Aggregator, Method
from mtrl.nn.balancers import BalancerName, make_balancer


class Parted(Protocol):
    """A batch of n rows that knows their tasks [n] int64 and can be taken apart by task.

    ``weight`` [n] sums to 1 and gives every task an equal share; None: all rows count alike, and do so by themselves.
    ``parts()``: batches by task, of which only the task's own rows have weight.
    """

    @property
    def task(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor | None: ...
    def parts(self) -> Mapping[int, Self]: ...


class Descent:
    """Steps an optimiser on a loss per row. Every task that is present counts alike.

    Args:
        name: of the loss, for messages.
        net: its parameters are the optimiser's.
        optimizer: steps after the gradient was found finite and clipped.
        tasks: their names.
        clip: largest gradient norm, of the final direction; None: any.
        gradients: how the tasks' gradients become one; other than ``mean`` takes a forward pass per task.
        balance: how the tasks' losses become one (positive losses only), or None.
        seed: see ``Aggregator``.

    Raises:
        ValueError: gradients and losses are both to be changed.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        tasks: Sequence[str],
        *,
        clip: float | None = None,
        gradients: Method = "mean",
        balance: BalancerName | None = None,
        seed: int = 0,
    ) -> None:
        if gradients != "mean" and balance is not None:
            raise ValueError(f"{name}: gradients={gradients} and balance={balance} exclude each other; choose one")
        self.name, self.net, self.optimizer, self.tasks, self.clip = name, net, optimizer, tasks, clip
        self.stop: Tensor | None = None  # see ``unchecked``
        self.aggregator = Aggregator(gradients, seed=seed) if gradients != "mean" else None
        self.balancer = None
        if balance is not None:
            self.balancer = make_balancer(balance, len(tasks), next(net.parameters()).device)

    def __call__(self, loss: Callable[[Any], Tensor], rows: Parted, update: int) -> Tensor:
        """One step: ``backward``, then ``step``."""
        mean = self.backward(loss, rows, update)
        self.step(loss, rows)
        return mean

    def backward(self, loss: Callable[[Any], Tensor], rows: Parted, update: int) -> Tensor:
        """Find the direction, clipped.

        Args:
            loss: rows -> losses [n].
            rows: of the tasks.
            update: its number, for messages.

        Returns:
            The mean loss, detached.

        Raises:
            FloatingPointError: loss or gradient is not finite; names the tasks or parameters. Nothing was stepped.
        """
        self.optimizer.zero_grad()
        if self.aggregator is not None:
            parts = rows.parts()
            found = [loss(part) for part in parts.values()]
            means = [_mean(each, part) for each, part in zip(found, parts.values(), strict=True)]
            self.aggregator.backward(means, self.net, [*parts])
            mean, losses = torch.stack(means).detach().mean(), torch.cat(found)
            task = [part.task for part in parts.values()]
        else:
            losses, task = loss(rows), [rows.task]
            mean = _mean(losses, rows)
            (mean if self.balancer is None else self.balancer(*self._per_task(losses, rows))).backward()
            mean = mean.detach()
        parameters = list(self.net.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        finite = torch.isfinite(mean + norm)
        if self.stop is not None:
            self.stop.copy_(torch.maximum(self.stop, (~finite).float()))
            mean = mean.where(self.stop == 0, torch.nan)
        elif not finite:
            raise FloatingPointError(f"{self._explain(losses, torch.cat(task))} at update {update}")
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm, foreach=True)
        return mean

    def step(self, loss: Callable[[Any], Tensor], rows: Parted) -> None:
        """Go there. ``loss`` and ``rows`` as before, for balancers that look at what came of it."""
        self.optimizer.found_inf = self.stop  # type: ignore[attr-defined] # for fused optimisers, as GradScaler's
        self.optimizer.step()
        torch.clear_autocast_cache()  # it holds the weights of before the step
        if self.balancer is not None:
            after = None
            if self.balancer.needs_after:
                with torch.no_grad():
                    after = self._per_task(loss(rows), rows)[0]
            self.balancer.step(after)

    def _per_task(self, losses: Tensor, rows: Parted) -> tuple[Tensor, Tensor]:
        """Mean loss of each task [T], 0 of those that are absent, and which are present [T]."""
        weight = torch.ones_like(losses) if rows.weight is None else rows.weight
        none = losses.new_zeros(len(self.tasks))
        share = none.index_add(0, rows.task, weight)
        return none.index_add(0, rows.task, losses * weight) / share.masked_fill(share == 0, 1.0), share > 0

    def _explain(self, losses: Tensor, task: Tensor) -> str:
        bad = sorted({self.tasks[int(t)] for t in task[~torch.isfinite(losses)].tolist()})
        if bad:
            return f"the {self.name} loss of {', '.join(bad)} is not finite"
        named = self.net.named_parameters()
        grads = [key for key, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        return f"the {self.name} gradient of {', '.join(grads) or 'all parameters together'} is not finite"

    def state_dict(self) -> dict[str, Any]:
        """Of what chooses the direction; net and optimiser are their owner's."""
        chooser = self.aggregator or self.balancer
        return {} if chooser is None else chooser.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        chooser = self.aggregator or self.balancer
        if chooser is not None:
            chooser.load_state_dict(state)


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Losses that pass through a network without a gradient of its weights."""
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def unchecked(descents: Sequence[Descent], device: torch.device) -> Iterator[Tensor]:
    """Steps in which the host looks at no number, for a CUDA graph; all optimisers are fused.

    Yields:
        A number [] float32 that a loss or gradient which is not finite sets to 1. From then on no descent steps, and
        the losses that they return are NaN. It must live as long as the graph.
    """
    stop = torch.zeros((), device=device)
    groups = [group for descent in descents for group in descent.optimizer.param_groups]
    try:
        for descent in descents:
            descent.stop = stop
        for group in groups:
            group["capturable"] = device.type == "cuda"
        yield stop
    finally:
        for descent in descents:
            descent.stop = descent.optimizer.found_inf = None  # type: ignore[attr-defined]
        for group in groups:
            group["capturable"] = False


def _mean(losses: Tensor, rows: Parted) -> Tensor:
    return losses.mean() if rows.weight is None else (losses * rows.weight).sum()
