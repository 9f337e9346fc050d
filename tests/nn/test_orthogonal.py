"""Orthonormal mixtures against textbook Gram-Schmidt in float64, and where Gram-Schmidt itself has no answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtrl.nn.orthogonal import orthonormal_basis, orthonormal_mixture

SHAPES = [(1, 5), (2, 1024), (3, 7), (4, 400), (5, 5), (6, 400)]


def gram_schmidt(outputs: Tensor) -> Tensor:
    """Classical, row by row, as in a textbook: [n, K, D]."""
    basis: list[Tensor] = []
    for k in range(outputs.shape[1]):
        rest = outputs[:, k]
        for q in basis:
            rest = rest - (outputs[:, k] * q).sum(1, keepdim=True) * q
        basis.append(rest / rest.norm(dim=1, keepdim=True))
    return torch.stack(basis, 1)


def draw(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, d, generator=torch.Generator().manual_seed(k * d), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("k", "d"), SHAPES)
def test_the_basis_is_orthonormal_and_spans_the_outputs(k: int, d: int) -> None:
    u = draw(50, k, d)
    q = orthonormal_basis(u)
    assert float((q @ q.mT - torch.eye(k)).abs().max()) < 2e-6
    torch.testing.assert_close(u @ q.mT @ q, u, rtol=0, atol=2e-5)  # projecting onto the span changes nothing
    coordinates = u @ q.mT
    assert float(coordinates.triu(1).abs().max()) < 1e-4  # u_k lies in the span of the first k, so this is U = L Q
    assert (coordinates.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize(("k", "d"), SHAPES)
def test_values_and_gradients_equal_gram_schmidt_in_float64(k: int, d: int) -> None:
    exact = draw(50, k, d, torch.float64).requires_grad_()
    mine = exact.detach().float().requires_grad_()
    pull = torch.randn(50, k, d, dtype=torch.float64)
    want, got = gram_schmidt(exact), orthonormal_basis(mine)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    (expected,) = torch.autograd.grad((want * pull).sum(), exact)
    (found,) = torch.autograd.grad((got * pull.float()).sum(), mine)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_gradient_is_that_of_the_function() -> None:
    u, w = draw(3, 4, 6, torch.float64).requires_grad_(), draw(3, 2, 4, torch.float64).requires_grad_()
    torch.autograd.gradcheck(orthonormal_mixture, (u, w), eps=1e-6, atol=1e-5)


def test_a_mixture_is_the_weighted_sum_of_the_basis() -> None:
    u, w = draw(20, 4, 30, torch.float64), draw(20, 3, 4, torch.float64)
    torch.testing.assert_close(orthonormal_mixture(u, w), w @ gram_schmidt(u), rtol=1e-7, atol=1e-7)


def test_norms_and_likeness_of_mixtures_depend_on_the_weights_alone() -> None:
    u, w = draw(20, 4, 30), draw(20, 3, 4)
    a = orthonormal_mixture(u, w)
    torch.testing.assert_close(a @ a.mT, w @ w.mT, rtol=1e-5, atol=1e-5)


def test_rescaling_an_expert_changes_nothing_and_its_gradient_is_orthogonal_to_it() -> None:
    u = draw(20, 4, 30).requires_grad_()
    scale = torch.tensor([3.0, 0.1, 1.0, 50.0])[:, None]
    torch.testing.assert_close(orthonormal_basis(u * scale), orthonormal_basis(u), rtol=0, atol=1e-5)
    orthonormal_mixture(u, draw(20, 1, 4)).square().sum().add(orthonormal_basis(u)[..., 0].sum()).backward()
    assert u.grad is not None
    assert float((u.grad * u.detach()).sum(2).abs().max()) < 1e-4


def test_the_order_of_the_experts_matters() -> None:
    u = draw(5, 3, 8)
    torch.testing.assert_close(orthonormal_basis(u)[:, 0], u[:, 0] / u[:, 0].norm(dim=1, keepdim=True))
    assert not torch.allclose(orthonormal_basis(u.flip(1)).flip(1), orthonormal_basis(u), atol=0.1)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3])
def test_nearly_parallel_experts_are_orthonormalised_where_one_pass_is_not_enough(angle: float) -> None:
    common, own = draw(50, 1, 400), draw(50, 4, 400)
    u = common + angle * own
    q = orthonormal_basis(u)
    error = float((q @ q.mT - torch.eye(4)).abs().max())
    assert error < 5e-5
    once = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(u @ u.mT).L, u, upper=False)
    if angle <= 1e-3:
        assert not float((once @ once.mT - torch.eye(4)).abs().max()) < 1e-2


def degenerate(name: str) -> Tensor:
    u = draw(8, 4, 20)
    if name == "duplicates":
        u[:, 2] = u[:, 0]
    elif name == "opposite":
        u[:, 1] = -2 * u[:, 0]
    elif name == "dependent":
        u[:, 3] = u[:, 0] + u[:, 1] - u[:, 2]
    elif name == "one zero":
        u[:, 1] = 0
    elif name == "first zero":
        u[:, 0] = 0
    elif name == "all zero":
        u[:] = 0
    elif name == "all equal":
        u[:] = u[:, :1].clone()
    elif name == "tiny":
        u *= 1e-20
    elif name == "huge":
        u *= 1e12
    elif name == "sizes apart":
        u *= torch.tensor([1e-3, 1e6, 1.0, 1e3])[:, None]
    return u


NAMES = ["duplicates", "opposite", "dependent", "one zero", "first zero", "all zero", "all equal"]
NAMES += ["tiny", "huge", "sizes apart"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_outputs_give_finite_mixtures_and_gradients(name: str, dtype: torch.dtype) -> None:
    u = degenerate(name).to(dtype).requires_grad_()
    w = draw(8, 1, 4, dtype).requires_grad_()
    mixed = orthonormal_mixture(u, w)
    assert torch.isfinite(mixed).all()
    assert float((mixed.norm(dim=2) - w.norm(dim=2)).detach().max()) < 1e-4  # never longer than the weights
    torch.tanh(mixed).sum().backward()
    assert u.grad is not None
    assert w.grad is not None
    assert torch.isfinite(u.grad).all()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize(("name", "idle"), [("duplicates", 2), ("dependent", 3), ("one zero", 1), ("first zero", 0)])
def test_an_expert_that_adds_no_direction_is_left_out_of_the_basis(name: str, idle: int) -> None:
    u = degenerate(name)
    q = orthonormal_basis(u)
    assert float(q[:, idle].norm(dim=1).max()) < 0.2
    others = [k for k in range(4) if k != idle]
    torch.testing.assert_close(q[:, others], gram_schmidt(u[:, others].double()).float(), rtol=0, atol=1e-2)


def test_an_empty_batch_is_an_empty_batch() -> None:
    assert orthonormal_mixture(torch.zeros(0, 4, 8), torch.zeros(0, 1, 4)).shape == (0, 1, 8)


def test_autocast_does_not_reach_into_the_basis() -> None:
    u = draw(20, 4, 30)
    with torch.autocast("cpu", torch.bfloat16):
        q = orthonormal_basis(u)
        low = orthonormal_basis(u.bfloat16().requires_grad_())
        low.sum().backward()
    torch.testing.assert_close(q, orthonormal_basis(u))
    assert low.dtype == torch.float32
