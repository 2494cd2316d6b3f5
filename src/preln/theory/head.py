"""What the final norm and the head make of a change in the last hidden state (PRN-HEAD).

By RMS-SPHERE the norm is a projection onto a sphere; two vectors brought to one length are apart by at most
twice their distance over the sum of their lengths (Dunkl and Williams 1964, with the constant 2 of
inner-product spaces).
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import d, dot, inner, vector
from preln.theory.norms import eps

p, q = (sp.Symbol(n, positive=True) for n in ("p", "q"))
apart, unit_apart, width, logits = (
    sp.Symbol(n, nonnegative=True) for n in ("apart", "unit_apart", "sigma_W", "logits")
)
cosine, root_d = sp.Symbol("cos", real=True), sp.Symbol("root_d", positive=True)
a, b, x, D = vector("a"), vector("b"), vector("x"), vector("D")


@claim(
    "PRN-HEAD",
    title="How far a change of the last hidden state can move the logits",
    statement="Final RMSNorm with gain gamma and head W_U turn a change D of x_L into a change of logits of "
    "at most sigma(W_U diag(gamma)) 2 sqrt(d)|D|/(sqrt(|x|^2 + d eps) + sqrt(|x + D|^2 + d eps)). The "
    "norm's part, 2 sqrt(d)|D| over the roots, is attained exactly where both roots are equal (or, with eps "
    "= 0, x and x + D point opposite ways). For LayerNorm the same holds with C x and C D for x and D; a "
    "bias drops out.",
    assumptions=["s > 0 at both points", "|W v| <= sigma(W)|v|"],
    uses=["RMS-SPHERE"],
)
def prn_head() -> list[Evidence]:
    """Reduce the inequality to a square; put the sphere's radius and the head in."""
    proof = Symbolic("unit vectors a/p and b/q with <a,b> = p q cos; contraction")
    facts = {inner(a, a): p**2, inner(b, b): q**2, inner(a, b): p * q * cosine}

    def units(k: sp.Symbol) -> sp.Expr:
        return a[k] / p - b[k] / q

    def difference(k: sp.Symbol) -> sp.Expr:
        return a[k] - b[k]

    gap = 4 * dot(difference, difference) - (p + q) ** 2 * dot(units, units)
    proof.equal(
        "4|a - b|^2 - (p + q)^2 |a/p - b/q|^2 = 2 (1 + cos)(p - q)^2",
        gap,
        2 * (1 + cosine) * (p - q) ** 2,
        facts,
    )
    # The appended entry is the same in both vectors, so the extended difference is (D, 0).
    appended = sp.sqrt(d * eps)
    proof.equal(
        "the extended vectors differ by D",
        dot(lambda k: D[k], lambda k: D[k]) + (appended - appended) ** 2,
        inner(D, D),
    )
    centred = dot(lambda k: D[k] - inner(D) / d, lambda k: D[k] - inner(D) / d)
    proof.equal("LayerNorm: |C D|^2 = |D|^2 - d mean^2", centred, inner(D, D) - inner(D) ** 2 / d)
    proof.reject(
        "with 3 in place of 4",
        3 * dot(difference, difference) - (p + q) ** 2 * dot(units, units),
        2 * (1 + cosine) * (p - q) ** 2,
        facts,
        mutation="bound tightened",
    )
    proof.reject("the gap is 0", gap, sp.S.Zero, facts, mutation="other")
    proof.reject("LayerNorm: |C D|^2 = |D|^2", centred, inner(D, D), mutation="centring dropped")
    chord = [
        unit_apart**2 * (p + q) ** 2 + 2 * (1 + cosine) * (p - q) ** 2 <= 4 * apart**2,
        cosine >= -1,
        cosine <= 1,
        root_d >= 1,
        logits <= width * root_d * unit_apart,
    ]
    bound = width * 2 * root_d * apart / (p + q)
    compare = Smt("p, q: lengths of the extended vectors; unit_apart: distance of the unit vectors", chord)
    compare.show("|a/p - b/q| <= 2|a - b|/(p + q)", unit_apart <= 2 * apart / (p + q))
    compare.show("the change of the logits", logits <= bound, unit_apart <= 2 * apart / (p + q))
    exact = sp.Eq(unit_apart**2 * (p + q) ** 2 + 2 * (1 + cosine) * (p - q) ** 2, 4 * apart**2)
    attained = sp.Equivalent(sp.Eq(unit_apart, 2 * apart / (p + q)), sp.Or(sp.Eq(p, q), sp.Eq(cosine, -1)))
    compare.show("attained exactly if p = q or cos = -1", attained, exact)
    compare.reject("with 1 in place of 2", unit_apart <= apart / (p + q), mutation="bound tightened")
    compare.reject(
        "gain dropped",
        logits <= bound / width,
        unit_apart <= 2 * apart / (p + q),
        width > 0,
        mutation="gain dropped",
    )
    compare.reject(
        "d forgotten",
        logits <= bound / root_d,
        unit_apart <= 2 * apart / (p + q),
        mutation="dimension off by one",
    )
    compare.reject("at least", unit_apart >= 2 * apart / (p + q), mutation="inequality turned")
    return [proof.evidence(), compare.evidence()]
