"""Which library multiplies fp32 matrices: torch's default (MKL) or oneDNN.

On some CPUs oneDNN multiplies fp32 matrices up to twice as fast as MKL at the same accuracy. Torch sends matrix
products there when ``torch.backends.mkldnn.matmul.fp32_precision`` allows bf16; whether oneDNN then really rounds to
bf16 depends on the CPU. So the route is *probed*: it is taken only if the products keep fp32 accuracy. Accuracy alone
decides (speed is measured for the report), so that two runs on one machine cannot differ by a noisy clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Route = Literal["default", "onednn", "bf16"]
"""``default``: torch's own fp32. ``onednn``: fp32 accuracy through oneDNN. ``bf16``: autocast, an approximation."""


def roomy(count: int) -> int:
    """The least of eight sizes per octave, or of 0, 8, .. 64, that holds ``count`` rows.

    oneDNN writes code for every new shape of a product, which takes longer than a small product itself, and keeps that
    of some thousand shapes. Where the number of rows differs from call to call, a few spare ones spare that.
    """
    step = 1 << max(3, (count - 1).bit_length() - 4)
    return -(-count // step) * step


class Probe(NamedTuple):
    """What the probe saw: the route it chose, both routes' largest error relative to the sum of absolute products
    (fp32: about 1e-7, bf16: about 1e-3), and how many times faster oneDNN was."""

    route: Route
    error_default: float
    error_onednn: float
    speedup: float


@contextmanager
def matmul(route: Route, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the matrix products inside (forward and backward) along ``route``; the old setting comes back at the end.

    Open one context per loss: bf16's autocast keeps its copies of the weights until the context ends.
    """
    if route == "bf16":
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            yield
        return
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # made at run time, unknown to type checkers
    before = setting.fp32_precision
    setting.fp32_precision = "ieee" if route == "default" else "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def probe(device: torch.device | str = "cpu", *, repeats: int = 5) -> Probe:
    """Compare both fp32 routes on the three products of a linear layer (256 x 400 x 400); takes about 50 ms.

    Deterministic in its choice: ``onednn`` on a CPU whose oneDNN keeps fp32 accuracy, ``default`` everywhere else.
    """
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return Probe("default", 0.0, 0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(n, 400, generator=generator) for n in (256, 400, 256))
    pairs = ((x, weight.t()), (grad, weight), (grad.t(), x))
    error_default, time_default = _measure(pairs, "default", repeats)
    error_onednn, time_onednn = _measure(pairs, "onednn", repeats)
    accurate = error_onednn <= 4 * error_default + 1e-7
    return Probe("onednn" if accurate else "default", error_default, error_onednn, time_default / time_onednn)


def cautions(agent: object) -> Iterator[str]:
    """What a run says of the ``route`` of its agent at the start: that this CPU is slow on it."""
    place = torch.device(getattr(agent, "device", "cpu")).type
    slow = place == "cpu" and torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2")
    if slow and getattr(agent, "route", None) == "bf16":
        yield "agent.matmul=bf16: this CPU has no bf16, its products take many times as long as those of auto"


def _measure(pairs: tuple[tuple[Tensor, Tensor], ...], route: Route, repeats: int) -> tuple[float, float]:
    """Largest relative error and shortest time in seconds of the products ``a @ b`` along ``route``."""
    with matmul(route):
        errors = [
            float(((a @ b) - a.double() @ b.double()).abs().max() / (a.double().abs() @ b.double().abs()).max())
            for a, b in pairs
        ]
        return max(errors), min(_seconds(lambda: [a @ b for a, b in pairs]) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
