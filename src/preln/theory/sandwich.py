"""Blocks with a norm after the branch: Gemma 2 and 3 and Peri-LN on both sides, OLMo 2 after only (BLK-*)."""

from __future__ import annotations

import sympy as sp

from preln.theory.block import (
    AXIOMS,
    a,
    b,
    c,
    g,
    g1,
    g2,
    m1,
    multiple,
    norm_j,
    norm_rest,
    part1,
    positive_part,
    v0,
    v1,
)
from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import d, delta, differentiate, dot, i, inner, j, product, total
from preln.theory.norms import eps, s, x

NO_BIAS = "norms without a bias (with one, its size adds to the update's)"
ms, top = sp.symbols("ms gamma_1", nonnegative=True)


def _update_size(proof: Smt) -> None:
    """|N2(f)|^2 = sum gamma_i^2 f_i^2/s^2 <= |gamma|_(1)^2 d ms/(ms + eps), whatever the branch computes."""
    square = sp.Symbol("update_ms", nonnegative=True)
    entry, own = sp.symbols("f_i gamma_i", real=True)
    proof.show(
        "entry by entry gamma_i^2 f_i^2 <= |gamma2|_(1)^2 f_i^2",
        own**2 * entry**2 <= top**2 * entry**2,
        own <= top,
        own >= -top,
    )
    out = [square <= top**2 * ms / s**2, sp.Eq(s**2, ms + eps)]
    proof.show("rms of the update <= |gamma2|_(1)", square <= top**2, *out)
    before, after, grown = (sp.Symbol(n, nonnegative=True) for n in ("rms_x", "rms_next", "rms_0_plus_sum"))
    step = [after <= before + sp.Symbol("rms_update", nonnegative=True), before <= grown]
    small = sp.Symbol("rms_update", nonnegative=True) <= top
    proof.show("so rms grows by at most |gamma2|_(1) a block", after <= grown + top, *step, small)
    proof.reject("rms does not grow", after <= grown, *step, small, mutation="term dropped")
    proof.reject("it is below |gamma2|_(1)/2", square <= top**2 / 4, *out, mutation="bound tightened")
    proof.reject("gain dropped", square <= 1, *out, mutation="gain dropped")
    proof.reject("it is at least |gamma2|_(1)", square >= top**2, *out, mutation="inequality turned")


@claim(
    "BLK-SANDWICH",
    title="Jacobian of a block with norms before and after the branch",
    statement="x + N2(F(N1(x))): J = I + G2 A G1, G2 at F(N1(x)). sigma(J) <= 1 + g2 a g1, sigma(J - I) <= "
    "g2 a g1, every singular value is at least max(0, 1 - g2 a g1); all are attained where G1 and G2 are "
    "multiples of I, by A = a I and, if g2 a g1 <= 1, by - a I. The update's root mean square is at most "
    "|gamma2|_(1) on every token, whatever the branch computes, so rms(x_L) <= rms(x_0) + sum over blocks "
    "of |gamma2|_(1): growth at most linear in depth.",
    assumptions=[*AXIOMS, NO_BIAS],
    uses=["BLK-PRE", "RMS-JAC", "LN-JAC"],
    source="own; the layout: Gemma 2, Peri-LN (Kim et al. 2025)",
)
def blk_sandwich() -> list[Evidence]:
    """Expand, bound, and bound the update's size by the outer norm's definition."""
    proof = Symbolic("derivative of N2(b <c, N1(x)>) by contraction; |RMSNorm(f)|^2 by contraction")
    s1 = sp.Symbol("s1", positive=True)
    facts = {inner(x, x): d * (s1**2 - eps), inner(b, b): d * (s**2 - eps) * s1**2 / inner(c, x) ** 2}

    def branch(k: sp.Symbol) -> sp.Expr:
        return b[k] * total(lambda m: c[m] * x[m]) / sp.sqrt(total(lambda m: x[m] ** 2) / d + eps)

    def first(p: sp.Symbol, q: sp.Symbol) -> sp.Expr:
        return (delta(p, q) - x[p] * x[q] / (d * s1**2)) / s1

    def outer(p: sp.Symbol, q: sp.Symbol) -> sp.Expr:
        return (delta(p, q) - b[p] * b[q] * (inner(c, x) / s1) ** 2 / (d * s**2)) / s

    update = branch(i) / sp.sqrt(total(lambda k: branch(k) ** 2) / d + eps)
    whole = product(product(outer, lambda p, q: b[p] * c[q]), first)(i, j)
    derived = differentiate(x[i] + update, x, j)
    proof.equal("J = I + G2 A G1", derived, delta(i, j) + whole, facts)
    proof.reject(
        "inner norm forgotten",
        derived,
        delta(i, j) + product(outer, lambda p, q: b[p] * c[q])(i, j),
        facts,
        mutation="term dropped",
    )
    for sign in (1, -1):
        sides = product(product(multiple(g2), multiple(sign * a)), multiple(g1))(i, j)
        proof.equal(
            f"A = {sign} a I, G_i = g_i I", delta(i, j) + sides, (1 + sign * g2 * a * g1) * delta(i, j)
        )
    normed = dot(lambda k: x[k] / s, lambda k: x[k] / s)
    proof.equal("|RMSNorm(f)|^2/d = ms/s^2", normed / d, inner(x, x) / (d * s**2))
    proof.reject("d forgotten", normed, inner(x, x) / (d * s**2), mutation="dimension off by one")
    norms = Smt("m1 = |G2 A G1| <= g2 a g1", [m1 <= g2 * a * g1, part1 <= m1 * v0])
    bound = g2 * a * g1
    norms.show("sigma(J - I) <= g2 a g1", norm_rest <= bound, norm_rest <= m1)
    norms.show("sigma(J) <= 1 + g2 a g1", norm_j <= 1 + bound, norm_j <= 1 + m1)
    norms.show("|J v| >= max(0, 1 - g2 a g1)|v|", v1 >= positive_part(1 - bound) * v0, v1 >= v0 - part1)
    norms.reject(
        "sigma(J - I) <= a g1 (outer norm forgotten)",
        norm_rest <= a * g1,
        norm_rest <= m1,
        mutation="term dropped",
    )
    norms.reject(
        "sigma(J - I) <= a (gains dropped)", norm_rest <= a, norm_rest <= m1, mutation="gain dropped"
    )
    norms.reject("sigma(J) <= g2 a g1", norm_j <= bound, norm_j <= 1 + m1, mutation="term dropped")
    _update_size(norms)
    return [proof.evidence(), norms.evidence()]


