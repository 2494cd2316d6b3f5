"""LayerNorm's Jacobian: y = gamma (x - mu)/s + beta with s = sqrt(var + eps) (theorems LN-*)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from preln.closed_form.dense import apply_gain, dense_singular_values, sigma_bounds
from preln.closed_form.secular import layer_sigma
from preln.closed_form.vectors import Rows, prepare


def layer_norm_jacobian(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch d d"]:
    """Return G = diag(gamma) (C - (1 - t) u u^T)/s with u = C x/|C x|.

    C is the centring projector, s = sqrt(var + eps), t = eps/s^2 (theorem LN-JAC). Row i is the gradient of
    output i.

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
    LN-SPEC). With a gain they come from a dense decomposition, O(d^2) memory a vector.

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
    LN-NORM-D3); with a gain and d >= 3, the root of the secular equation in `preln.closed_form.secular`. The
    result carries no gradient. Where there is no Jacobian (eps = 0 and s = 0) it is not finite.

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
    d = x.shape[-1]
    if d == 1:
        sigma = 0.0 * rows.scale
    elif d == 2:
        # B = (t/s) u u^T with u = (1, -1)/sqrt(2).
        stretch = 1.0 if rows.weight is None else (rows.weight.square().sum(-1) / 2).sqrt()
        sigma = stretch * rows.shrink / rows.scale
    elif weight is None:
        sigma = 1 / rows.scale
    else:
        pieces = [
            layer_sigma(c.unit, c.shrink, c.kappa, c.weight) / c.scale
            for c in rows.chunks()
            if c.weight is not None  # true of every piece, since the gain is given
        ]
        sigma = torch.cat(pieces) if pieces else rows.scale
    return sigma.reshape(x.shape[:-1]).to(x.dtype)


def layer_norm_sigma_bounds(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, "*#batch d"] | None,
    *,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return |gamma|_(3)/s and |gamma|_(1)/s, between which sigma lies (theorem LN-GAIN-BOUND).

    For d < 3 there is no third gain, and the lower bound is 0.

    Args:
        x: vectors.
        weight: the gain; None for 1.
        eps: at least 0.

    Raises:
        InputError: an argument has the wrong type, shape or value.
    """
    return sigma_bounds(prepare(x, weight, eps, centre=True), x, nth=3)


def _dense(rows: Rows) -> Tensor:
    """Return the Jacobians, `[n, d, d]` in float64."""
    d = rows.unit.shape[-1]
    centring = torch.eye(d, dtype=torch.float64, device=rows.unit.device) - 1 / d
    along = rows.unit[:, :, None] * rows.unit[:, None, :]
    shrunk = rows.shrink[:, None, None] * along
    return apply_gain((centring - along + shrunk) / rows.scale[:, None, None], rows.weight)
