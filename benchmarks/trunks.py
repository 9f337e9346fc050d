"""Multi-task networks and gradient aggregation: time of a learner's update beside its plain shape.

    python benchmarks/trunks.py update --threads 1
    python benchmarks/trunks.py gradients --rounds 9 --out results/moore/gradients.json
    python benchmarks/trunks.py update --device cuda --rounds 50

``update``: critics and actor of SAC with MOORE's MetaWorld networks at MT10's size (K = 4 experts of 3x400, 128 rows of
each of 10 tasks), random data. "loop" is the shape of the published code, written here: a Python loop over experts on a
K-fold copy of the batch, Gram-Schmidt by rows, a loop over the tasks' heads. The update around the networks is the same
for all. ``gradients``: one critic (3x400, 10 heads, 128 rows each), aggregation methods beside the plain mean.

Contestants take turns round by round; figures are medians over rounds, ratios medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.files import write_text
from mtrl.nn.aggregation import Aggregator, Method, task_parameters
from mtrl.nn.heads import TaskMLP
from mtrl.nn.linear import Route, matmul
from mtrl.nn.losses import squashed_sample
from mtrl.nn.trunk import TrunkConfig, make_trunk

TASKS, ROWS, OBS, ACTION, EXPERTS, WIDTHS = 10, 128, 39, 4, 4, (400, 400, 400)


DEVICE = torch.device("cpu")


class Net(nn.Module):
    """A trunk of mtrl and a head per task."""

    def __init__(self, kind: str, width: int, out: int, **fields: Any) -> None:
        super().__init__()
        self.trunk: Any = make_trunk(TrunkConfig(kind=kind, widths=WIDTHS, **fields), width, TASKS)  # type: ignore[arg-type]
        self.head = TaskMLP(TASKS, (self.trunk.out, out))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.head(self.trunk(x, task), task).float()


class Loop(nn.Module):
    """MOORE as its published code is built: lists of experts and heads, Gram-Schmidt step by step."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()

        def expert() -> nn.Module:
            a, b, c = WIDTHS
            return nn.Sequential(nn.Linear(width, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))

        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        self.encoder = nn.Linear(TASKS, EXPERTS, bias=False)
        self.heads = nn.ModuleList(nn.Linear(WIDTHS[-1], out) for _ in range(TASKS))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        copies = x[None].repeat(EXPERTS, 1, 1)
        outputs = torch.stack([expert(rows) for expert, rows in zip(self.experts, copies, strict=True)], 1)
        basis = F.normalize(outputs[:, :1], dim=2)
        for k in range(1, EXPERTS):
            rest = outputs[:, k : k + 1]
            rest = rest - (rest @ basis.mT) @ basis
            basis = torch.cat((basis, rest / rest.norm(dim=2, keepdim=True)), 1)
        weights = self.encoder(F.one_hot(task, TASKS).float())
        features = torch.tanh((weights[:, None] @ basis)[:, 0])
        out = [head(features[task == t]) for t, head in enumerate(self.heads)]
        return torch.cat(out).float()  # rows come sorted by task


