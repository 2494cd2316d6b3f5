"""LayerNorm's Jacobian: y = gamma (x - mu)/s + beta with s = sqrt(var + eps) (theorems LN-*)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from preln.closed_form.dense import apply_gain, dense_singular_values, sigma_bounds
from preln.closed_form.gradient import Sensitivity, differentiable, joined, of_root, of_scale
from preln.closed_form.secular_pair import layer_root
from preln.closed_form.vectors import Rows, prepare


def layer_norm_jacobian(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch d d"]:
    """Return G = diag(gamma) (C - (1 - t) u u^T)/s with u = C x/|C x|.

    C is the centring projector, s = sqrt(var + eps), t = eps/s^2 (theorem LN-JAC). Row i is the gradient of
    output i. The result carries no gradient.

    Args:
        x: vectors, any floating dtype; computed in float64, returned in x's dtype.
        weight: the gain gamma; None for 1.
        eps: at least 0. With eps = 0 there is no Jacobian at a constant x, and the result is NaN there.

    Raises:
        InputError: an argument has the wrong type, shape or value.

    >>> layer_norm_jacobian(torch.tensor([0.0, 0.0]), eps=1.0)
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    rows = prepare(x, weight, eps, centre=True)
    return _dense(rows).reshape(*x.shape, x.shape[-1]).to(x.dtype)


def layer_norm_singular_values(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch d"]:
    """Return all singular values of the Jacobian, in falling order.

    Without gain they are 1/s, d - 2 times, then t/s and 0; for constant x 1/s, d - 1 times, then 0 (theorem
    LN-SPEC). With a gain they come from a dense decomposition, O(d^2) memory a vector. The result carries
    no gradient.

    Args:
        x: vectors.
        weight: the gain; None for 1.
        eps: at least 0.

    Raises:
        InputError: an argument has the wrong type, shape or value.
    """
    rows = prepare(x, weight, eps, centre=True)
    d = x.shape[-1]
    if weight is None:
        values = (1 / rows.scale)[:, None].repeat(1, d)
        if d > 1:
            # t = 1 where x is constant: then this one equals 1/s too.
            values[:, -2] = rows.shrink / rows.scale
        values[:, -1] = 0.0 * rows.scale
    else:
        values = dense_singular_values(rows, _dense)
    return values.reshape(x.shape).to(x.dtype)


def layer_norm_sigma(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch"]:
    """Return the largest singular value of the Jacobian, exactly, in O(d) memory a vector.

    Without gain it is 1/s for d >= 3, t/s for d = 2 (t = 1 where x is constant) and 0 for d = 1 (theorem
    LN-NORM-D3); with a gain and d >= 3, the root of the secular equation in `preln.closed_form.secular`.

    It has a first derivative in x and in the gain wherever the largest singular value is simple, also in O(d)
    memory; where it is not, the gradient is that of one branch (see `preln.closed_form.gradient`).
    Backpropagation only: forward mode carries no derivative, and a second derivative is refused. Where there
    is no Jacobian (eps = 0 and s = 0) sigma is not finite.

    Args:
        x: vectors.
        weight: the gain; None for 1.
        eps: at least 0.

    Raises:
        InputError: an argument has the wrong type, shape or value.

    >>> layer_norm_sigma(torch.tensor([1.0, -1.0, 0.0]), eps=0.0)
    tensor(1.2247)
    """
    rows = prepare(x, weight, eps, centre=True)

    def solve(gradients: bool) -> Sensitivity:
        d = rows.unit.shape[-1]
        if d <= 2:
            return _small(rows)
        if rows.weight is None:
            return of_scale(1 / rows.scale, rows, power=1)
        return joined([_solve(c, gradients) for c in rows.chunks()], rows)

    return differentiable(solve, x, weight)


def layer_norm_sigma_bounds(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None,
    *,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return |gamma|_(3)/s and |gamma|_(1)/s, between which sigma lies (theorem LN-GAIN-BOUND).

    For d < 3 there is no third gain, and the lower bound is 0. They carry no gradient.

    Args:
        x: vectors.
        weight: the gain; None for 1.
        eps: at least 0.

    Raises:
        InputError: an argument has the wrong type, shape or value.
    """
    return sigma_bounds(prepare(x, weight, eps, centre=True), x, nth=3)


def _small(rows: Rows) -> Sensitivity:
    """Return sigma for d = 1, where B = 0, and d = 2, where B = (t/s) u u^T with u = (1, -1)/sqrt(2)."""
    n, d = rows.unit.shape
    if d == 1:
        return of_scale(0.0 * rows.scale, rows, power=1, by_gain=torch.zeros_like(rows.unit))
    slope = rows.shrink / rows.scale
    gain = rows.gain.expand(n, d)
    stretch = torch.hypot(gain[:, 0], gain[:, 1]) / 2**0.5
    by_gain = gain / (2 * torch.where(stretch > 0, stretch, torch.ones_like(stretch)))[:, None]
    return of_scale(stretch * slope, rows, power=3, by_gain=by_gain * slope[:, None])


def _solve(rows: Rows, gradients: bool) -> Sensitivity:
    root = layer_root(rows.raw, rows.length, rows.shrink, rows.kappa, rows.gain, vector=gradients)
    return of_root(rows, root)


def _dense(rows: Rows) -> Tensor:
    """Return the Jacobians, `[n, d, d]` in float64."""
    d = rows.unit.shape[-1]
    centring = torch.eye(d, dtype=torch.float64, device=rows.unit.device) - 1 / d
    along = rows.unit[:, :, None] * rows.unit[:, None, :]
    shrunk = rows.shrink[:, None, None] * along
    return apply_gain((centring - along + shrunk) / rows.scale[:, None, None], rows.weight)
