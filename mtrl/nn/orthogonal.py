"""Orthonormal mixtures: Gram-Schmidt over the outputs of K experts, per row, without a loop and without its traps.

MOORE (Hendawy et al. 2024, https://arxiv.org/abs/2311.11385) makes the outputs u_1..u_K of a row orthonormal by
Gram-Schmidt and sums them with task weights. In matrix form U = L Q, where L is the Cholesky factor of U U^T, so that

    w Q = (w L^-1) U:    one K x K problem per row and two passes over the outputs.

The factor is computed twice (CholeskyQR2, Yamamoto et al. 2015, https://doi.org/10.1553/etna_vol44s306; the second pass
removes what rounding left of the first) and its gradient is the closed form, with the same two passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrl.nn.linear import matmul

# On the matrix of cosines. Effective is their product: directions closer than about 3e-6 rad count as one. FIRST must
# exceed fp32's error of a cosine, SECOND that of a nearly orthonormal basis.
FIRST, SECOND = 1e-5, 1e-6
FLOOR = 1e-10
"""Added to squared norms: an expert shorter than about 1e-5 counts as zero."""


def orthonormal_mixture(outputs: Tensor, weights: Tensor) -> Tensor:
    """Sum the Gram-Schmidt basis of each row's outputs with the row's weights.

    Equals textbook Gram-Schmidt, q_k = normalise(u_k - sum_{j<k} <u_k, q_j> q_j), wherever that is defined. Where it is
    not, a direction fades to zero instead: an expert that is zero or a combination of those before it adds nothing.
    Result and gradient are finite for all finite inputs.

    Args:
        outputs: [n, K, D] with K <= D, any strides.
        weights: [n, M, K], M mixtures of each row.

    Returns:
        [n, M, D], float32 or float64 as ``outputs`` (autocast's bfloat16 gives float32).
    """
    with torch.autocast(outputs.device.type, enabled=False), matmul("default"):  # oneDNN: six times slower on K x D
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        return _Mixture.apply(outputs.to(dtype), weights.to(dtype))  # type: ignore[return-value] # apply is untyped


def orthonormal_basis(outputs: Tensor) -> Tensor:
    """The basis itself: [n, K, D] -> [n, K, D], rows of length 1 (or 0, see ``orthonormal_mixture``)."""
    n, k, _ = outputs.shape
    return orthonormal_mixture(outputs, torch.eye(k, device=outputs.device).expand(n, k, k))


def _inverse_factor(gram: Tensor) -> Tensor:
    """Lower-triangular X [n, K, K] with X G X^T = I."""
    factor = torch.linalg.cholesky_ex(gram).L
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(gram), upper=False)


class _Mixture(torch.autograd.Function):
    """All K x K arithmetic is in float64, whatever the outputs are; it costs next to nothing."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor) -> Tensor:
        gram = (outputs @ outputs.mT).double()
        inverse_norm = (gram.diagonal(dim1=1, dim2=2) + FLOOR).rsqrt()
        # Cosines instead of products: the jitter then is relative to every single expert, and scaling one of them
        # changes nothing. The diagonal is 1, also that of an expert which is zero.
        cosines = gram * inverse_norm[:, :, None] * inverse_norm[:, None]
        cosines.diagonal(dim1=1, dim2=2).fill_(1 + FIRST)
        first = _inverse_factor(cosines) * inverse_norm[:, None]
        rough = first.to(outputs.dtype) @ outputs  # orthonormal up to rounding and FIRST
        rest = (rough @ rough.mT).double() + FLOOR * (first @ first.mT)
        rest.diagonal(dim1=1, dim2=2).add_(SECOND)
        second = _inverse_factor(rest / (1 + SECOND))
        mixed = weights.double() @ second
        ctx.save_for_backward(rough, weights, first, second)
        return mixed.to(outputs.dtype) @ rough

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        # With Q = L^-1 U and a constant jitter: dL/dU = L^-T (dL/dQ - S Q), where S is the symmetric matrix with the
        # lower triangle of (dL/dQ) Q^T (the backward of QR, Walter & Lehmann 2010, with R = L^T). Here dL/dQ = w^T g.
        rough, weights, first, second = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False), matmul("default"):
            grad = grad.to(rough.dtype)
            along = (grad @ rough.mT).double() @ second.mT  # g Q^T, [n, M, K]
            outer = weights.double().mT @ along
            symmetric = outer.tril() + outer.tril(-1).mT
            back = (second @ first).mT  # L^-T
            own = (back @ weights.double().mT).to(rough.dtype)
            shared = (back @ symmetric @ second).to(rough.dtype)
            # In place: another array of this size costs more than the product.
            return (own @ grad).baddbmm_(shared, rough, alpha=-1), along.to(weights.dtype)
