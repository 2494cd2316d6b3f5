"""First derivatives of sigma in the vector and the gain, in O(d) memory a vector.

Hellmann and Feynman: where sigma is a simple singular value of G with unit vectors l, r (l^T G r = sigma), a
change dG changes it by l^T dG r. The secular equation's root lambda = (s sigma)^2 comes with one vector rho
and a multiplier psi (`preln.closed_form.secular`). With phi = t psi/lambda and
R^2 = |rho|^2 + (1 - t^2) phi^2:

    l = Gamma rho/(sqrt(lambda) R),    r = (rho + (1 - t) phi u)/R,    <u, r> = phi/R,
    C Gamma l = (lambda rho + (1 - t^2) psi u)/(sqrt(lambda) R)

(C the identity for RMSNorm). Put into the differential of B(x) = (C - (1 - t) u u^T)/s, this gives

    d sigma/d gamma_i = gamma_i rho_i^2/(s sqrt(lambda) R^2),
    d sigma/d x = -(ds/drms)/(s^2 sqrt(d lambda) R^2) ((1 + t) psi rho + (lambda |rho|^2 + e psi phi) u)

with e = t (2 - t - t^2), ds/drms = rms/s for eps inside the root and e = t (1 - t - t^2), ds/drms = 1 for eps
outside it. Nothing is subtracted that nearly cancels, so parallel vectors and nearly equal gains keep their
digits as far as the singular vectors do.

Where the largest singular value is not simple, sigma has a kink. What comes out is then finite: the gradient
of one branch, l^T dG r for one pair of top singular vectors, which is a generalised gradient (Clarke, 1975).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preln.closed_form.secular import Root
from preln.closed_form.vectors import Rows


@dataclass(frozen=True)
class Sensitivity:
    """Sigma of each row with its gradients; None where they were not asked for.

    Attributes:
        sigma: `[n]`.
        by_x: `[n, d]`.
        by_gain: `[n, d]`.
    """

    sigma: Tensor
    by_x: Tensor | None = None
    by_gain: Tensor | None = None


Solve = Callable[[bool], Sensitivity]
"""with gradients or without -> sigma of every row"""


def differentiable(solve: Solve, x: Tensor, weight: Tensor | None) -> Tensor:
    """Return sigma in x's dtype and shape, with a first derivative where an input asks for one."""
    wanted = x.requires_grad or (weight is not None and weight.requires_grad)
    if torch.is_grad_enabled() and wanted:
        return _Sigma.apply(x, weight, solve)
    return solve(False).sigma.reshape(x.shape[:-1]).to(x.dtype)


class _Sigma(torch.autograd.Function):
    """Carries the gradients from the forward to the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, solve: Solve) -> Tensor:
        """Solve, and keep what the backward pass multiplies."""
        solved = solve(True)
        by_x = solved.by_x if ctx.needs_input_grad[0] else None
        by_gain = solved.by_gain if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x, weight, by_x, by_gain)
        return solved.sigma.reshape(x.shape[:-1]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Multiply by the upstream gradient; sum a shared gain's over the vectors that share it."""
        x, weight, by_x, by_gain = ctx.saved_tensors
        with torch.no_grad():
            factor = upstream.reshape(-1, 1).to(torch.float64)
            if by_x is not None:
                by_x = (factor * by_x).reshape(x.shape).to(x.dtype)
            if by_gain is not None:
                by_gain = (factor * by_gain).reshape(x.shape).sum_to_size(weight.shape).to(weight.dtype)
        sources = (upstream, x, weight)
        return _FirstOnly.apply(by_x, *sources), _FirstOnly.apply(by_gain, *sources), None


class _FirstOnly(torch.autograd.Function):
    """Hands a gradient on; refuses to differentiate it again.

    Torch's `once_differentiable` refuses only where the upstream gradient depends on an input. Elsewhere the
    second derivative would lack a term without a word.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor | None, *sources: Tensor | None) -> Tensor | None:
        """Return the gradient, tied to all that it depends on."""
        return None if gradient is None else gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """Refuse."""
        raise RuntimeError("sigma has a first derivative only: its gradient cannot be differentiated again")


def of_root(rows: Rows, root: Root, *, outside: bool = False) -> Sensitivity:
    """Return sigma and its gradients from the secular equation's root, rho and psi."""
    sigma = root.sigma / rows.scale
    if root.vector is None or root.pull is None:
        return Sensitivity(sigma)
    t, lam, rho, psi = rows.shrink, root.value, root.vector, root.pull
    # Sigma = 0 (a gain or a Jacobian that vanishes) is a minimum: 0 is among the generalised gradients.
    positive = (lam > 0) & (root.top > 0)
    safe = torch.where(positive, lam, torch.ones_like(lam))
    phi = t * psi / safe
    square = rho.square().sum(-1)
    factor = 1 / (safe.sqrt() * (square + rows.kappa * phi.square()) * rows.scale)
    factor = torch.where(positive, factor, torch.zeros_like(factor))
    gain = rows.gain / torch.where(root.top > 0, root.top, torch.ones_like(root.top))[:, None]
    by_gain = factor[:, None] * gain * rho.square()
    outer = -factor * root.top * _stretch(rows, outside) / rows.scale
    along = safe * square + t * ((1 - t - t * t) if outside else rows.complement * (2 + t)) * psi * phi
    by_x = outer[:, None] * (((1 + t) * psi)[:, None] * rho + along[:, None] * rows.unit)
    return Sensitivity(sigma, by_x, by_gain)


def of_scale(
    sigma: Tensor, rows: Rows, *, power: int, outside: bool = False, by_gain: Tensor | None = None
) -> Sensitivity:
    """Return the gradients of a sigma that depends on x as a constant times 1/s^power, and no other way.

    Args:
        sigma: `[n]`.
        rows: the vectors.
        power: of 1/s.
        outside: eps outside the root.
        by_gain: `[n, d]`, the gradient in the gain.
    """
    by_x = (-power * sigma / rows.scale * _stretch(rows, outside))[:, None] * rows.unit
    return Sensitivity(sigma, by_x, by_gain)


def joined(pieces: list[Sensitivity], rows: Rows) -> Sensitivity:
    """Put the rows' pieces together."""
    if not pieces:
        return Sensitivity(rows.scale, rows.unit, rows.unit)
    columns = [[getattr(piece, name) for piece in pieces] for name in ("sigma", "by_x", "by_gain")]
    sigma, by_x, by_gain = (None if column[0] is None else torch.cat(column) for column in columns)
    return Sensitivity(pieces[0].sigma if sigma is None else sigma, by_x, by_gain)


def _stretch(rows: Rows, outside: bool) -> Tensor:
    """Return |ds/dx| = (ds/drms)/sqrt(d)."""
    slope = torch.ones_like(rows.complement) if outside else rows.complement.sqrt()
    return slope / rows.unit.shape[-1] ** 0.5
