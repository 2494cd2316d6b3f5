"""Extreme singular values by Golub-Kahan-Lanczos bidiagonalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preln.base.errors import InputError
from preln.linops.basis import Basis
from preln.linops.operator import LinearOperator


@dataclass(frozen=True)
class SingularTriple:
    """A batch of approximate singular triples and the evidence for them.

    Attributes:
        sigma: ``[b]``, the Ritz values (up to rounding, each a lower bound of the largest singular value,
            or an upper bound of the smallest).
        residual: ``[b]``, ``|J^T u - sigma v|`` (``J v = sigma u`` holds by construction): some singular
            value lies within this distance of ``sigma``.
        left: ``[b, m]`` unit vectors u.
        right: ``[b, n]`` unit vectors v.
        products: Pairs of products (one ``J v``, one ``J^T u``) that were used.
        converged: Whether every residual reached the tolerance.
        steps: ``[b]``, after how many pairs each map's triple was taken.
    """

    sigma: Float[Tensor, " b"]
    residual: Float[Tensor, " b"]
    left: Float[Tensor, "b m"]
    right: Float[Tensor, "b n"]
    products: int
    converged: bool
    steps: Int[Tensor, " b"]


def _normalise(vector: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Length and direction; a vector that is rounding noise against ``scale`` becomes exactly zero."""
    length = torch.linalg.vector_norm(vector, dim=1)
    floor = 16 * torch.finfo(vector.dtype).eps * scale
    alive = length > floor
    length = torch.where(alive, length, torch.zeros_like(length))
    tiny = torch.finfo(vector.dtype).tiny
    unit = torch.where(alive[:, None], vector / length.clamp_min(tiny)[:, None], torch.zeros_like(vector))
    return length, unit


