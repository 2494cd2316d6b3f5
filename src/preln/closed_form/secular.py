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

At the root, c (the top's eigenvector) and -a (the optimal coefficients) make up one vector rho with
(P - kappa u u^T) Gamma^2 rho = lambda rho: the left singular vector of G is along Gamma rho. With the
multiplier psi = <u, Gamma^2 rho> it is all that the gradient of sigma needs (`preln.closed_form.gradient`).

Secular equations of rank-one changes: Golub, "Some modified matrix eigenvalue problems" (1973); Bunch,
Nielsen and Sorensen (1978). The elimination and the convexity argument here are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 200
TINY = 1e-150  # squares of its inverse stay finite
FLOOR = 1e-300  # stands for a divisor that is 0; far below TINY, so that what it divides still dominates
ROUNDING = 2.0**-52

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(row numbers, mu) -> (F, -F') at lambda = base + mu."""


@dataclass(frozen=True)
class Root:
    """Sigma of s G for each row, and where it is attained.

    Attributes:
        top: `[n]`, the largest |gain|.
        value: `[n]`, (sigma(s G)/top)^2.
        vector: `[n, d]`, rho, in the order of the gain as given and at most 1 in size; None if not asked for.
        pull: `[n]`, psi = <u, (Gamma/top)^2 rho>; None if not asked for.
    """

    top: Tensor
    value: Tensor
    vector: Tensor | None = None
    pull: Tensor | None = None

    @property
    def sigma(self) -> Tensor:
        """Sigma of s G: `[n]`."""
        return self.top * self.value.sqrt()


@dataclass(frozen=True)
class Sorted:
    """Coordinates ordered by falling |gain|, the gain divided by its largest entry.

    Attributes:
        entries: `[n, d]`, the vectors.
        gain: `[n, d]`, |gain|/top.
        top: `[n]`, the largest |gain|.
        order: `[d]` or `[n, d]`, where each coordinate came from.
    """

    entries: Tensor
    gain: Tensor
    top: Tensor
    order: Tensor

    def tail(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return base - D_i over the coordinates after the first `heads`, and D_i - base over those before.

        Base is the largest D after them. Both are products, so that nearly equal gains keep their digits.
        """
        first = self.gain[:, heads : heads + 1]
        gap = (first - self.gain[:, heads:]) * (first + self.gain[:, heads:])
        distance = (self.gain[:, :heads] - first) * (self.gain[:, :heads] + first)
        return gap, distance

    def restore(self, vector: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        """Put rho back in the order of the gain as given, and scale it and psi to at most 1 in size."""
        size = vector.abs().amax(-1, keepdim=True)
        order = self.order.expand_as(vector)
        return torch.empty_like(vector).scatter_(-1, order, vector / size), pull / size[:, 0]


def sort_by_gain(vectors: Tensor, weight: Tensor) -> Sorted:
    """Order the coordinates of vectors `[n, d]` by falling |gain|."""
    size, order = weight.abs().sort(dim=-1, descending=True, stable=True)
    entries = vectors[:, order] if order.ndim == 1 else vectors.gather(-1, order)
    size = size.expand_as(vectors)
    top = size[:, :1]
    return Sorted(entries, size / torch.where(top > 0, top, torch.ones_like(top)), top[:, 0], order)


def newton(step: Step, base: Tensor, ceiling: Tensor, *, sharp: bool = False) -> Tensor:
    """Return mu for the root lambda = base + mu of a convex decreasing F with slope at most -1, for each row.

    Args:
        step: evaluates F and -F' for some rows.
        base: `[n]`, the largest D of the tail: a lower bound of the root.
        ceiling: `[n]`, the largest D: an upper bound of the root.
        sharp: whether mu itself must be good to roundings, as the eigenvector needs, and not only lambda.
    """
    mu = torch.full_like(base, TINY) if sharp else base * 2.0**-60 + TINY
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
        far = rise > 2 * ROUNDING * new if sharp else value > 2 * ROUNDING * (base[rows] + new)
        going = rising & far & (new > at)
        if not going.any():
            break
        rows = rows[going]
    return mu


def rms_root(unit: Tensor, shrink: Tensor, kappa: Tensor, weight: Tensor, *, vector: bool = False) -> Root:
    """Solve for RMSNorm with gain, d >= 2.

    With u the unit vector and u_1 its entry at the largest gain: Y = kappa u_1^2 / P(lambda),
    P = (1 - kappa)/lambda + kappa sum_{i >= 2} u_i^2/(lambda - D_i). At the root psi = u_1/P and
    a_i = kappa psi u_i/(lambda - D_i).

    Args:
        unit: `[n, d]`, x/|x|.
        shrink: `[n]`, t.
        kappa: `[n]`, 1 - t^2.
        weight: `[d]` or `[n, d]`.
        vector: whether to return rho and psi.
    """
    by_gain = sort_by_gain(unit, weight)
    unit, gain = by_gain.entries, by_gain.gain
    n = len(unit)
    base, ceiling = gain[:, 1].square(), gain[:, 0].square()
    head = kappa * unit[:, 0].square()
    mass = kappa[:, None] * unit[:, 1:].square()
    gap, distance = by_gain.tail(1)
    distance = distance[:, 0]

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

    mu = newton(step, base, ceiling, sharp=vector)
    value = torch.minimum(base + mu, ceiling)
    if not vector:
        return Root(by_gain.top, value)
    inverse = (gap + mu[:, None]).reciprocal()
    p = shrink.square() / (base + mu) + (mass * inverse).sum(-1)
    # Where F was negative from the start, lambda = D_2 and the top takes no part unless it is tied.
    stuck = mu <= TINY
    pull = torch.where(stuck, torch.zeros_like(p), unit[:, 0] / p.clamp(min=FLOOR))
    reached = -(kappa * pull)[:, None] * unit[:, 1:] * inverse
    reached = torch.cat([torch.ones_like(reached[:, :1]), reached], dim=-1)
    rho = torch.where(stuck[:, None], _within_ties(unit, gain), reached)
    return Root(by_gain.top, value, *by_gain.restore(rho, pull))


def _within_ties(unit: Tensor, gain: Tensor) -> Tensor:
    """Return an eigenvector for D_2: orthogonal to u, on two coordinates whose gain is the second largest.

    If only one has that gain, or if u vanishes on both, one coordinate alone.
    """
    d = unit.shape[-1]
    rho = torch.zeros_like(unit)
    tied = gain[:, 0] == gain[:, 1]
    pairs = [(0, 1, tied)]
    if d > 2:
        pairs.append((1, 2, ~tied & (gain[:, 1] == gain[:, 2])))
    alone = torch.ones_like(tied)
    for a, b, here in pairs:
        size = torch.hypot(unit[:, a], unit[:, b])
        here = here & (size > 0)
        safe = torch.where(size > 0, size, torch.ones_like(size))
        rho[:, a] = torch.where(here, unit[:, b] / safe, rho[:, a])
        rho[:, b] = torch.where(here, -unit[:, a] / safe, rho[:, b])
        alone = alone & ~here
    rho[:, 1] = torch.where(alone, torch.ones_like(rho[:, 1]), rho[:, 1])
    return rho