class Update:
    """SAC's critic and actor steps on one fixed batch."""

    def __init__(self, make: Callable[[int, int], nn.Module], route: Route) -> None:
        torch.manual_seed(0)
        self.route: Route = route
        self.actor = make(OBS, 2 * ACTION)
        self.critics = nn.ModuleList(make(OBS + ACTION, 1) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.optimizers = [torch.optim.Adam(net.parameters(), 3e-4, fused=True) for net in (self.actor, self.critics)]
        n = TASKS * ROWS
        self.task = torch.arange(TASKS).repeat_interleave(ROWS)
        self.obs, self.next, self.reward = torch.randn(n, OBS), torch.randn(n, OBS), torch.rand(n)
        self.action = torch.rand(n, ACTION) * 2 - 1

    def _act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(obs, self.task).chunk(2, 1)
        return squashed_sample(mean, log_std.clamp(-10, 2), torch.randn_like(mean))

    def _values(self, nets: nn.ModuleList, obs: Tensor, action: Tensor) -> list[Tensor]:
        joined = torch.cat((obs, action), 1)
        return [net(joined, self.task)[:, 0] for net in nets]

    def __call__(self) -> None:
        with matmul(self.route, DEVICE):
            with torch.no_grad():
                action, log_prob = self._act(self.next)
                target = self.reward + 0.99 * (torch.minimum(*self._values(self.targets, self.next, action)) - log_prob)
            loss = sum((value - target).square().mean() for value in self._values(self.critics, self.obs, self.action))
            self._descend(1, loss)  # type: ignore[arg-type]
        self.critics.requires_grad_(False)
        with matmul(self.route, DEVICE):
            action, log_prob = self._act(self.obs)
            self._descend(0, (log_prob - torch.minimum(*self._values(self.critics, self.obs, action))).mean())
        self.critics.requires_grad_(True)
        torch._foreach_lerp_(list(self.targets.parameters()), list(self.critics.parameters()), 0.005)

    def _descend(self, which: int, loss: Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()


def updates(compiled: bool) -> dict[str, Callable[[], Any]]:
    """Contestants of ``update``; the first is what the others are measured against."""

    def ours(kind: str, **fields: Any) -> Callable[[int, int], nn.Module]:
        return lambda width, out: Net(kind, width, out, **fields)

    found: dict[str, Callable[[], Any]] = {
        "loop": Update(Loop, "default"),
        "moore": Update(ours("moore", experts=EXPERTS), "default"),
        "moe": Update(ours("moe", experts=EXPERTS), "default"),
        "loop, onednn": Update(Loop, "onednn"),
        "moore, onednn": Update(ours("moore", experts=EXPERTS), "onednn"),
        "moe, onednn": Update(ours("moe", experts=EXPERTS), "onednn"),
        "loop, bf16": Update(Loop, "bf16"),
        "moore, bf16": Update(ours("moore", experts=EXPERTS), "bf16"),
        "multi_head": Update(ours("multi_head"), "default"),
    }
    if compiled:
        for route in ("default", "onednn"):
            found[f"moore, compiled, {route}"] = Update(
                lambda width, out: torch.compile(Net("moore", width, out, experts=EXPERTS)),  # type: ignore[return-value]
                route,
            )
    return found


def gradients() -> dict[str, Callable[[], Any]]:
    """Contestants of ``gradients``: forward and backward of one critic, without the optimiser's step."""
    torch.manual_seed(0)
    net = Net("multi_head", OBS + ACTION, 1)
    task = torch.arange(TASKS).repeat_interleave(ROWS)
    x, target = torch.randn(TASKS * ROWS, OBS + ACTION), torch.randn(TASKS * ROWS, 1)
    slices = [slice(k * ROWS, (k + 1) * ROWS) for k in range(TASKS)]

    def plain() -> None:
        net.zero_grad()
        (net(x, task) - target).square().mean().backward()

    def sliced(aggregator: Aggregator) -> Callable[[], Any]:
        return lambda: aggregator.backward(
            [(net(x[rows], task[rows]) - target[rows]).square().mean() for rows in slices], net
        )

    def torchjd() -> None:
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        net.zero_grad()
        features = net.trunk(x, task)
        losses = [(net.head(features[rows], task[rows]) - target[rows]).square().mean() for rows in slices]
        shared, _ = task_parameters(net)
        mtl_backward(losses, features=features)
        jac_to_grad(shared, UPGrad())

    found: dict[str, Callable[[], Any]] = {"plain": plain}
    found |= {method: sliced(Aggregator(method)) for method in get_args(Method)}
    found["torchjd mtl_backward upgrad"] = torchjd
    return found


def measure(contestants: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of each (median) and time relative to the first one (median of the rounds' ratios)."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                times[name].append((clock() - start) * 1e3)
    first = next(iter(times.values()))
    return {
        name: {
            "ms": round(statistics.median(own), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(own, first, strict=True)), 3),
        }
        for name, own in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("update", "gradients"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time: with one thread on a busy machine")
    parser.add_argument("--compile", action="store_true", help="update: also try torch.compile")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    global DEVICE
    DEVICE = torch.device(args.device)
    torch.set_default_device(DEVICE)
    contestants = updates(args.compile) if args.which == "update" else gradients()
    found = measure(contestants, args.rounds, time.process_time if args.cpu_time else time.perf_counter)
    for name, own in found.items():
        print(f"{name:<28} {own['ms']:>9.1f} ms   {own['ratio']:.2f} x {next(iter(found))}")
    if args.out:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        if DEVICE.type == "cuda":
            machine["gpu"] = torch.cuda.get_device_name()
        result = {
            "which": args.which,
            "threads": args.threads,
            "cpu_time": args.cpu_time,
            "rounds": args.rounds,
            **machine,
            "results": found,
        }
        write_text(args.out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
