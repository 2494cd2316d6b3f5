"""Sigma of a norm's Jacobian with gain, from its secular equation, in O(d) memory a vector.

Both layers have (s G)(s G)^T = Gamma (P - kappa u u^T) Gamma with u a unit vector and P = I or the centring
projector. Sort the gains by size; call the largest one (RMSNorm) or two (LayerNorm) the top, the others the
tail, D_i = gamma_i^2. Above every D_i of the tail, the tail can be eliminated, and lambda is an upper bound
of all eigenvalues exactly if D_top - Y(lambda) <= lambda. Here Y(lambda), as a quadratic form, is the least
cost sum_i a_i^2 (lambda - D_i), over the tail and one fixed extra direction, of reproducing the top's rows: a
minimum of functions linear in lambda, so concave. Hence

    F(lambda) = largest eigenvalue of (D_top - Y(lambda)) - lambda

is convex with slope at most -1, and sigma(s G)^2 is its root, or the largest D of the tail if F is negative
from there on. Newton's method from the left rises to the root without passing it, and
root - lambda <= F(lambda) says when to stop. All sums have positive terms only.

Secular equations of rank-one changes: Golub, "Some modified matrix eigenvalue problems" (1973); Bunch,
Nielsen and Sorensen (1978). The elimination and the convexity argument here are this project's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_STEPS = 200
TINY = 1e-150  # squares of its inverse stay finite
FLOOR = 1e-300  # stands for a divisor that is 0; far below TINY, so that what it divides still dominates
ROUNDING = 2.0**-52

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(row numbers, mu) -> (F, -F') at lambda = base + mu."""


def newton(step: Step, base: Tensor, ceiling: Tensor) -> Tensor:
    """Return the root lambda = base + mu of a convex decreasing F with slope at most -1, for each row.

    Args:
        step: evaluates F and -F' for some rows.
        base: `[n]`, the largest D of the tail: a lower bound of the root.
        ceiling: `[n]`, the largest D: an upper bound of the root.
    """
    mu = base * 2.0**-60 + TINY
    rows = torch.arange(len(base), device=base.device)
    for _ in range(MAX_STEPS):
        at = mu[rows]
        value, slope = step(rows, at)
        rise = value / slope
        new = torch.minimum(at + rise, (ceiling - base)[rows].clamp(min=TINY))
        rising = rise > 0
        mu[rows] = torch.where(rising, new, at)
        # F bounds the distance to the root; a step lost in rounding ends it too. NaN input is not rising and
        # ends at once.
        going = rising & (value > 2 * ROUNDING * (base[rows] + new)) & (new > at)
        if not going.any():
            break
        rows = rows[going]
    return torch.minimum(base + mu, ceiling)


