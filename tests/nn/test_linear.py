from __future__ import annotations

import pytest
import torch
from torch import nn

from mtrl.nn.linear import Route, matmul, probe, roomy


def gradients(route: Route) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(43, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(128, 43, requires_grad=True)
    with matmul(route):
        out = net(x).float()
        out.square().mean().backward()
    found = [p.grad for p in net.parameters()]
    return [out.detach(), x.grad, *found]  # type: ignore[list-item]


def test_routes_agree_to_their_accuracy() -> None:
    exact = gradients("default")
    route = probe().route
    for one, two in zip(exact, gradients(route), strict=True):
        scale = float(one.abs().max())
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * scale)
    rough = gradients("bf16")[0]
    assert 1e-4 < float((rough - exact[0]).abs().max() / exact[0].abs().max()) < 0.05


def test_probe_chooses_by_accuracy_and_always_the_same() -> None:
    found = [probe(repeats=1) for _ in range(3)]
    assert len({one.route for one in found}) == 1
    assert len({one.error_onednn for one in found}) == 1
    assert found[0].error_default < 1e-6
    assert (found[0].route == "onednn") == (found[0].error_onednn < 4 * found[0].error_default + 1e-7)


def test_room_comes_in_eight_sizes_per_octave() -> None:
    assert [roomy(n) for n in (0, 1, 8, 9, 64, 65, 128, 129, 144, 1000, 1024, 1025)] == (
        [0, 8, 8, 16, 64, 72, 128, 144, 144, 1024, 1024, 1152]
    )
    assert len({roomy(n) for n in range(513, 1025)}) == 8
    assert all(n <= roomy(n) < n + max(8, n / 8) for n in range(5000))


def test_probe_leaves_the_device_it_cannot_judge_alone() -> None:
    assert probe("cuda").route == "default"


def test_setting_is_put_back_even_after_an_error() -> None:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    with matmul("onednn"):
        assert setting.fp32_precision == "bf16"
    assert setting.fp32_precision == before
    with pytest.raises(RuntimeError, match="inside"), matmul("onednn"):
        raise RuntimeError("inside")
    assert setting.fp32_precision == before
