"""Gradient aggregation: known answers, TorchJD's own results, degenerate gradients, exact Jacobians from slices."""

from __future__ import annotations

import builtins
import copy
from typing import Any, get_args

import pytest
import torch
from torch import nn

from mtrl.nn.aggregation import Aggregator, Method, task_jacobian, task_parameters
from mtrl.nn.continuous import SquashedPolicy
from mtrl.nn.heads import TaskMLP
from mtrl.nn.perception import PerceptionConfig
from mtrl.nn.trunk import TrunkConfig, make_trunk
from tests.ragged import ragged_spec

METHODS = get_args(Method)
jd = pytest.importorskip("torchjd.aggregation")


def weights(method: Any, jacobian: torch.Tensor) -> torch.Tensor:
    return Aggregator(method).weights(jacobian @ jacobian.T)


KNOWN = {
    "mean": (0.5, 0.5),
    "pcgrad": (1.0, 0.75),  # half of the published sum
    "cagrad": (0.75, 0.5),
    "mgda": (0.6, 0.4),
    "imtl_g": (0.5858, 0.4142),
    "aligned_mtl": (0.5528, 0.4146),
    "upgrad": (1.0, 0.75),
    "dual_proj": (0.5, 0.5),
    "fairgrad": (1.8478, 1.3066),
    "nash_mtl": (1.3066, 0.9239),  # the same, of length 1
}


@pytest.mark.parametrize("method", KNOWN)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_known_answers_at_any_scale(method: str, size: float) -> None:
    jacobian = size * torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    found = weights(method, jacobian)
    if method in ("fairgrad", "nash_mtl"):  # their result has a length of its own
        length = 2**0.5 if method == "fairgrad" else min(1.0, 2**0.5 * size) if size < 1 else 1.0
        direction = found @ jacobian
        if size >= 1 or method == "fairgrad":
            torch.testing.assert_close(direction.norm(), torch.tensor(length), rtol=1e-3, atol=0)
        found = found / found.sum() * sum(KNOWN[method])
    torch.testing.assert_close(found, torch.tensor(KNOWN[method]), rtol=2e-3, atol=1e-3)


REFERENCE: dict[str, Any] = {
    "mean": lambda k: jd.Mean(),
    "pcgrad": lambda k: jd.PCGrad(),
    "gradvac": lambda k: jd.GradVac(),
    "mgda": lambda k: jd.MGDA(),
    "imtl_g": lambda k: jd.IMTLG(),
    "aligned_mtl": lambda k: jd.AlignedMTL(),
    "upgrad": lambda k: jd.UPGrad(),
    "dual_proj": lambda k: jd.DualProj(),
    "fairgrad": lambda k: jd.FairGrad(alpha=1.0),
}


@pytest.mark.parametrize("method", REFERENCE)
def test_results_equal_torchjds_on_the_full_jacobian(method: Any) -> None:
    torch.manual_seed(1)
    jacobian = torch.randn(5, 40, dtype=torch.float64) + 0.1
    mine = Aggregator(method, seed=3)
    order = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(3)))
    found = mine.weights(jacobian @ jacobian.T) @ jacobian
    torch.manual_seed(order)  # the order of tasks that the aggregator drew
    expected = REFERENCE[method](5)(jacobian)
    if method in ("pcgrad", "gradvac"):
        expected = expected / 5
    tolerance = 2e-3 if method == "fairgrad" else 1e-5  # its solver is iterative
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_cagrad_minimises_its_objective() -> None:
    torch.manual_seed(0)
    jacobian = torch.randn(4, 6, dtype=torch.float64)
    g0 = jacobian.mean(0)
    found = weights("cagrad", jacobian) @ jacobian - g0
    torch.testing.assert_close(found.norm(), 0.5 * g0.norm())  # the step leaves the mean by exactly c |g_0|
    worst = (jacobian @ (g0 + found)).min()  # and no other step of that length helps the worst task more
    for _ in range(300):
        other = torch.randn(6, dtype=torch.float64)
        assert (jacobian @ (g0 + 0.5 * g0.norm() * other / other.norm())).min() <= worst + 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_agree_are_averaged_in_direction(method: Any) -> None:
    jacobian = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = weights(method, jacobian)
    torch.testing.assert_close(found / found.sum(), torch.full((3,), 1 / 3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_task_without_gradient_does_not_stop_the_others(method: Any) -> None:
    both = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    found = Aggregator(method).weights(
        torch.zeros(3, 3).index_put((torch.tensor([0, 0, 2, 2]), torch.tensor([0, 2, 0, 2])), (both @ both.T).flatten())
    )
    assert torch.isfinite(found).all()
    assert float(found[1]) == pytest.approx(1 / 3)
    direction = found[[0, 2]] @ both
    assert float(direction.norm()) > 0.1
    assert (both @ direction >= -1e-6).all() or method in ("mean", "imtl_g")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "jacobian",
    [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 2.0], [1.0, 2.0]], [[1e-3, 0.0], [0.0, 1e3]]],
    ids=["zero", "opposite", "equal", "sizes apart"],
)
def test_degenerate_gradients_give_finite_results(method: Any, jacobian: list[list[float]]) -> None:
    j = torch.tensor(jacobian)
    assert torch.isfinite(weights(method, j) @ j).all()


