"""Bounds with a learned gain (RMS-GAIN-BOUND, LN-GAIN-BOUND): G = diag(gamma) B.

Upper bound: |diag(gamma) z| <= |gamma|_(1) |z| entry by entry, and sigma(B) <= 1/s. Lower bound: an explicit
vector, supported on the coordinates p, q (and m) with the largest |gamma|, on which B is just a division by
s.
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import Entry, Matrix, apply, d, delta, dot, i, total, vector
from preln.theory.instance import jacobian, sigma
from preln.theory.norms import LN_FACTS, RMS_FACTS, eps, layer_jacobian, ones, rms_jacobian, s, x, xc
from preln.theory.sigma import Q

gamma = vector("gamma")
p, q, m = (sp.Symbol(name, integer=True, positive=True) for name in "pqm")
DISTINCT = {delta(a, b): sp.S.Zero for a, b in ((p, q), (q, m), (p, m))}

# |gamma| squared at p, q, m; entries of x there; eps/s^2; squared lengths of parts of a unit vector.
g1, g2, g3 = (sp.Symbol(f"g{k}", nonnegative=True) for k in (1, 2, 3))
x1, x2, x3 = sp.symbols("x1:4", real=True)
t = sp.Symbol("t", nonnegative=True)
along, across, lost, top, length = (
    sp.Symbol(n, nonnegative=True) for n in ("along", "across", "lost", "top", "length")
)


def e(position: sp.Symbol) -> Entry:
    """Return the unit vector of a coordinate."""
    return lambda k: delta(k, position)


def gained(z: Entry) -> sp.Expr:
    """Return |diag(gamma) z|^2."""
    return dot(lambda k: gamma[k] * z(k), lambda k: gamma[k] * z(k))


def _attains_only_if(proof: Smt, *, parts: sp.Expr) -> None:
    """Equality with the upper bound puts w in the 1/s-space of B, B w on the largest gains.

    `parts` is |s B w|^2 by the spectrum of B for a unit vector w; `top` is the part of |s B w|^2 on those
    coordinates.
    """
    unit = [sp.Eq(along + across + lost, 1), sp.Eq(length, parts), top <= length, t < 1, g1 > g2]
    reaches = g1 * top + g2 * (length - top) >= g1
    proof.show(
        "reaching the upper bound puts w in the 1/s-space and s B w on the top coordinates",
        sp.Implies(reaches, sp.And(sp.Eq(across, 1), sp.Eq(top, length))),
        *unit,
    )
    proof.reject(
        "the same with t = eps/s^2 allowed to be 1",
        sp.Implies(reaches, sp.Eq(across, 1)),
        *unit[:3],
        t <= 1,
        g1 > g2,
        mutation="assumption dropped",
    )
    proof.reject(
        "the same with a tie at the top",
        sp.Implies(reaches, sp.Eq(top, length)),
        *unit[:4],
        g1 >= g2,
        mutation="assumption dropped",
    )


@claim(
    "RMS-GAIN-BOUND",
    title="Bounds on sigma of RMSNorm with gain",
    statement="|gamma|_(2)/s <= sigma(G) <= |gamma|_(1)/s for d >= 2, s = sqrt(ms + eps). The upper side "
    "is attained exactly if |gamma|_(1) = |gamma|_(2), or x is 0 at the coordinate p of the largest "
    "|gamma|. The lower side is attained if |gamma|_(1) = |gamma|_(2), or x is a multiple of e_p with "
    "|gamma|_(1) eps/s^2 <= |gamma|_(2); it is not attained where |gamma|_(1) > |gamma|_(2) and x is not "
    "0 at the coordinate of |gamma|_(2).",
    assumptions=["d >= 2 (the upper side holds for d = 1 too)", "s > 0"],
    uses=["RMS-SPEC", "RMS-NORM"],
)
def rms_gain_bound() -> list[Evidence]:
    """Contract with explicit vectors; compare squares."""

    def witness(k: sp.Symbol) -> sp.Expr:
        return x[q] * delta(k, p) - x[p] * delta(k, q)

    image = apply(rms_jacobian, witness)
    proof = Symbolic("explicit vectors w; B w and |diag(gamma) B w|^2 by contraction")
    proof.equal("w = x_q e_p - x_p e_q is orthogonal to x", dot(witness, lambda k: x[k]), sp.S.Zero, DISTINCT)
    proof.equal("B w = w/s", image(i), witness(i) / s, RMS_FACTS | DISTINCT)
    proof.equal("|w|^2", dot(witness, witness), x[q] ** 2 + x[p] ** 2, DISTINCT)
    proof.equal(
        "|s G w|^2",
        s**2 * gained(image),
        gamma[p] ** 2 * x[q] ** 2 + gamma[q] ** 2 * x[p] ** 2,
        RMS_FACTS | DISTINCT,
    )
    unit = apply(rms_jacobian, e(p))
    proof.equal("x_p = 0: B e_p = e_p/s", unit(i), e(p)(i) / s, {x[p]: sp.S.Zero})
    proof.equal("x_p = <x, e_p>", dot(lambda k: x[k], e(p)), x[p])
    a = sp.Symbol("a", real=True)
    along_p = _replace_vector(rms_jacobian, lambda k: a * delta(k, p))
    on_axis = DISTINCT | {a**2: d * (s**2 - eps)}
    proof.equal("x = a e_p: B e_q = e_q/s", apply(along_p, e(q))(i), e(q)(i) / s, on_axis)
    proof.equal("x = a e_p: B e_p = (eps/s^3) e_p", apply(along_p, e(p))(i), e(p)(i) * eps / s**3, on_axis)
    proof.reject(
        "w = x_p e_p - x_q e_q is orthogonal to x",
        dot(lambda k: x[p] * delta(k, p) - x[q] * delta(k, q), lambda k: x[k]),
        sp.S.Zero,
        DISTINCT,
        mutation="other",
    )
    proof.reject(
        "gain forgotten in |s G w|^2",
        s**2 * gained(image),
        x[q] ** 2 + x[p] ** 2,
        RMS_FACTS | DISTINCT,
        mutation="gain dropped",
    )
    proof.reject("B e_p = e_p/s without x_p = 0", unit(i), e(p)(i) / s, mutation="assumption dropped")

    compare = Smt("squares; g1 >= g2 the two largest gamma^2, x1 and x2 the entries of x there", [g1 >= g2])
    stretched, size = g1 * x2**2 + g2 * x1**2, x1**2 + x2**2
    compare.show("|s G w|^2 >= |gamma|_(2)^2 |w|^2", stretched >= g2 * size)
    compare.show("x_p = x_q = 0: |s G e_p|^2 >= |gamma|_(2)^2", g1 >= g2)
    compare.show(
        "strictly where |gamma|_(1) > |gamma|_(2) and x_q != 0", stretched > g2 * size, g1 > g2, sp.Ne(x2, 0)
    )
    compare.show(
        "upper, entry by entry: gamma_k^2 z^2 <= |gamma|_(1)^2 z^2", g3 * x3**2 <= g1 * x3**2, g3 <= g1
    )
    compare.show("upper, |s B w| <= |w|", t**2 * along + across <= along + across, t <= 1)
    compare.show("a tie makes the sides equal", sp.Eq(g1, g2), g1 <= g2)
    _attains_only_if(compare, parts=across + t**2 * along)
    compare.reject("lower bound |gamma|_(1)", stretched >= g1 * size, mutation="bound tightened")
    compare.reject("upper bound |gamma|_(2)", stretched <= g2 * size, mutation="bound tightened")
    compare.reject(
        "strict with x_q = 0 allowed", stretched > g2 * size, g1 > g2, size > 0, mutation="assumption dropped"
    )
    return [proof.evidence(), compare.evidence()]


@claim(
    "LN-GAIN-BOUND",
    title="Bounds on sigma of LayerNorm with gain",
    statement="|gamma|_(3)/s <= sigma(G) <= |gamma|_(1)/s for d >= 3, s = sqrt(var + eps). The upper side "
    "is attained exactly if gamma = 0, or |gamma|_(1) = |gamma|_(3), or |gamma|_(1) = |gamma|_(2) > "
    "|gamma|_(3) and x has equal entries at those two coordinates. The lower side is attained only if "
    "|gamma|_(2) = |gamma|_(3), as gamma = (2, 1, 1), x = (2, -1, -1), eps = 1/4 does.",
    assumptions=["d >= 3 (the upper side holds for every d)", "s > 0"],
    uses=["LN-SPEC", "LN-NORM-D3"],
)
def ln_gain_bound() -> list[Evidence]:
    """Contract with explicit vectors; compare squares; one exact instance for the lower side."""

    def witness(k: sp.Symbol) -> sp.Expr:
        return (x[q] - x[m]) * delta(k, p) + (x[m] - x[p]) * delta(k, q) + (x[p] - x[q]) * delta(k, m)

    def pair(k: sp.Symbol) -> sp.Expr:
        return delta(k, p) - delta(k, q)

    facts = LN_FACTS | DISTINCT
    image = apply(layer_jacobian, witness)
    parts = (x[q] - x[m], x[m] - x[p], x[p] - x[q])
    gains = (gamma[p], gamma[q], gamma[m])
    proof = Symbolic("explicit vectors w; B w and |diag(gamma) B w|^2 by contraction")
    proof.equal("w is orthogonal to the ones", total(witness), sp.S.Zero, facts)
    proof.equal("w is orthogonal to xc", dot(witness, xc), sp.S.Zero, facts)
    proof.equal("B w = w/s", image(i), witness(i) / s, facts)
    proof.equal("|w|^2", dot(witness, witness), sum(c**2 for c in parts), facts)
    proof.equal(
        "|s G w|^2", s**2 * gained(image), sum((g * c) ** 2 for g, c in zip(gains, parts, strict=True)), facts
    )
    equal = facts | {x[q]: x[p]}
    proof.equal(
        "x_p = x_q: B (e_p - e_q) = (e_p - e_q)/s", apply(layer_jacobian, pair)(i), pair(i) / s, equal
    )
    proof.equal(
        "|s G (e_p - e_q)|^2",
        s**2 * gained(apply(layer_jacobian, pair)),
        gamma[p] ** 2 + gamma[q] ** 2,
        equal,
    )
    proof.equal("<1, e_p> = 1, so no multiple of e_p is orthogonal to the ones", dot(ones, e(p)), sp.S.One)
    proof.reject(
        "B (e_p - e_q) = (e_p - e_q)/s with x_p != x_q",
        apply(layer_jacobian, pair)(i),
        pair(i) / s,
        facts,
        mutation="assumption dropped",
    )
    proof.reject(
        "centring forgotten: w = x_q e_p - x_p e_q",
        total(lambda k: x[q] * delta(k, p) - x[p] * delta(k, q)),
        sp.S.Zero,
        facts,
        mutation="centring dropped",
    )
    proof.reject(
        "gain forgotten", s**2 * gained(image), sum(c**2 for c in parts), facts, mutation="gain dropped"
    )

    compare = Smt("squares; g1 >= g2 >= g3 the three largest gamma^2", [g1 >= g2, g2 >= g3])
    u1, u2, u3 = x2 - x3, x3 - x1, x1 - x2
    stretched, size = g1 * u1**2 + g2 * u2**2 + g3 * u3**2, u1**2 + u2**2 + u3**2
    compare.show("|s G w|^2 >= |gamma|_(3)^2 |w|^2", stretched >= g3 * size)
    compare.show("equal entries: |s G (e_p - e_q)|^2 >= |gamma|_(3)^2 |e_p - e_q|^2", g1 + g2 >= 2 * g3)
    compare.show(
        "strictly where |gamma|_(2) > |gamma|_(3)",
        sp.And(sp.Implies(size > 0, stretched > g3 * size), g1 + g2 > 2 * g3),
        g2 > g3,
    )
    compare.show("upper, |s B w| <= |w|", t**2 * along + across <= along + across + lost, t <= 1)
    compare.show(
        "upper attained by e_p - e_q if x_p = x_q and the two tie", sp.Eq(g1 + g2, 2 * g1), sp.Eq(g1, g2)
    )
    _attains_only_if(compare, parts=across + t**2 * along)
    w1, w2 = sp.symbols("w1:3", real=True)
    compare.show(
        "two top coordinates orthogonal to the ones and to xc need equal entries",
        sp.Eq(x1, x2),
        sp.Eq(w1 + w2, 0),
        sp.Eq(w1 * x1 + w2 * x2, 0),
        sp.Ne(w1, 0),
    )
    compare.reject("lower bound |gamma|_(2)", stretched >= g2 * size, mutation="bound tightened")
    compare.reject(
        "strict with |gamma|_(2) = |gamma|_(3)",
        sp.Implies(size > 0, stretched > g3 * size),
        mutation="assumption dropped",
    )
    compare.reject(
        "one top coordinate is enough", sp.Eq(w1, 0), sp.Eq(w1 * x1, 0), mutation="assumption dropped"
    )

    entries, e0, weights = [2, -1, -1], Q(1, 4), sp.diag(2, 1, 1)
    attained = sigma(weights * jacobian("layer_norm", entries, e0))
    proof.true("lower side attained: gamma = (2, 1, 1), x = (2, -1, -1), eps = 1/4", attained == Q(2, 3))
    return [proof.evidence(), compare.evidence()]


def _replace_vector(matrix: Matrix, entry: Entry) -> Matrix:
    """Put a given vector in the place of x."""

    def replaced(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
        return matrix(a, b).replace(
            lambda z: isinstance(z, sp.Indexed) and z.base == x, lambda z: entry(z.indices[0])
        )

    return replaced