def _first_vectors(operator: LinearOperator, seed: int, start: Tensor | None) -> Tensor:
    """Unit start vectors ``[b, n]``: the caller's, or one random vector for all maps.

    The same vector for every map makes a map's numbers independent of what shares its batch.
    """
    b, n = max(operator.batch_size, 1), operator.shape[1]
    if start is None:
        # drawn on the CPU so that every device starts from the same vectors
        start = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start = start.expand(b, n)
    start = start.reshape(b, n).to(operator.device, operator.dtype)
    if operator.project is not None:
        start = operator.project(start.reshape(operator.in_shape)).reshape(b, n)
    length = torch.linalg.vector_norm(start, dim=1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise InputError("singular value: a start vector is zero or not finite: start from another")
    return start / length


@dataclass
class _Ritz:
    """The extreme triples of B_k in its own coordinates, each map's taken when it was ready."""

    theta: Tensor  # [b, 2]: largest, smallest
    residual: Tensor  # [b, 2]
    left: Tensor  # [b, 2, K]
    right: Tensor  # [b, 2, K]
    steps: Tensor  # [b]
    ready: Tensor  # [b]

    @classmethod
    def empty(cls, b: int, most: int) -> _Ritz:
        pair, coordinates = (
            torch.zeros(b, 2, dtype=torch.float64),
            torch.zeros(b, 2, most, dtype=torch.float64),
        )
        steps = torch.zeros(b, dtype=torch.long)
        return cls(pair, pair.clone(), coordinates, coordinates.clone(), steps, steps.bool())

    def update(self, bidiagonal: Tensor, beta: Tensor, rtol: float, ends_needed: int) -> None:
        """Take the triples of ``[b, k, k]`` B_k for the maps that were not ready before."""
        k = bidiagonal.shape[-1]
        p, theta, qh = torch.linalg.svd(bidiagonal)
        ends, open_ = [0, k - 1], ~self.ready
        residual = beta[:, None] * p[:, k - 1, ends].abs()
        self.theta[open_] = theta[open_][:, ends]
        self.residual[open_] = residual[open_]
        self.left[open_, :, :k] = p[open_][:, :, ends].mT
        self.right[open_, :, :k] = qh[open_][:, ends]
        self.steps[open_] = k
        self.ready |= (self.residual <= rtol * self.theta)[:, :ends_needed].all(dim=1)


def extreme_singular_values(
    operator: LinearOperator,
    *,
    rtol: float = 1e-3,
    max_products: int = 64,
    seed: int = 0,
    start: Tensor | None = None,
    both: bool = False,
) -> tuple[SingularTriple, SingularTriple]:
    """Largest singular value of every map of an operator, and the smallest seen on the way.

    Golub-Kahan-Lanczos: ``J V_k = U_k B_k`` and ``J^T U_k = V_k B_k^T + beta_k v_{k+1} e_k^T`` with B_k upper
    bidiagonal (Golub and Kahan 1965), and full reorthogonalisation of both bases. With a singular triple
    (theta, p, q) of B_k the residual of ``(theta, U p, V q)`` is ``beta_k |p_k|`` exactly. A map is done when
    the residual of its largest triple is at most ``rtol * theta``; both of its triples are those of that
    step, whatever the rest of the batch still needs. The products end when every map is done.

    The smallest singular value of B_k is the least ``|J v|`` over unit vectors v in the span of V_k, hence an
    upper bound of the smallest singular value of J. Unless ``both`` asks for it, no product is spent on it,
    and only its residual says whether it is near a singular value. Both bases are kept: memory for up to
    ``4 k`` vectors of the size of the input.

    Args:
        operator: The maps; a batch shares its products.
        rtol: Relative residual to stop at.
        max_products: Most product pairs to spend.
        seed: Fixes the start vector.
        start: ``[b, ...]`` vectors of the input's size to start from instead of a random one. The residual
            cannot see a singular vector that the start all but lacks.
        both: Go on until the smallest triple has converged too.

    Returns:
        The largest triples, then the smallest. ``converged`` is False where a residual is above the tolerance
        times the same triple's value.

    Raises:
        InputError: A product is not finite, a start vector is zero, or ``max_products`` is below 1.

    >>> from preln.linops.operator import matrix_operator
    >>> top, bottom = extreme_singular_values(matrix_operator(torch.diag(torch.tensor([3.0, 2.0, 1.0]))))
    >>> round(top.sigma.item(), 3), round(bottom.sigma.item(), 3)
    (3.0, 1.0)
    """
    if max_products < 1:
        raise InputError(f"max_products {max_products}: allow at least one product pair")
    m, n = operator.shape
    b = max(operator.batch_size, 1)
    # with fewer rows than columns the last right vector is found one step after the left basis is full
    most = min(max_products, m + 1, n)
    left = Basis(b, m, dtype=operator.dtype, device=operator.device)
    right = Basis(b, n, dtype=operator.dtype, device=operator.device)
    v = _first_vectors(operator, seed, start)
    bidiagonal = torch.zeros(b, most, most, dtype=torch.float64)
    ritz = _Ritz.empty(b, most)
    scale = torch.zeros(b, dtype=operator.dtype, device=operator.device)
    for k in range(1, most + 1):
        right.append(v)
        forward = operator.matvec(v.reshape(operator.in_shape)).detach().reshape(b, m)
        if k == 1:
            scale = torch.linalg.vector_norm(forward, dim=1)
        alpha, u = _normalise(left.without(forward), scale)
        left.append(u)
        backward = operator.rmatvec(u.reshape(operator.out_shape)).detach().reshape(b, n)
        scale = torch.maximum(scale, alpha)
        beta, v = _normalise(right.without(backward), scale)
        lengths = torch.linalg.vector_norm(forward, dim=1) + torch.linalg.vector_norm(backward, dim=1)
        # one transfer a step: on an accelerator each makes the processor wait
        ends = torch.stack([alpha, beta, lengths]).double().cpu()
        if not bool(torch.isfinite(ends).all()):
            raise InputError("singular value: a Jacobian product is not finite: use a wider dtype")
        bidiagonal[:, k - 1, k - 1] = ends[0]
        ritz.update(bidiagonal[:, :k, :k], ends[1], rtol, 2 if both else 1)
        scale = torch.maximum(scale, ritz.theta[:, 0].to(scale))
        if bool(ritz.ready.all()):
            break
        if k < most:
            bidiagonal[:, k - 1, k] = ends[1]
    return _triple(ritz, 0, left, right, rtol), _triple(ritz, 1, left, right, rtol)


def _triple(ritz: _Ritz, end: int, left: Basis, right: Basis, rtol: float) -> SingularTriple:
    """The largest (0) or smallest (1) triples in full coordinates."""
    k, like = left.count, left.vectors
    sigma, residual = ritz.theta[:, end], ritz.residual[:, end]
    return SingularTriple(
        sigma=sigma.to(like),
        residual=residual.to(like),
        left=left.combine(ritz.left[:, end, :k].to(like.device)),
        right=right.combine(ritz.right[:, end, :k].to(like.device)),
        products=k,
        converged=bool((residual <= rtol * sigma).all()),
        steps=ritz.steps.to(like.device),
    )


def largest_singular_value(
    operator: LinearOperator,
    *,
    rtol: float = 1e-3,
    max_products: int = 64,
    seed: int = 0,
    start: Tensor | None = None,
) -> SingularTriple:
    """Largest singular value of every map of an operator: the first result of `extreme_singular_values`.

    Raises:
        InputError: A product is not finite, a start vector is zero, or ``max_products`` is below 1.

    >>> from preln.linops.operator import matrix_operator
    >>> found = largest_singular_value(matrix_operator(torch.diag(torch.tensor([3.0, 2.0, 1.0]))))
    >>> round(found.sigma.item(), 3), found.converged
    (3.0, True)
    """
    return extreme_singular_values(operator, rtol=rtol, max_products=max_products, seed=seed, start=start)[0]