def test_a_small_step_raises_no_loss_where_the_mean_does() -> None:
    torch.manual_seed(0)
    raised = 0
    for _ in range(20):
        jacobian = torch.randn(3, 30, dtype=torch.float64) * torch.tensor([[1.0], [5.0], [0.2]], dtype=torch.float64)
        jacobian[0] -= 2 * jacobian[1] / 5
        for method in ("upgrad", "mgda", "dual_proj"):  # up to the projector's regularisation
            assert cosines(jacobian, weights(method, jacobian)).min() > -0.05
        raised += int(cosines(jacobian, torch.full((3,), 1 / 3, dtype=torch.float64)).min() < -0.05)
    assert raised > 10


def cosines(jacobian: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(jacobian, (weights @ jacobian)[None])


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        fields = {"balance": 0.0} if kind == "moe_topk" else {}  # whose gradient belongs to no task
        self.trunk = make_trunk(TrunkConfig(kind=kind, widths=(8,), **fields), 5, 3)  # type: ignore[arg-type]
        self.head = TaskMLP(3 if self.trunk.per_task else 1, (self.trunk.out, 2))

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x, task), task if self.trunk.per_task else task * 0)


def losses(net: Net, x: torch.Tensor, task: torch.Tensor) -> list[torch.Tensor]:
    return [net(x[task == k], task[task == k]).square().mean() for k in range(3)]


@pytest.mark.parametrize("kind", ["multi_head", "moore", "care", "paco", "shared", "soft_modules", "moe_topk"])
def test_slices_give_the_jacobian_of_full_backward_passes(kind: str) -> None:
    net = Net(kind).double()
    x, task = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    shared, own = task_parameters(net)
    names = {name for name, p in net.named_parameters() if any(p is q for q in own)}
    expected = {
        "multi_head": {"head.layers.0.weight", "head.layers.0.bias"},
        "moore": {"trunk.weights", "head.layers.0.weight", "head.layers.0.bias"},
        "care": {"trunk.context.embedding"},
        "paco": {"trunk.weights"},
        "shared": {"trunk.task.weight"},
        "moe_topk": {"trunk.task.weight", "head.layers.0.weight", "head.layers.0.bias"},
        "soft_modules": {"trunk.task.weight"},
    }
    assert names == expected[kind]
    jacobian = task_jacobian(losses(net, x, task), shared, own)
    means = {id(p): p.grad for p in own}
    joint = net(x, task).square().mean(1)
    for k in range(3):
        grads = torch.autograd.grad(joint[task == k].mean(), shared, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(shared, grads, strict=True)]
        torch.testing.assert_close(jacobian[k], torch.cat(flat))
    net.zero_grad()
    joint.mean().backward()
    for parameter in own:
        torch.testing.assert_close(means[id(parameter)], parameter.grad)


