"""Angles between hidden states, and which block a rule picks (SIM-ANGLE, SIM-TRIANGLE, SIM-SUM).

Angular distance is the angle over pi, between 0 and 1.
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic, counterexample
from preln.theory.index import Entry, dot, inner, vector
from preln.theory.similarity import DEFINITION, cosine, rho, root

U = "The Unreasonable Ineffectiveness of the Deeper Layers"
ca, cb, cc = (sp.Symbol(f"cos_{k}", real=True) for k in "abc")
sa, sb = (sp.Symbol(f"sin_{k}", nonnegative=True) for k in "ab")
across, first, second, total = (
    sp.Symbol(n, nonnegative=True) for n in ("across", "first", "second", "total")
)
x, y, z = vector("x"), vector("y"), vector("z")


@claim(
    "SIM-ANGLE",
    title="A block turns the hidden state by at most arcsin of the update ratio",
    statement="With rho = |F|/|x| < 1 the angle between x and x + F is at most arcsin(rho), with equality "
    "exactly where <x,F> = -|F|^2. For rho = 1 it is below pi/2 where x + F != 0; for rho > 1 and d >= 2 "
    "every angle occurs.",
    assumptions=["x != 0", "for each token by itself"],
    uses=["SIM-BI"],
)
def sim_angle() -> list[Evidence]:
    """Cos of the angle is at least sqrt(1 - rho^2), by SIM-BI; arccos turns that around."""
    ratio = sp.Symbol("rho", nonnegative=True)
    proof = Symbolic("sin^2 + cos^2 = 1; arccos falls on [-1, 1]")
    proof.true(
        "cos(arcsin(rho)) = sqrt(1 - rho^2)", sp.simplify(sp.cos(sp.asin(ratio)) - sp.sqrt(1 - ratio**2)) == 0
    )
    value = sp.Symbol("c", real=True)
    proof.equal("arccos' < 0: it falls", sp.acos(value).diff(value), -1 / sp.sqrt(1 - value**2))
    proof.reject("cos(arcsin(rho)) = 1 - rho^2", sp.cos(sp.asin(ratio)), 1 - ratio**2, mutation="other")
    compare = Smt("cosine of the angle against root = sqrt(1 - rho^2)", DEFINITION)
    compare.show("cos >= sqrt(1 - rho^2)", cosine >= root)
    compare.show(
        "equal exactly if <x,F> = -|F|^2",
        sp.Equivalent(sp.Eq(cosine, root), sp.Eq(sp.Symbol("c", real=True), -(rho**2))),
    )
    compare.reject(
        "cos >= 1 - rho^2/2 (angle about rho)", cosine >= 1 - rho**2 / 2, mutation="bound tightened"
    )
    compare.reject("cos <= sqrt(1 - rho^2)", cosine <= root, mutation="inequality turned")
    turned, length, step = (
        sp.Symbol("C", real=True),
        sp.Symbol("r", real=True),
        sp.Symbol("step", nonnegative=True),
    )
    # A direction at cosine C from x, |x| = 1: r times it is x + F with |F| = rho if r^2 - 2 r C + 1 = rho^2.
    reach = [sp.Eq(step**2, turned**2 + rho**2 - 1), sp.Eq(length, turned + step), turned <= 1, turned >= -1]
    onto = sp.And(length > 0, sp.Eq(length**2 - 2 * length * turned + 1, rho**2))
    far = Smt("which directions x + F reaches", [])
    far.show("rho > 1: every direction", onto, *reach, rho > 1)
    at_one = [f for f in DEFINITION if f != (rho < 1)]
    far.show(
        "rho = 1: below a right angle", cosine > 0, *at_one, sp.Eq(rho, 1), sp.Symbol("c", real=True) > -1
    )
    far.reject("rho < 1: every direction", onto, *reach, mutation="assumption dropped")
    far.reject(
        "rho = 1: below 60 degrees",
        cosine >= sp.Rational(1, 2),
        *at_one,
        sp.Eq(rho, 1),
        mutation="bound tightened",
    )
    return [proof.evidence(), compare.evidence(), far.evidence()]


@claim(
    "SIM-TRIANGLE",
    title="The angular distance over a block is at most the sum over its layers",
    statement="angle(x_0, x_n) <= sum_k angle(x_k, x_{k+1}), for vectors that are not 0; the same holds for "
    "means over tokens. (When they are equal: SIM-SUM-ARC.)",
    assumptions=["the Gram matrix of three unit vectors is positive semidefinite"],
)
def sim_triangle() -> list[Evidence]:
    """Spherical triangle inequality from the Gram determinant; induct over layers."""
    gram = sp.Matrix([[1, ca, cc], [ca, 1, cb], [cc, cb, 1]])
    proof = Symbolic("determinant of the Gram matrix with sin^2 = 1 - cos^2")
    square = (1 - ca**2) * (1 - cb**2) - (cc - ca * cb) ** 2
    proof.equal("det = sin_a^2 sin_b^2 - (cos_c - cos_a cos_b)^2", gram.det(), square)
    proof.reject(
        "the product of cosines forgotten",
        gram.det(),
        (1 - ca**2) * (1 - cb**2) - cc**2,
        mutation="term dropped",
    )
    sines = [sp.Eq(sa**2, 1 - ca**2), sp.Eq(sb**2, 1 - cb**2)]
    compare = Smt("cos(a + b) = cos_a cos_b - sin_a sin_b; a + b <= pi, else there is nothing to show", sines)
    semidefinite = sa**2 * sb**2 - (cc - ca * cb) ** 2 >= 0
    compare.show("cos_c >= cos(a + b), so c <= a + b", cc >= ca * cb - sa * sb, semidefinite)
    compare.show(
        "equal exactly where the Gram determinant vanishes on that side",
        sp.Implies(sp.Eq(cc, ca * cb - sa * sb), sp.Eq(sa**2 * sb**2 - (cc - ca * cb) ** 2, 0)),
    )
    compare.show(
        "layer by layer",
        across <= total + second,
        across <= first + second,
        first <= total,
    )
    compare.reject(
        "c <= max(a, b): cos_c >= min(cos_a, cos_b)",
        cc >= sp.Min(ca, cb),
        semidefinite,
        mutation="bound tightened",
    )
    compare.reject("c >= a + b", cc <= ca * cb - sa * sb, semidefinite, mutation="inequality turned")
    compare.reject(
        "without semidefiniteness", cc >= ca * cb - sa * sb, cc <= 1, cc >= -1, mutation="assumption dropped"
    )
    return [proof.evidence(), compare.evidence()]


@claim(
    "SIM-SUM",
    title="Adding up adjacent distances against measuring across",
    statement="The block of n layers with the least sum of adjacent angular distances is the one with the "
    "least angular distance across it.",
    uses=["SIM-TRIANGLE"],
    source=U + ", as a retelling has it",
    expect="refuted",
)
def sim_sum() -> list[Evidence]:
    """Three layers, blocks of two: one turns forth and back, one turns a little once."""
    found = []
    for states in ([[1], [-1], [1], [1]], [[1, 0], [0, 1], [1, 0], [1, 1]]):
        adjacent = [_angular(states[k], states[k + 1]) for k in range(3)]
        sums = [adjacent[k] + adjacent[k + 1] for k in range(2)]
        over = [_angular(states[k], states[k + 2]) for k in range(2)]
        picked = [min(range(2), key=lambda k, table=table: table[k]) for table in (sums, over)]
        found.append(
            counterexample(
                check="argmin over start of the summed adjacent distances = argmin of the distance across, "
                "n = 2",
                violated=sp.Eq(picked[0], picked[1]),
                instance={"states": states, "size": 2},
                values={"sums": sums, "across": over, "by_sum": picked[0], "by_across": picked[1]},
                harmless={f"across <= sum from start {k}": sp.Le(over[k], sums[k]) for k in range(2)},
                sharp_condition="the sum is never less than the distance across; equal if the states lie in "
                "order on an arc of at most pi",
                corrected_by="SIM-SUM-ARC",
            )
        )
    return found


@claim(
    "SIM-SUM-ARC",
    title="When adding up and measuring across agree",
    statement="The summed adjacent distances are at least the distance across, so their least value bounds "
    "the least distance across from above. If within every block the states lie in order on one "
    "great-circle arc of at most pi, the two are equal and pick the same block.",
    uses=["SIM-TRIANGLE"],
    source="own, correcting " + U + " as retold",
)
def sim_sum_arc() -> list[Evidence]:
    """On an arc angles add up; equal tables have equal minima."""
    a, b = sp.symbols("a b", nonnegative=True)
    proof = Symbolic("angles on one arc from a fixed point")
    turned = _on_arc(a, b)
    proof.true(
        "cos of the angle between places a and b is cos(b - a)", sp.simplify(turned - sp.cos(b - a)) == 0
    )
    proof.reject("cos(b - a) = cos a cos b", turned, sp.cos(a) * sp.cos(b), mutation="term dropped")
    proof.equal("differences of places add up", (b - a) + (total - b), total - a)
    s1, s2, a1, a2 = sp.symbols("s1 s2 a1 a2", nonnegative=True)
    compare = Smt("two blocks: sums s1, s2 and distances across a1, a2", [a1 <= s1, a2 <= s2])
    compare.show("the least sum bounds the least distance across", sp.Min(a1, a2) <= sp.Min(s1, s2))
    compare.show(
        "equal tables pick the same block", sp.Equivalent(s1 < s2, a1 < a2), sp.Eq(a1, s1), sp.Eq(a2, s2)
    )
    compare.reject(
        "the same pick without an arc", sp.Equivalent(s1 < s2, a1 < a2), mutation="assumption dropped"
    )
    compare.reject(
        "the least sum is the least distance",
        sp.Eq(sp.Min(a1, a2), sp.Min(s1, s2)),
        mutation="assumption dropped",
    )
    compare.reject("turned", sp.Min(a1, a2) >= sp.Min(s1, s2), mutation="inequality turned")
    return [proof.evidence(), compare.evidence()]


def _on_arc(a: sp.Expr, b: sp.Expr) -> sp.Expr:
    """Return the inner product of cos(p) y + sin(p) z at two places p, y and z orthogonal unit vectors."""
    unit = {inner(y, y): sp.S.One, inner(z, z): sp.S.One, inner(y, z): sp.S.Zero}

    def at(place: sp.Expr) -> Entry:
        return lambda k: sp.cos(place) * y[k] + sp.sin(place) * z[k]

    return dot(at(a), at(b)).subs(unit)


def _angular(a: list[int], b: list[int]) -> sp.Expr:
    """Return the angle over pi, exactly."""
    left, right = sp.Matrix(a), sp.Matrix(b)
    return sp.acos(sp.simplify(left.dot(right) / (left.norm() * right.norm()))) / sp.pi
