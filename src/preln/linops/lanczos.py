"""Largest singular value by Golub-Kahan-Lanczos bidiagonalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from preln.base.errors import InputError
from preln.linops.operator import LinearOperator


@dataclass(frozen=True)
class SingularTriple:
    """A batch of approximate largest singular triples and the evidence for them.

    Attributes:
        sigma: ``[b]``, the Ritz values, each a lower bound of the largest singular value (up to rounding).
        residual: ``[b]``, ``|J^T u - sigma v|`` (``J v = sigma u`` holds by construction): some singular
            value lies within this distance of ``sigma``.
        left: ``[b, m]`` unit vectors u.
        right: ``[b, n]`` unit vectors v.
        products: Pairs of products (one ``J v``, one ``J^T u``) that were used.
        converged: Whether every residual reached the tolerance.
    """

    sigma: Float[Tensor, " b"]
    residual: Float[Tensor, " b"]
    left: Float[Tensor, "b m"]
    right: Float[Tensor, "b n"]
    products: int
    converged: bool


def _orthogonalise(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """Remove from ``[b, n]`` its components along the basis, twice: once is not enough in floating point."""
    if not basis:
        return vector
    q = torch.stack(basis, dim=1)
    for _ in range(2):
        vector = vector - torch.einsum("bkn,bk->bn", q, torch.einsum("bkn,bn->bk", q, vector))
    return vector


def _normalise(vector: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Length and direction; a vector that is rounding noise against ``scale`` becomes exactly zero."""
    length = torch.linalg.vector_norm(vector, dim=1)
    floor = 16 * torch.finfo(vector.dtype).eps * scale
    alive = length > floor
    length = torch.where(alive, length, torch.zeros_like(length))
    unit = torch.where(alive[:, None], vector / length.clamp_min(1e-300)[:, None], torch.zeros_like(vector))
    return length, unit


def largest_singular_value(
    operator: LinearOperator,
    *,
    rtol: float = 1e-3,
    max_products: int = 64,
    seed: int = 0,
) -> SingularTriple:
    """Largest singular value of every map of an operator.

    Golub-Kahan-Lanczos from a random start: ``J V_k = U_k B_k`` and
    ``J^T U_k = V_k B_k^T + beta_k v_{k+1} e_k^T`` with B_k upper bidiagonal (Golub and Kahan 1965), and
    full reorthogonalisation of both bases. With the largest singular triple (theta, p, q) of B_k the
    residual of ``(theta, U p, V q)`` is ``beta_k |p_k|`` exactly, and iteration stops when it is at most
    ``rtol * theta`` for the whole batch.

    Args:
        operator: The maps; a batch shares its products.
        rtol: Relative residual to stop at.
        max_products: Most product pairs to spend.
        seed: Fixes the start vectors.

    Returns:
        The triples with their residuals; ``converged`` is False when the products ran out first.

    Raises:
        InputError: A product is not finite, or ``max_products`` is below 1.

    >>> from preln.linops.operator import matrix_operator
    >>> found = largest_singular_value(matrix_operator(torch.diag(torch.tensor([3.0, 2.0, 1.0]))))
    >>> round(found.sigma.item(), 3), found.converged
    (3.0, True)
    """
    if max_products < 1:
        raise InputError(f"max_products {max_products}: allow at least one product pair")
    m, n = operator.shape
    b = max(operator.batch_size, 1)
    # drawn on the CPU so that every device starts from the same vectors
    start = torch.randn(b, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = start.to(operator.device, operator.dtype)
    right = [start / torch.linalg.vector_norm(start, dim=1, keepdim=True)]
    left: list[Tensor] = []
    bidiagonal = torch.zeros(b, 0, 0, dtype=torch.float64, device=operator.device)
    beta = torch.zeros(b, dtype=operator.dtype, device=operator.device)
    scale = beta
    # with fewer rows than columns the last right vector is found one step after the left basis is full
    steps = min(max_products, m + 1, n)
    for k in range(1, steps + 1):
        forward = operator.matvec(right[-1].reshape(operator.in_shape)).detach().reshape(b, m)
        if k == 1:
            scale = torch.linalg.vector_norm(forward, dim=1)
        alpha, u = _normalise(_orthogonalise(forward, left), scale)
        grown = torch.zeros(b, k, k, dtype=torch.float64, device=operator.device)
        grown[:, : k - 1, : k - 1] = bidiagonal
        grown[:, k - 1, k - 1] = alpha
        if k > 1:
            grown[:, k - 2, k - 1] = beta
        bidiagonal = grown
        left.append(u)
        backward = operator.rmatvec(u.reshape(operator.out_shape)).detach().reshape(b, n)
        if not (torch.isfinite(forward).all() and torch.isfinite(backward).all()):
            raise InputError("singular value: a Jacobian product is not finite: use a wider dtype")
        beta, v = _normalise(_orthogonalise(backward, right), torch.maximum(scale, alpha))
        p, theta, qh = torch.linalg.svd(bidiagonal)
        sigma = theta[:, 0]
        residual = beta.double() * p[:, k - 1, 0].abs()
        scale = torch.maximum(scale, sigma.to(scale.dtype))
        done = bool((residual <= rtol * sigma).all())
        if done or k == steps:
            break
        right.append(v)
    u_best = torch.einsum("bkm,bk->bm", torch.stack(left, dim=1), p[:, :, 0].to(operator.dtype))
    v_best = torch.einsum("bkn,bk->bn", torch.stack(right, dim=1), qh[:, 0, :].to(operator.dtype))
    return SingularTriple(sigma.to(operator.dtype), residual.to(operator.dtype), u_best, v_best, k, done)