def test_what_a_group_with_one_task_has_for_itself_is_not_shared() -> None:
    torch.manual_seed(0)
    trunk = TrunkConfig(kind="shared", widths=(8,))
    policy = SquashedPolicy(ragged_spec(), PerceptionConfig(width=6, channels=(4,)), trunk, (-5.0, 2.0))
    own = {id(p) for p in task_parameters(policy)[1]}
    names = {name for name, p in policy.named_parameters() if id(p) in own}
    alone = {name for name, _ in policy.named_parameters() if ".eye." in f".{name}."}
    assert len(alone) == 6  # a convolution, the layer behind it and a head, with biases
    assert names == alone | {"trunk.task.weight"}


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_lie_in_memory_as_their_parameters_do(fused: bool) -> None:
    """Torch's fused Adam pairs numbers by position: the step on a channels-last weight must be the plain one."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 1))
    one[0].weight.data = one[0].weight.data.contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
    two = copy.deepcopy(one)
    x, y = torch.randn(2, 8, 3, 4, 4), torch.randn(2, 8, 1)
    optimizers = [torch.optim.Adam(net.parameters(), 0.01, fused=fused) for net in (one, two)]
    for _ in range(3):
        Aggregator("mean").backward([(one(a) - b).square().mean() for a, b in zip(x, y, strict=True)], one)
        two.zero_grad()
        (two(x.flatten(0, 1)) - y.flatten(0, 1)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)  # three steps of .01


@pytest.mark.parametrize("frozen", ["trunk.experts", "trunk", ""])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    net = Net("moore").double()
    x, task = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    still = {name for name, p in net.named_parameters() if name.startswith(frozen) and not name.startswith("head")}
    for name in still:
        net.get_parameter(name).requires_grad_(False)
    shared, own = task_parameters(net)
    assert not still & {name for name, p in net.named_parameters() if any(p is q for q in [*shared, *own])}
    Aggregator("mean").backward(losses(net, x, task), net)
    found = {name: p.grad for name, p in net.named_parameters()}
    assert {name for name, grad in found.items() if grad is None} == still
    net.zero_grad()
    net(x, task).square().mean().backward()
    for name in found.keys() - still:
        torch.testing.assert_close(found[name], net.get_parameter(name).grad)


def test_under_autocast_gradients_and_their_products_stay_float32() -> None:
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [(net(rows).float() - k).square().mean() for k, rows in enumerate(x)]
        found = Aggregator("upgrad").backward(losses, net)
    jacobian = task_jacobian([(net(rows) - k).square().mean() for k, rows in enumerate(x)], list(net.parameters()))
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    assert found.gramian.dtype == torch.float32
    torch.testing.assert_close(found.gramian, jacobian @ jacobian.T, rtol=0.05, atol=0.05)


def test_the_mean_is_the_plain_backward_pass() -> None:
    net = Net("moore").double()
    x, task = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    seen = Aggregator("mean").backward(losses(net, x, task), net)
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    net(x, task).square().mean().backward()
    torch.testing.assert_close(found, [p.grad for p in net.parameters()])
    assert seen.gramian.shape == (3, 3)
    torch.testing.assert_close(seen.weights, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
def test_random_methods_leave_the_global_generator_alone_and_go_on_from_their_state(method: Any) -> None:
    torch.manual_seed(0)
    grams = [j @ j.T for j in torch.randn(6, 4, 9)]
    before = torch.random.get_rng_state()
    one, two = Aggregator(method, seed=1), Aggregator(method, seed=2)
    for gram in grams[:3]:
        one.weights(gram)
    two.load_state_dict(one.state_dict())
    for gram in grams[3:]:
        assert torch.equal(one.weights(gram), two.weights(gram))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_gradvacs_targets_stay_with_their_tasks() -> None:
    """Batches that lack a task, or where it is silent, neither clear nor change what was learnt of it."""
    torch.manual_seed(0)
    mine, jacobian = Aggregator("gradvac"), torch.rand(3, 9, dtype=torch.float64)
    for _ in range(5):
        mine.weights(jacobian @ jacobian.T)
    known = mine.targets.clone()
    assert (known.fill_diagonal_(1) > 0).all()  # all three agree
    two = jacobian[[0, 2]] * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # and now they do not
    reference = jd.GradVacWeighting()
    reference._phi_t, reference._state_key = known[[0, 2]][:, [0, 2]], (2, torch.float64)
    gram = two @ two.T
    silent = torch.zeros(3, 3, dtype=torch.float64)
    silent[torch.tensor([[0], [2]]), torch.tensor([0, 2])] = gram
    for look in (lambda: mine.weights(gram, [0, 2]), lambda: mine.weights(silent)[[0, 2]] * 3 / 2):
        expected = reference(gram * 2 / gram.trace()) / 2  # two tasks: no order to draw
        torch.testing.assert_close(look(), expected)
        assert torch.equal(mine.targets[[0, 2], [2, 0]], reference._phi_t[[0, 1], [1, 0]])
        assert torch.equal(mine.targets[:2, :2].fill_diagonal_(1), known[:2, :2])
    assert mine.targets[0, 2] < known[0, 2]
    mine.weights(torch.eye(2), [0, 4])
    assert mine.targets.shape == (5, 5)
    assert mine.targets[0, 1] == known[0, 1]


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_torchjd(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchjd"):
            raise ImportError("gone", name="torchjd")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torchjd)
    with pytest.raises(ImportError, match=r"upgrad needs torchjd: pip install 'mtrl-suite\[gradients\]'"):
        Aggregator("upgrad")
    Aggregator("mean")
