"""RMSNorm's Jacobian: y = gamma * x/s with s = sqrt(ms + eps), or s = sqrt(ms) + eps (theorems RMS-*)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from preln.base.errors import InputError
from preln.closed_form.dense import apply_gain, dense_singular_values, sigma_bounds
from preln.closed_form.gradient import Sensitivity, differentiable, joined, of_root, of_scale
from preln.closed_form.secular import rms_root
from preln.closed_form.vectors import Rows, prepare


def rms_norm_jacobian(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None = None,
    *,
    eps: float = 1e-6,
    eps_placement: str = "inside",
) -> Float[Tensor, "*batch d d"]:
    """Return G = diag(gamma) (I - (1 - t) u u^T)/s with u = x/|x|.

    t = eps/s^2 for eps inside the root (theorem RMS-JAC), eps/s outside (theorem RMS-PAPER). Row i is the
    gradient of output i. The result carries no gradient.

    Args:
        x: vectors, any floating dtype; computed in float64, returned in x's dtype.
        weight: the gain gamma; None for 1.
        eps: at least 0. With eps = 0 there is no Jacobian at x = 0, and the result is NaN there.
        eps_placement: `inside` as torch and transformers do, or `outside` as in "Reassessing Layer Pruning in
            LLMs".

    Raises:
        InputError: an argument has the wrong type, shape or value.

    >>> rms_norm_jacobian(torch.tensor([1.0, 1.0]), eps=0.0)
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    rows = _rows(x, weight, eps, eps_placement)
    return _dense(rows).reshape(*x.shape, x.shape[-1]).to(x.dtype)


def rms_norm_singular_values(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None = None,
    *,
    eps: float = 1e-6,
    eps_placement: str = "inside",
) -> Float[Tensor, "*batch d"]:
    """Return all singular values of the Jacobian, in falling order.

    Without gain they are 1/s, d - 1 times, and t/s (theorem RMS-SPEC); with a gain they come from a dense
    decomposition, O(d^2) memory a vector. The result carries no gradient.

    Args:
        x: vectors.
        weight: the gain; None for 1.
        eps: at least 0.
        eps_placement: `inside` or `outside`.

    Raises:
        InputError: an argument has the wrong type, shape or value.
    """
    rows = _rows(x, weight, eps, eps_placement)
    if weight is None:
        values = (1 / rows.scale)[:, None].repeat(1, x.shape[-1])
        values[:, -1] = rows.shrink / rows.scale
    else:
        values = dense_singular_values(rows, _dense)
    return values.reshape(x.shape).to(x.dtype)


def rms_norm_sigma(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None = None,
    *,
    eps: float = 1e-6,
    eps_placement: str = "inside",
) -> Float[Tensor, "*batch"]:
    """Return the largest singular value of the Jacobian, exactly, in O(d) memory a vector.

    Without gain it is 1/s for d >= 2 and t/s for d = 1 (theorem RMS-NORM); with a gain, the root of the
    secular equation in `preln.closed_form.secular`.

    It has a first derivative in x and in the gain wherever the largest singular value is simple, also in O(d)
    memory; where it is not, the gradient is that of one branch (see `preln.closed_form.gradient`).
    Backpropagation only: forward mode carries no derivative, and a second derivative is refused. Where there
    is no Jacobian (eps = 0 and s = 0) sigma is not finite.

    Args:
        x: vectors.
        weight: the gain; None for 1.
        eps: at least 0.
        eps_placement: `inside` or `outside`.

    Raises:
        InputError: an argument has the wrong type, shape or value.

    >>> rms_norm_sigma(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 1.0]), eps=0.0)
    tensor(0.4833)
    """
    rows = _rows(x, weight, eps, eps_placement)
    outside = eps_placement == "outside"

    def solve(gradients: bool) -> Sensitivity:
        if rows.unit.shape[-1] == 1:
            # The Jacobian is the number gamma t/s.
            slope = rows.shrink / rows.scale
            gain = rows.gain[..., 0].expand_as(slope)
            by_gain = (gain.sign() * slope)[:, None]
            return of_scale(
                gain.abs() * slope, rows, power=2 if outside else 3, outside=outside, by_gain=by_gain
            )
        if rows.weight is None:
            return of_scale(1 / rows.scale, rows, power=1, outside=outside)
        return joined([_solve(c, gradients, outside) for c in rows.chunks()], rows)

    return differentiable(solve, x, weight)


def rms_norm_sigma_bounds(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None,
    *,
    eps: float = 1e-6,
    eps_placement: str = "inside",
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return |gamma|_(2)/s and |gamma|_(1)/s, between which sigma lies (theorem RMS-GAIN-BOUND).

    For d = 1 there is no second gain, and the lower bound is 0. They carry no gradient.

    Args:
        x: vectors.
        weight: the gain; None for 1.
        eps: at least 0.
        eps_placement: `inside` or `outside`.

    Raises:
        InputError: an argument has the wrong type, shape or value.
    """
    return sigma_bounds(_rows(x, weight, eps, eps_placement), x, nth=2)


def _rows(x: Tensor, weight: Tensor | None, eps: float, eps_placement: str) -> Rows:
    if eps_placement not in ("inside", "outside"):
        raise InputError(f"eps_placement is {eps_placement!r}: use 'inside' or 'outside'")
    return prepare(x, weight, eps, centre=False, outside=eps_placement == "outside")


def _solve(rows: Rows, gradients: bool, outside: bool) -> Sensitivity:
    root = rms_root(rows.unit, rows.shrink, rows.kappa, rows.gain, vector=gradients)
    return of_root(rows, root, outside=outside)


def _dense(rows: Rows) -> Tensor:
    """Return the Jacobians, `[n, d, d]` in float64."""
    eye = torch.eye(rows.unit.shape[-1], dtype=torch.float64, device=rows.unit.device)
    along = rows.unit[:, :, None] * rows.unit[:, None, :]
    shrunk = rows.shrink[:, None, None] * along
    return apply_gain((eye - along + shrunk) / rows.scale[:, None, None], rows.weight)
