"""Sigma of LayerNorm's Jacobian with gain: the secular equation with two coordinates on top.

The method is that of `preln.closed_form.secular`; the top's matrix is 2 x 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from preln.closed_form.secular import FLOOR, TINY, Root, newton, sort_by_gain


def layer_root(
    raw: Tensor, length: Tensor, shrink: Tensor, kappa: Tensor, weight: Tensor, *, vector: bool = False
) -> Root:
    """Solve for LayerNorm with gain, d >= 3.

    With weights omega_i = 1/(lambda - D_i) over i >= 3, Omega their sum, m the omega-weighted mean of u and
    S = (1 - kappa)/lambda + kappa sum omega_i (u_i - m)^2:
    Y_ab = 1/Omega + kappa (u_a - m)(u_b - m)/S for a, b in {1, 2}. At the root, with c the eigenvector of
    D_top - Y: psi = <u_top - m, c>/S and a_i = omega_i (<1, c>/Omega + kappa psi (u_i - m)).

    Args:
        raw: `[n, d]`, x, not centred: only differences of its entries count, and centring would round them.
        length: `[n]`, |xc|.
        shrink: `[n]`, t.
        kappa: `[n]`, 1 - t^2.
        weight: `[d]` or `[n, d]`.
        vector: whether to return rho and psi.
    """
    by_gain = sort_by_gain(raw, weight)
    raw, gain = by_gain.entries, by_gain.gain
    n = len(raw)
    base, ceiling = gain[:, 2].square(), gain[:, 0].square()
    gap, distance = by_gain.tail(2)
    # Measured from the third, whose weight is close to 1 near the pole D_3, the weighted mean m keeps its
    # digits there.
    unit = (raw - raw[:, 2:3]) / length[:, None]
    pair, tail = unit[:, :2], unit[:, 2:]

    def optimum(rows: Tensor, mu: Tensor, root: Tensor | None = None) -> tuple[_Top, Tensor, Tensor]:
        """Return the top's eigenpair, the coefficients a_i and psi at lambda = base + mu."""
        whole = len(rows) == n
        u, g = (tail, gap) if whole else (tail[rows], gap[rows])
        k = kappa[rows]
        omega = (g + mu[:, None]).reciprocal()
        weight_sum = omega.sum(-1)
        omega = omega / weight_sum[:, None]
        mean = (omega * u).sum(-1)
        off = u - mean[:, None]
        lam = base[rows] + mu
        spread = shrink[rows].square() / (lam * weight_sum) + k * (omega * off.square()).sum(-1)
        lever = pair[rows] - mean[:, None]
        top = _top_eigenpair(distance[rows] - mu[:, None], 1 / weight_sum, lever, k, spread, root=root)
        pull = top.along / spread.clamp(min=FLOOR)
        coefficients = omega * (top.both[:, None] + off * (k * pull)[:, None])
        return top, coefficients, pull / weight_sum

    def step(rows: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        top, coefficients, psi = optimum(rows, mu)
        # Envelope theorem: Y' along the eigenvector is sum a_i^2, the extra direction's share included.
        extra = kappa[rows] * (shrink[rows] * psi / (base[rows] + mu)).square()
        return top.value, 1 + coefficients.square().sum(-1) + extra

    mu = newton(step, base, ceiling, sharp=vector)
    value = torch.minimum(base + mu, ceiling)
    if not vector:
        return Root(by_gain.top, value)
    top, coefficients, psi = optimum(torch.arange(n, device=mu.device), mu, mu > TINY)
    rho = torch.cat([top.vector, -coefficients], dim=-1)
    return Root(by_gain.top, value, *by_gain.restore(rho, psi))


class _Top(NamedTuple):
    """Largest eigenvalue of the top's 2 x 2 matrix, its unit eigenvector c, <1, c> and <lever, c>."""

    value: Tensor
    vector: Tensor
    both: Tensor
    along: Tensor


def _top_eigenpair(
    diagonal: Tensor, common: Tensor, lever: Tensor, kappa: Tensor, spread: Tensor, *, root: Tensor | None
) -> _Top:
    """Solve for the top of diag - common (1 1^T + kappa lever lever^T/spread), 2 x 2.

    The last term can be huge (spread near 0), so the matrix is turned to have its first axis along `lever`:
    the huge number then stands alone on the diagonal and cancels nothing. In the rows that are at
    the `root` the eigenvalue is 0: knowing that, the eigenvector is read off the equation that cancels less.
    """
    length = torch.hypot(lever[:, 0], lever[:, 1])
    flat = length == 0
    safe = torch.where(flat, torch.ones_like(length), length)
    g1 = torch.where(flat, torch.ones_like(length), lever[:, 0] / safe)
    g2 = torch.where(flat, torch.zeros_like(length), lever[:, 1] / safe)
    heavy = common * torch.where(
        flat, torch.zeros_like(length), kappa * length.square() / spread.clamp(min=FLOOR)
    )
    d1, d2 = diagonal[:, 0], diagonal[:, 1]
    a = g1.square() * d1 + g2.square() * d2 - common * (g1 + g2).square() - heavy
    b = g1 * g2 * (d2 - d1) - common * (g1 + g2) * (g1 - g2)
    c = g2.square() * d1 + g1.square() * d2 - common * (g1 - g2).square()
    half = (c - a) / 2
    radius = torch.hypot(half, b)
    far = half.abs() + radius
    correction = torch.where(far > 0, b.square() / torch.where(far > 0, far, torch.ones_like(far)), far)
    value = torch.maximum(a, c) + correction
    # Eigenvector in the turned axes: (b, value - a) from the first row, or (value - c, b) from the second;
    # value - a = 2 half + correction.
    from_a, from_c, upper = correction + 2 * half, correction - 2 * half, half >= 0
    if root is not None:
        terms_a = g1.square() * d1.abs() + g2.square() * d2.abs() + common * (g1 + g2).square() + heavy
        terms_c = g2.square() * d1.abs() + g1.square() * d2.abs() + common * (g1 - g2).square()
        from_a, from_c = -a, -c
        upper = torch.where(root, a.abs() * terms_c >= c.abs() * terms_a, upper)
    first, second = torch.where(upper, b, from_c), torch.where(upper, from_a, b)
    size = torch.hypot(first, second)
    safe_size = torch.where(size > 0, size, torch.ones_like(size))
    first = torch.where(size > 0, first / safe_size, torch.zeros_like(size))
    second = torch.where(size > 0, second / safe_size, torch.ones_like(size))
    # Turned axes: e1' = (g1, g2) = lever/length, e2' = (-g2, g1).
    if root is not None:
        # The same, multiplied out: turning back would lose the smaller entry's digits.
        c1 = torch.where(upper, g2 * (d2 - heavy) - common * (g1 + g2), common * (g1 - g2) - g1 * d2)
        c2 = torch.where(upper, g1 * (heavy - d1) + common * (g1 + g2), -common * (g1 - g2) - g2 * d1)
        c1, c2 = c1 / safe_size, torch.where(size > 0, c2 / safe_size, g1)
        c1 = torch.where(size > 0, c1, -g2)
    else:
        c1, c2 = first * g1 - second * g2, first * g2 + second * g1
    return _Top(value, torch.stack([c1, c2], dim=-1), first * (g1 + g2) + second * (g1 - g2), first * length)