def sort_by_gain(unit: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Order the coordinates by falling |gain|; return the unit vectors and |gain|, `[n, d]` both."""
    size, order = weight.abs().sort(dim=-1, descending=True, stable=True)
    unit = unit[:, order] if order.ndim == 1 else unit.gather(-1, order)
    return unit, size.expand_as(unit)


def rms_sigma(unit: Tensor, shrink: Tensor, kappa: Tensor, weight: Tensor) -> Tensor:
    """Return s sigma(G) for RMSNorm with gain.

    With u the unit vector and u_1 its entry at the largest gain: Y = kappa u_1^2 / P(lambda),
    P = (1 - kappa)/lambda + kappa sum_{i >= 2} u_i^2/(lambda - D_i).

    Args:
        unit: `[n, d]`, x/|x|.
        shrink: `[n]`, t.
        kappa: `[n]`, 1 - t^2.
        weight: `[d]` or `[n, d]`.
    """
    unit, gain = sort_by_gain(unit, weight)
    top = gain[:, :1]
    gain = gain / torch.where(top > 0, top, torch.ones_like(top))
    n, d = unit.shape
    second = gain[:, 1] if d > 1 else torch.zeros_like(kappa)
    base, ceiling = second.square(), gain[:, 0].square()
    head = kappa * unit[:, 0].square()
    mass = kappa[:, None] * unit[:, 1:].square()
    # D_2 - D_i as a product, so that nearly equal gains keep their digits.
    gap = (second[:, None] - gain[:, 1:]) * (second[:, None] + gain[:, 1:])
    distance = (gain[:, 0] - second) * (gain[:, 0] + second)

    def step(rows: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        whole = len(rows) == n
        m, g = (mass, gap) if whole else (mass[rows], gap[rows])
        lam = base[rows] + mu
        inverse = (g + mu[:, None]).reciprocal()
        share = m * inverse
        extra = shrink[rows].square() / lam
        p = extra + share.sum(-1)
        # y = Y(lambda), and -F' = 1 + Y'. P = 0 only where x lies on the top coordinate and eps = 0: then Y
        # is infinite.
        y = torch.where(head[rows] > 0, head[rows] / p, torch.zeros_like(p))
        slope = 1 + y * (extra / lam + (share * inverse).sum(-1)) / p.clamp(min=FLOOR)
        return distance[rows] - mu - y, slope

    lam = newton(step, base, ceiling)
    return top[:, 0] * lam.sqrt()


def layer_sigma(unit: Tensor, shrink: Tensor, kappa: Tensor, weight: Tensor) -> Tensor:
    """Return s sigma(G) for LayerNorm with gain, d >= 3.

    With weights omega_i = 1/(lambda - D_i) over i >= 3, Omega their sum, m the omega-weighted mean of u and
    S = (1 - kappa)/lambda + kappa sum omega_i (u_i - m)^2:
    Y_ab = 1/Omega + kappa (u_a - m)(u_b - m)/S for a, b in {1, 2}.

    Args:
        unit: `[n, d]`, xc/|xc|.
        shrink: `[n]`, t.
        kappa: `[n]`, 1 - t^2.
        weight: `[d]` or `[n, d]`.
    """
    unit, gain = sort_by_gain(unit, weight)
    top = gain[:, :1]
    gain = gain / torch.where(top > 0, top, torch.ones_like(top))
    n = len(unit)
    third = gain[:, 2]
    base, ceiling = third.square(), gain[:, 0].square()
    gap = (third[:, None] - gain[:, 2:]) * (third[:, None] + gain[:, 2:])
    distance = (gain[:, :2] - third[:, None]) * (gain[:, :2] + third[:, None])
    # Only differences of entries count. Measured from the third, whose weight is close to 1 near the pole
    # D_3, the weighted mean m keeps its digits there.
    unit = unit - unit[:, 2:3]
    pair, tail = unit[:, :2], unit[:, 2:]

    def step(rows: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        whole = len(rows) == n
        u, g = (tail, gap) if whole else (tail[rows], gap[rows])
        k, t = kappa[rows], shrink[rows]
        omega = (g + mu[:, None]).reciprocal()
        weight_sum = omega.sum(-1)
        omega = omega / weight_sum[:, None]
        mean = (omega * u).sum(-1)
        off = u - mean[:, None]
        lam = base[rows] + mu
        spread = t.square() / (lam * weight_sum) + k * (omega * off.square()).sum(-1)
        lever = pair[rows] - mean[:, None]
        value, both, along = _top_eigenvalue(distance[rows] - mu[:, None], 1 / weight_sum, lever, k, spread)
        # Envelope theorem: Y' along the eigenvector is sum a_i^2 over the optimal coefficients a_i.
        pull = k * along / spread.clamp(min=FLOOR)
        coefficients = omega * (both[:, None] + off * pull[:, None])
        fixed = (t * pull / (lam * weight_sum)).square() / k.clamp(min=FLOOR)
        return value, 1 + coefficients.square().sum(-1) + fixed

    lam = newton(step, base, ceiling)
    return top[:, 0] * lam.sqrt()


def _top_eigenvalue(
    diagonal: Tensor, common: Tensor, lever: Tensor, kappa: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve for the top of diag - common (1 1^T + kappa lever lever^T/spread), 2 x 2.

    Returns the largest eigenvalue, and <1, c> and <lever, c> of its unit eigenvector c.

    The last term can be huge (spread near 0), so the matrix is turned to have its first axis along `lever`:
    the huge number then stands alone on the diagonal and cancels nothing.
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
    # Eigenvector in the turned axes: (b, value - a) if c >= a, else (value - c, b); value - a = 2 half +
    # correction.
    first = torch.where(half >= 0, b, correction - 2 * half)
    second = torch.where(half >= 0, correction + 2 * half, b)
    size = torch.hypot(first, second)
    first = torch.where(
        size > 0, first / torch.where(size > 0, size, torch.ones_like(size)), torch.zeros_like(size)
    )
    second = torch.where(
        size > 0, second / torch.where(size > 0, size, torch.ones_like(size)), torch.ones_like(size)
    )
    # Turned axes: e1' = (g1, g2) = lever/length, e2' = (-g2, g1).
    return value, first * (g1 + g2) + second * (g1 - g2), first * length
