"""Sigma with a gain, exactly: the largest root of a secular equation (RMS-GAIN, LN-GAIN).

(s G)(s G)^T = Gamma (P - kappa u u^T) Gamma with D = Gamma^2, kappa = 1 - t^2 and t = eps/s^2:

RMSNorm    P = I,                D - kappa z z^T,             z = Gamma u,  u = x/|x|
LayerNorm  P = I - 1 1^T/d,      D - kappa z z^T - g g^T/d,   g = Gamma 1,  u = xc/|xc|

Golub, "Some modified matrix eigenvalue problems" (1973), solves the rank-one case numerically.
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.gains import gamma
from preln.theory.index import apply, d, delta, dot, i, inner, j, product, vector
from preln.theory.instance import jacobian, sigma
from preln.theory.norms import LN_FACTS, RMS_FACTS, centring, eps, layer_jacobian, rms_jacobian, s, x, xc
from preln.theory.sigma import Q

t = eps / s**2
lam, lam2, kappa, top = (sp.Symbol(n, real=True) for n in ("lambda", "lambda2", "kappa", "D1"))
D, square = (sp.Symbol(n, nonnegative=True) for n in ("D", "z2"))
u, w = vector("u"), vector("w")
DEFINITIONS = "D_i = gamma_i^2, t = eps/s^2, kappa = 1 - t^2"


def _determinant_lemma(proof: Symbolic) -> None:
    """Two factorisations of one block matrix: det(E - Z K Z^T) = det(E) det(I - K Z^T E^-1 Z)."""
    E, F, Z, Y, K = sp.symbols("E F Z Y K", commutative=False)  # F = E^-1, Y = Z^T
    inverse = {E * F: sp.S.One, F * E: sp.S.One}
    one, none = sp.S.One, sp.S.Zero
    whole = ((E, Z), (K * Y, one))
    first = (((one, Z), (none, one)), ((E - Z * K * Y, none), (K * Y, one)))
    second = (((E, none), (K * Y, one)), ((one, F * Z), (none, one - K * Y * F * Z)))
    for name, (left, right) in (("upper times lower", first), ("lower times upper", second)):
        for a in range(2):
            for b in range(2):
                entry = sum(left[a][k] * right[k][b] for k in range(2))
                proof.equal(f"block matrix, {name}, entry {a + 1}{b + 1}", entry, whole[a][b], inverse)
    wrong = E * F * Z + Z * (one - K * Y * F * Z)
    proof.reject("factors in the wrong order", wrong, Z, inverse, mutation="other")
    proof.reject("E^-1 forgotten", E * Z, Z, inverse, mutation="term dropped")


def _term_questions(proof: Smt) -> None:
    """What one summand z^2/(lambda - D) of the secular function does."""
    proof.show("above D a term is not negative", square / (lam - D) >= 0, lam > D)
    same_side = sp.Or(sp.And(lam > D, lam2 > D), sp.And(lam < D, lam2 < D))
    proof.show("a term does not rise", square / (lam - D) >= square / (lam2 - D), lam < lam2, same_side)
    proof.show(
        "it falls where z != 0", square / (lam - D) > square / (lam2 - D), lam < lam2, same_side, square > 0
    )
    proof.reject(
        "a term does not rise across its pole",
        square / (lam - D) >= square / (lam2 - D),
        lam < lam2,
        sp.Ne(lam, D),
        sp.Ne(lam2, D),
        mutation="assumption dropped",
    )
    proof.reject(
        "it rises",
        square / (lam - D) <= square / (lam2 - D),
        lam < lam2,
        same_side,
        mutation="inequality turned",
    )


@claim(
    "RMS-GAIN",
    title="Sigma of RMSNorm with a gain, exactly",
    statement="With D_i = gamma_i^2, u = x/|x|, t = eps/s^2 and kappa = 1 - t^2, (s sigma(G))^2 is the "
    "largest root of prod_i (D_i - lambda) f(lambda), f(lambda) = 1 + kappa sum_i D_i u_i^2/(lambda - D_i). "
    "Let p be the coordinate of the largest D. If D_p is a tie, or u_p = 0, or x = 0, the root is D_p. "
    "Otherwise f falls strictly on (D_(2), D_p), to minus infinity at D_p; the root is the zero of f there, "
    "or D_(2) if f is nowhere positive there (then u = 0 wherever D_i = D_(2)). f is 1 or more above D_p.",
    assumptions=[
        "s > 0",
        "x != 0 (at x = 0 G = diag(gamma)/s)",
        "d >= 2 (for d = 1 the root is D_1 t^2)",
        DEFINITIONS,
    ],
    uses=["RMS-SPEC", "RMS-GAIN-BOUND"],
    source="own; rank-one secular equations: Golub 1973",
)
def rms_gain() -> list[Evidence]:
    """Square the Jacobian, apply the determinant lemma, follow f term by term."""
    proof = Symbolic("contraction; determinant lemma by two block factorisations")
    squared = s**2 * product(rms_jacobian, rms_jacobian)(i, j)
    proof.equal(
        "(s B)^2 = I - kappa u u^T",
        squared,
        delta(i, j) - (1 - t**2) * x[i] * x[j] / inner(x, x),
        RMS_FACTS,
    )
    _determinant_lemma(proof)

    # Eigenvector: w with (D_i - lambda) w_i = z_i; z is written through w, so no division is needed.
    def z(k: sp.Symbol) -> sp.Expr:
        return (gamma[k] ** 2 - lam) * w[k]

    def matrix(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
        return gamma[a] ** 2 * delta(a, b) - kappa * z(a) * z(b)

    image, weight = apply(matrix, lambda k: w[k])(i), dot(z, lambda k: w[k])
    proof.equal("M w - lambda w = z (1 - kappa <z,w>)", image - lam * w[i], z(i) * (1 - kappa * weight))

    def gained(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
        return gamma[a] ** 2 * delta(a, b) - kappa * gamma[a] * u[a] * gamma[b] * u[b]

    q = sp.Symbol("q", integer=True, positive=True)
    on_q = apply(gained, lambda k: delta(k, q))(i)
    proof.equal(
        "u_q = 0: M e_q = D_q e_q",
        on_q,
        gamma[q] ** 2 * delta(i, q),
        {u[q]: sp.S.Zero, gamma[i] ** 2 * delta(i, q): gamma[q] ** 2 * delta(i, q)},
    )
    # The solver's form: D/(lambda - D) = lambda/(lambda - D) - 1 turns f into lambda (P - kappa u_1^2/(D_1 -
    # lambda)).
    proof.equal("D/(lambda - D)", D / (lam - D), lam / (lam - D) - 1)
    head, tail = sp.symbols("u1 T", real=True)
    f = 1 - kappa + kappa * lam * (tail + head**2 / (lam - top))
    solved = lam * ((1 - kappa) / lam + kappa * tail - kappa * head**2 / (top - lam))
    proof.equal("f as the solver writes it", f, solved)
    proof.reject(
        "the solver's form without (1 - kappa)/lambda",
        f,
        lam * (kappa * tail - kappa * head**2 / (top - lam)),
        mutation="eps dropped",
    )
    proof.reject(
        "kappa = 1", squared, delta(i, j) - x[i] * x[j] / inner(x, x), RMS_FACTS, mutation="eps dropped"
    )
    proof.reject(
        "kappa = 1 - t",
        squared,
        delta(i, j) - (1 - t) * x[i] * x[j] / inner(x, x),
        RMS_FACTS,
        mutation="eps moved",
    )
    proof.reject(
        "rank-one term added", image - lam * w[i], z(i) * (1 + kappa * weight), mutation="inequality turned"
    )
    proof.reject("gain dropped", image, lam * w[i], {gamma[i]: 1}, mutation="gain dropped")
    _instance(proof, "rms_norm", [3, 4], [2, 1])

    terms = Smt("one summand of f, D one of the squares, z2 = kappa D u^2", [kappa >= 0])
    _term_questions(terms)
    terms.show(
        "one pole: below D_p the term tends to minus infinity",
        square / (lam - D) <= -1 / top,
        lam < D,
        lam >= D - square * top,
        square > 0,
        top > 0,
    )
    return [proof.evidence(), terms.evidence()]


@claim(
    "LN-GAIN",
    title="Sigma of LayerNorm with a gain, exactly",
    statement="With D_i = gamma_i^2, u = xc/|xc|, t = eps/s^2, kappa = 1 - t^2, z = Gamma u, g = Gamma 1 "
    "and h_ab = sum_i a_i b_i/(D_i - lambda): (s sigma(G))^2 is the largest root of prod_i (D_i - lambda) "
    "[(1 - kappa h_zz)(1 - h_gg/d) - kappa h_zg^2/d]. It lies between D_(3) and D_(1) for d >= 3; above "
    "D_(1) the bracket is 1 or more. For d = 2 it is t^2 (D_1 + D_2)/2.",
    assumptions=[
        "s > 0",
        "x not constant, so d >= 2 (for constant x G = Gamma C/s: kappa = 0, the z terms are absent)",
        DEFINITIONS,
    ],
    uses=["LN-SPEC", "LN-GAIN-BOUND"],
    source="own; rank-one secular equations: Golub 1973",
)
def ln_gain() -> list[Evidence]:
    """Square the Jacobian, apply the determinant lemma with two columns, bound the bracket above D_(1)."""
    proof = Symbolic("contraction; determinant lemma by two block factorisations")
    squared = s**2 * product(layer_jacobian, layer_jacobian)(i, j)
    length = d * (s**2 - eps)
    expected = centring(i, j) - (1 - t**2) * xc(i) * xc(j) / length
    proof.equal("(s B)^2 = C - kappa u u^T", squared, expected, LN_FACTS)
    _determinant_lemma(proof)
    p, q = vector("p"), vector("q")
    alpha, beta = sp.symbols("alpha beta", real=True)

    # (D_i - lambda) p_i = z_i and (D_i - lambda) q_i = g_i; an eigenvector is kappa alpha p + beta q/d.
    def z(k: sp.Symbol) -> sp.Expr:
        return (gamma[k] ** 2 - lam) * p[k]

    def g(k: sp.Symbol) -> sp.Expr:
        return (gamma[k] ** 2 - lam) * q[k]

    def candidate(k: sp.Symbol) -> sp.Expr:
        return kappa * alpha * p[k] + beta * q[k] / d

    def matrix(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
        return gamma[a] ** 2 * delta(a, b) - kappa * z(a) * z(b) - g(a) * g(b) / d

    image = apply(matrix, candidate)(i)
    rest = kappa * z(i) * (alpha - dot(z, candidate)) + g(i) * (beta - dot(g, candidate)) / d
    proof.equal(
        "M w - lambda w = kappa z (alpha - <z,w>) + g (beta - <g,w>)/d", image - lam * candidate(i), rest
    )
    zz, zg, gg = sp.symbols("h_zz h_zg h_gg", real=True)
    system = sp.Matrix([[1 - kappa * zz, -zg / d], [-kappa * zg, 1 - gg / d]])
    bracket = (1 - kappa * zz) * (1 - gg / d) - kappa * zg**2 / d
    proof.equal(
        "alpha = <z,w>, beta = <g,w> has a solution exactly if the bracket vanishes", system.det(), bracket
    )
    proof.reject(
        "the bracket without its last term",
        system.det(),
        (1 - kappa * zz) * (1 - gg / d),
        mutation="term dropped",
    )
    proof.reject("centring forgotten", squared, expected + 1 / d, LN_FACTS, mutation="centring dropped")
    proof.reject(
        "kappa = 1", squared, expected + (-(t**2)) * xc(i) * xc(j) / length, LN_FACTS, mutation="eps dropped"
    )
    proof.reject(
        "d - 1 for d",
        system.det(),
        (1 - kappa * zz) * (1 - gg / (d - 1)) - kappa * zg**2 / (d - 1),
        mutation="dimension off by one",
    )
    proof.reject("gain dropped", image, lam * candidate(i), {gamma[i]: 1}, mutation="gain dropped")
    _instance(proof, "layer_norm", [3, -1, -2], [2, 1, 3])
    _instance(proof, "layer_norm", [1, -1], [2, 1])

    pair = Q(1, 2) * sp.Matrix([[1, -1], [-1, 1]])  # u u^T for d = 2; C is the same matrix there
    weights, shrunk = sp.diag(*sp.symbols("gamma1:3", real=True)), sp.Symbol("t", nonnegative=True)
    small = weights * (pair - (1 - shrunk**2) * pair) * weights
    proof.equal("d = 2: rank one, so its trace is the root", small.det(), sp.S.Zero)
    proof.equal("d = 2: t^2 (D_1 + D_2)/2", small.trace(), shrunk**2 * (weights**2).trace() / 2)

    cauchy_schwarz = [zz <= 0, gg <= 0, zg**2 <= zz * gg]
    above = Smt("h_ab = sum a_i b_i/(D_i - lambda) with lambda above every D", [kappa >= 0])
    above.show("above D_(1) the bracket is 1 or more", bracket >= 1, *cauchy_schwarz)
    above.reject("without Cauchy-Schwarz", bracket >= 1, *cauchy_schwarz[:2], mutation="assumption dropped")
    above.reject("above 2", bracket >= 2, *cauchy_schwarz, mutation="bound tightened")
    _term_questions(above)
    return [proof.evidence(), above.evidence()]


def _instance(proof: Symbolic, layer: str, entries: list[int], weights: list[int]) -> None:
    """One exact vector, by the written-out definition: the secular polynomial's top root is sigma^2."""
    e, n = Q(1, 4), len(entries)
    gain = sp.diag(*weights)
    actual = sigma(gain * jacobian(layer, [sp.Integer(a) for a in entries], e))
    mean = Q(sum(entries), n) if layer == "layer_norm" else sp.S.Zero
    centred = [a - mean for a in entries]
    length = sum(a**2 for a in centred)
    denominator = sp.sqrt(length / sp.Integer(n) + e)
    k = 1 - (e / denominator**2) ** 2
    z = [weight * a / sp.sqrt(length) for weight, a in zip(weights, centred, strict=True)]

    def h(a: list[sp.Expr], b: list[sp.Expr]) -> sp.Expr:
        return sum(y * y2 / (weight**2 - lam) for y, y2, weight in zip(a, b, weights, strict=True))

    f = 1 - k * h(z, z)
    if layer == "layer_norm":
        f = f * (1 - h(weights, weights) / n) - k * h(z, weights) ** 2 / n
    polynomial = sp.Poly(sp.cancel(sp.together(f * sp.Mul(*[weight**2 - lam for weight in weights]))), lam)
    largest = max(polynomial.real_roots(), key=lambda value: value.evalf(30))
    gap = sp.Abs((largest - (denominator * actual) ** 2).evalf(40))
    proof.true(
        f"instance {layer} x = {entries}, gamma = {weights}, eps = 1/4: top root is (s sigma)^2",
        bool(gap < sp.Float("1e-30")),
    )
