"""How alike a block's input and output can be (SIM-*).

x is the input, F the block's update, rho = |F|/|x| the update ratio, c = <x,F>/|x|^2.
Block influence is 1 - cos(x, x + F).
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import dot, inner, vector

x, F = vector("x"), vector("F")
rho = sp.Symbol("rho", nonnegative=True)
c = sp.Symbol("c", real=True)
size = sp.Symbol("|x|", positive=True)
FACTS = {inner(x, x): size**2, inner(F, F): rho**2 * size**2, inner(x, F): c * size**2}

cosine = sp.Symbol("cosine", real=True)
root = sp.Symbol("root", nonnegative=True)
DEFINITION = [
    sp.Eq(cosine * sp.Symbol("n", positive=True), 1 + c),
    sp.Eq(sp.Symbol("n", positive=True) ** 2, 1 + 2 * c + rho**2),
    sp.Eq(root**2, 1 - rho**2),
    c >= -rho,
    c <= rho,
    rho < 1,
]


@claim(
    "SIM-BI",
    title="Block influence is at most the square of the update ratio",
    statement="With rho = |F|/|x| < 1: 1 - cos(x, x + F) <= 1 - sqrt(1 - rho^2) <= rho^2. The first is an "
    "equality exactly where <x,F> = -|F|^2, which some F attains for every rho in [0, 1) if d >= 2; the "
    "second only at rho = 0. The constant 1/2 rho^2 does not suffice.",
    assumptions=["x != 0", "|<x,F>| <= |x||F| (Cauchy-Schwarz)", "for each token by itself"],
)
def sim_bi() -> list[Evidence]:
    """Contract |x + F|^2 and <x, x + F>; the solver decides the inequality in c and rho."""

    def after(k: sp.Symbol) -> sp.Expr:
        return x[k] + F[k]

    proof = Symbolic("contraction; the gap between the squares is a square")
    proof.equal("<x, x + F>", dot(lambda k: x[k], after), size**2 * (1 + c), FACTS)
    length = 1 + 2 * c + rho**2
    proof.equal("|x + F|^2", dot(after, after), size**2 * length, FACTS)
    proof.equal(
        "(1 + c)^2 - (1 - rho^2)|x + F|^2/|x|^2 = (c + rho^2)^2",
        (1 + c) ** 2 - (1 - rho**2) * length,
        (c + rho**2) ** 2,
    )
    e, f = sp.Symbol("root", positive=True), vector("f")
    # The witness F = -rho^2 x + rho root f, f a vector orthogonal to x and as long: it exists if d >= 2.
    witness = {inner(x, x): size**2, inner(f, f): size**2, inner(f, x): sp.S.Zero}

    def attains(k: sp.Symbol) -> sp.Expr:
        return -(rho**2) * x[k] + rho * e * f[k]

    on_circle = {e: sp.sqrt(1 - rho**2)}
    proof.equal("witness: |F| = rho |x|", dot(attains, attains).subs(on_circle), rho**2 * size**2, witness)
    proof.equal("witness: c = -rho^2", dot(lambda k: x[k], attains), -(rho**2) * size**2, witness)
    proof.reject("c = -rho", dot(lambda k: x[k], attains), -rho * size**2, witness, mutation="other")
    proof.reject(
        "<x,F> forgotten in |x + F|^2",
        dot(after, after),
        size**2 * (1 + rho**2),
        FACTS,
        mutation="term dropped",
    )

    compare = Smt("cos = (1 + c)/n with n^2 = 1 + 2c + rho^2; root = sqrt(1 - rho^2)", DEFINITION)
    compare.show("1 - cos <= 1 - root", 1 - cosine <= 1 - root)
    compare.show("equal exactly if c = -rho^2", sp.Equivalent(sp.Eq(cosine, root), sp.Eq(c, -(rho**2))))
    compare.show("-rho^2 is an admissible c", -(rho**2) >= -rho)
    compare.show("1 - root <= rho^2", 1 - root <= rho**2)
    compare.show("equal exactly if rho = 0", sp.Equivalent(sp.Eq(1 - root, rho**2), sp.Eq(rho, 0)))
    compare.reject("1 - cos <= rho^2/2", 1 - cosine <= rho**2 / 2, mutation="bound tightened")
    compare.reject(
        "1 - cos <= (1 - root)/2 (bound tightened)", 1 - cosine <= (1 - root) / 2, mutation="bound tightened"
    )
    compare.reject("1 - cos >= 1 - root (turned)", 1 - cosine >= 1 - root, mutation="inequality turned")
    without_limit = [premise for premise in DEFINITION if premise != (rho < 1)]
    turned = Smt(
        "as above, cos^2 against 1 - rho^2, rho up to 2", [*without_limit[:2], rho <= 2, c >= -rho, c <= rho]
    )
    turned.show("where 1 + c >= 0 and rho < 1, cos^2 >= 1 - rho^2", cosine**2 >= 1 - rho**2, c >= -1, rho < 1)
    turned.reject("rho < 1 forgotten: 1 - cos <= rho^2", 1 - cosine <= rho**2, mutation="assumption dropped")
    return [proof.evidence(), compare.evidence(), turned.evidence()]


@claim(
    "SIM-GLOBAL",
    title="One cosine over a flattened batch",
    statement="The cosine of two flattened batches is sum_t w_t cos_t with w_t = |x_t||y_t|/(|X||Y|) >= 0 "
    "and sum_t w_t <= 1, equal to 1 exactly if |y_t| is one multiple of |x_t| throughout. It differs from "
    "the mean of the cosines by less than 2, and by any amount in (0, 2) for some batch.",
    assumptions=["|X|, |Y| > 0; a token of length 0 has weight 0"],
)
def sim_global() -> list[Evidence]:
    """Cauchy-Schwarz on the lengths; a batch with one large token against many small ones."""
    nx, ny, r1, r2, q1, q2 = sp.symbols("|X| |Y| x1 x2 y1 y2", positive=True)
    c1, c2 = sp.symbols("cos1 cos2", real=True)
    proof = Symbolic("two tokens; more tokens add terms of the same form")
    weights = [r1 * q1 / (nx * ny), r2 * q2 / (nx * ny)]
    flattened = (r1 * q1 * c1 + r2 * q2 * c2) / (nx * ny)
    proof.equal("flattened cosine = sum w_t cos_t", flattened, weights[0] * c1 + weights[1] * c2)
    gap = (r1**2 + r2**2) * (q1**2 + q2**2) - (r1 * q1 + r2 * q2) ** 2
    proof.equal("1 - (sum w)^2 comes from a square", gap, (r1 * q2 - r2 * q1) ** 2)
    proof.reject("equal weights", flattened, (c1 + c2) / 2, mutation="other")
    proof.reject(
        "weights from |x_t| alone", flattened, (r1**2 * c1 + r2**2 * c2) / nx**2, mutation="term dropped"
    )

    n, p, delta_, big = sp.symbols("n p delta M2", positive=True)
    # n tokens: one of squared size M2 with cosine 1, n - 1 of size 1 with cosine -1.
    known = [
        sp.Eq(p, delta_ / 2 + 1 / n),
        sp.Eq(big * (1 - p), (n - 1) * p),
        delta_ < 2,
        n * (2 - delta_) > 2,
        n >= 2,
    ]
    whole, mean = (big - (n - 1)) / (big + n - 1), (2 - n) / n
    witness = Smt("delta in (0, 2), n > 2/(2 - delta), p = delta/2 + 1/n, M2 = (n - 1) p/(1 - p)", known)
    witness.show("p is a share, so M2 > 0 exists", sp.And(p > 0, p < 1))
    witness.show("the difference is delta", sp.Eq(whole - mean, delta_))
    witness.reject("with p = delta/2", sp.Eq(whole - mean + 1 / n, delta_), mutation="other")
    witness.reject("the difference stays below 1", whole - mean < 1, mutation="bound tightened")
    g, mu_c = sp.symbols("global mean", real=True)
    # mean = -1 forces every cosine to -1, and then the flattened one is at most 0.
    limit = Smt(
        "global = sum w_t cos_t, sum w_t <= 1, cos_t in [-1, 1]",
        [g <= 1, mu_c >= -1, sp.Implies(sp.Eq(mu_c, -1), g <= 0)],
    )
    limit.show("the difference is below 2", g - mu_c < 2)
    limit.reject("below 3/2", g - mu_c < sp.Rational(3, 2), mutation="bound tightened")
    limit.reject("never positive", g - mu_c <= 0, mutation="inequality turned")
    return [proof.evidence(), witness.evidence(), limit.evidence()]