@claim(
    "BLK-AFTER",
    title="Jacobian of a block with a norm after the branch only",
    statement="x + N(F(x)) (OLMo 2): J = I + G A, G at F(x). sigma(J) <= 1 + g a, sigma(J - I) <= g a, "
    "every singular value is at least max(0, 1 - g a). g is taken at the branch's output F(x), not at the "
    "residual stream: a growing stream damps it only if F(x) grows with it. The update's root mean square "
    "is at most |gamma|_(1) on every token.",
    assumptions=[*AXIOMS, NO_BIAS],
    uses=["BLK-PRE", "RMS-JAC"],
    source="own; the layout: OLMo 2",
)
def blk_after() -> list[Evidence]:
    """Differentiate through the outer norm of a rank-one branch; bound as before."""
    proof = Symbolic("derivative of N(b <c, x>) by contraction")
    inside = inner(c, x)

    def branch(k: sp.Symbol) -> sp.Expr:
        return b[k] * total(lambda m: c[m] * x[m])

    facts = {inner(b, b): d * (s**2 - eps) / inside**2}
    derived = differentiate(x[i] + branch(i) / sp.sqrt(total(lambda k: branch(k) ** 2) / d + eps), x, j)

    def outer(p: sp.Symbol, q: sp.Symbol) -> sp.Expr:
        return (delta(p, q) - b[p] * b[q] * inside**2 / (d * s**2)) / s

    jacobian = delta(i, j) + product(outer, lambda p, q: b[p] * c[q])(i, j)
    proof.equal("J = I + G A, s of the branch's output", derived, jacobian, facts)
    proof.reject("identity path dropped", derived, jacobian - delta(i, j), facts, mutation="term dropped")
    proof.reject(
        "rank-one term of G dropped", derived, delta(i, j) + b[i] * c[j] / s, facts, mutation="term dropped"
    )
    stream = {inner(x, x): d * (s**2 - eps)}
    proof.reject("s of the residual stream", derived, jacobian, stream, mutation="other")
    norms = Smt("m1 = |G A| <= g a", [m1 <= g * a, part1 <= m1 * v0])
    norms.show("sigma(J - I) <= g a", norm_rest <= g * a, norm_rest <= m1)
    norms.show("sigma(J) <= 1 + g a", norm_j <= 1 + g * a, norm_j <= 1 + m1)
    norms.show("|J v| >= max(0, 1 - g a)|v|", v1 >= positive_part(1 - g * a) * v0, v1 >= v0 - part1)
    norms.reject("sigma(J - I) <= a", norm_rest <= a, norm_rest <= m1, mutation="gain dropped")
    norms.reject("|J v| >= |v|", v1 >= v0, v1 >= v0 - part1, mutation="term dropped")
    _update_size(norms)
    return [proof.evidence(), norms.evidence()]
