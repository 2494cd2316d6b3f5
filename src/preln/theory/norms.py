"""RMSNorm and LayerNorm without gain: definition, Jacobian, spectrum (RMS-JAC, RMS-SPEC, LN-JAC, LN-SPEC).

RMSNorm    y_i = x_i / s          s = sqrt(ms + eps),     ms = <x,x>/d
outside    y_i = x_i / s          s = r + eps,            r = sqrt(ms)
LayerNorm  y_i = (x_i - mu) / s   s = sqrt(var + eps),    mu = <1,x>/d,  var = sum_k (x_k - mu)^2 / d
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Symbolic
from preln.theory.index import (
    Entry,
    Matrix,
    contract,
    d,
    delta,
    differentiate,
    i,
    inner,
    j,
    matrix_symbol_derivative,
    total,
    vector,
    without,
)
from preln.theory.spectrum import Eigenspace, Spectrum, v

x = vector("x")
eps = sp.Symbol("eps", nonnegative=True)
s = sp.Symbol("s", positive=True)
r = sp.Symbol("r", positive=True)
mu = sp.Symbol("mu", real=True)
NONZERO = "the layer's denominator s is positive (x != 0 or eps > 0)"


def mean_square(x: sp.IndexedBase) -> sp.Expr:
    """Return ms = <x,x>/d."""
    return total(lambda k: x[k] ** 2) / d


def mean(x: sp.IndexedBase) -> sp.Expr:
    """Return mu = <1,x>/d."""
    return total(lambda k: x[k]) / d


def variance(x: sp.IndexedBase) -> sp.Expr:
    """Return the biased variance of the entries."""
    return total(lambda k: (x[k] - mean(x)) ** 2) / d


def rms_norm(x: sp.IndexedBase) -> sp.Expr:
    """Return the i-th output of RMSNorm as torch and transformers compute it."""
    return x[i] / sp.sqrt(mean_square(x) + eps)


def rms_norm_outside(x: sp.IndexedBase) -> sp.Expr:
    """Return the i-th output of RMSNorm with eps outside the root."""
    return x[i] / (sp.sqrt(mean_square(x)) + eps)


def layer_norm(x: sp.IndexedBase) -> sp.Expr:
    """Return the i-th output of LayerNorm."""
    return (x[i] - mean(x)) / sp.sqrt(variance(x) + eps)


# What the inner products are in terms of the denominator: s^2 = ms + eps, and so on.
RMS_FACTS = {inner(x, x): d * (s**2 - eps)}
OUTSIDE_FACTS = {inner(x, x): d * r**2}
LN_FACTS = {inner(x, x): d * (s**2 - eps + mu**2), inner(x): d * mu}


def xc(k: sp.Symbol) -> sp.Expr:
    """Return the k-th entry of the centred x."""
    return x[k] - mu


def centring(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
    """Return the centring projector C = I - 1 1^T/d."""
    return delta(a, b) - 1 / d


def rms_jacobian(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
    """Return B of RMSNorm: (I - x x^T/(d s^2))/s."""
    return (delta(a, b) - x[a] * x[b] / (d * s**2)) / s


def outside_jacobian(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
    """Return B with eps outside the root, x != 0: (I - x x^T/(d r (r + eps)))/(r + eps)."""
    return (delta(a, b) - x[a] * x[b] / (d * r * (r + eps))) / (r + eps)


def layer_jacobian(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
    """Return B of LayerNorm: (C - xc xc^T/(d s^2))/s."""
    return (centring(a, b) - xc(a) * xc(b) / (d * s**2)) / s


def along_x(k: sp.Symbol) -> sp.Expr:
    """Return the entries of x."""
    return x[k]


def ones(k: sp.Symbol) -> sp.Expr:
    """Return the entries of the vector of ones."""
    return sp.S.One


def _spectrum(*lines: tuple[sp.Expr, Entry, str], rest: sp.Expr, orthogonal: str) -> Spectrum:
    spaces = [Eigenspace(value, sp.S.One, line, name) for value, line, name in lines]
    return Spectrum((Eigenspace(rest, d - len(lines), None, orthogonal), *spaces))


# Eigenvalues of the Jacobians; all are symmetric and none is negative, so they are the singular values too.
RMS_SPECTRUM = _spectrum((eps / s**3, along_x, "x"), rest=1 / s, orthogonal="everything orthogonal to x")
RMS_SPECTRUM_AT_0 = _spectrum(rest=1 / s, orthogonal="all of R^d")
OUTSIDE_SPECTRUM = _spectrum(
    (eps / (r + eps) ** 2, along_x, "x"), rest=1 / (r + eps), orthogonal="everything orthogonal to x"
)
LN_SPECTRUM = _spectrum(
    (eps / s**3, xc, "the centred x"),
    (sp.S.Zero, ones, "the ones"),
    rest=1 / s,
    orthogonal="everything orthogonal to x and the ones",
)
LN_SPECTRUM_CONSTANT = _spectrum(
    (sp.S.Zero, ones, "the ones"), rest=1 / s, orthogonal="orthogonal to the ones"
)


def constant_layer_jacobian(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
    """Return B of LayerNorm where x is constant: C/s."""
    return centring(a, b) / s


@claim(
    "RMS-JAC",
    title="Jacobian of RMSNorm",
    statement="The Jacobian of x/sqrt(ms + eps) is B = (I - x x^T/(d s^2))/s with s = sqrt(ms + eps), for "
    "every d >= 1.",
    assumptions=[NONZERO],
)
def rms_jac() -> list[Evidence]:
    """Differentiate the definition and contract."""
    proof = Symbolic("derivative of the definition by x_j in index notation")
    derived = differentiate(rms_norm(x), x, j)
    proof.equal("dy_i/dx_j = B_ij", derived, rms_jacobian(i, j), RMS_FACTS)
    trap = matrix_symbol_derivative(2)
    proof.true(
        "MatrixSymbol calculus gives delta_ij/s, the control below", trap[0, 1] == 0 and trap[0, 0] != 0
    )
    proof.reject(
        "rank-one term dropped (the MatrixSymbol answer)",
        derived,
        delta(i, j) / s,
        RMS_FACTS,
        mutation="term dropped",
    )
    proof.reject(
        "eps forgotten in the rank-one term",
        derived,
        (delta(i, j) - x[i] * x[j] / (d * (s**2 - eps))) / s,
        RMS_FACTS,
        mutation="eps dropped",
    )
    proof.reject(
        "d - 1 for d",
        derived,
        (delta(i, j) - x[i] * x[j] / ((d - 1) * s**2)) / s,
        RMS_FACTS,
        mutation="dimension off by one",
    )
    proof.reject(
        "x centred", derived, (delta(i, j) - xc(i) * xc(j) / (d * s**2)) / s, RMS_FACTS, mutation="other"
    )
    proof.reject(
        "definition with eps outside",
        differentiate(rms_norm_outside(x), x, j),
        rms_jacobian(i, j),
        {inner(x, x): d * r**2, s: r + eps},
        mutation="eps moved",
    )
    return [proof.evidence()]


@claim(
    "RMS-SPEC",
    title="Spectrum of RMSNorm's Jacobian",
    statement="The singular values of B are 1/s (d - 1 times, orthogonal to x) and eps/s^3 (once, along "
    "x) where x != 0, and 1/s (d times) at x = 0. With eps = 0 the one along x is 0.",
    assumptions=[NONZERO],
    uses=["RMS-JAC"],
)
def rms_spec() -> list[Evidence]:
    """Check the eigen-equations, the dimensions and two traces; at x = 0 and for eps = 0 too."""
    proof = Symbolic("eigen-equations by contraction; dimensions add up to d; traces of B and B^2")
    orthogonal = [inner(v, x)]
    RMS_SPECTRUM.prove(rms_jacobian, RMS_FACTS, orthogonal, proof)
    RMS_SPECTRUM_AT_0.prove(without(rms_jacobian, x), {}, [], proof)
    proof.equal("eps = 0 sends x to 0", (eps / s**3).subs(eps, 0), sp.S.Zero)
    proof.true("no eigenvalue is negative", all(space.value.is_nonnegative for space in RMS_SPECTRUM.spaces))
    image = _image(rms_jacobian, along_x)
    proof.reject("0 along x (eps forgotten)", image, sp.S.Zero, RMS_FACTS, mutation="eps dropped")
    proof.reject("1/s along x (rank-one term forgotten)", image, x[i] / s, RMS_FACTS, mutation="term dropped")
    proof.reject(
        "1/s on v not orthogonal to x",
        _image(rms_jacobian, lambda k: v[k]),
        v[i] / s,
        RMS_FACTS,
        mutation="assumption dropped",
    )
    proof.reject("multiplicities d and 1", (d + 1) * sp.S.One, d, mutation="dimension off by one")
    return [_with_spectrum(proof.evidence(), RMS_SPECTRUM, at_zero=RMS_SPECTRUM_AT_0)]


@claim(
    "LN-JAC",
    title="Jacobian of LayerNorm",
    statement="The Jacobian of (x - mu)/sqrt(var + eps) is B = (C - xc xc^T/(d s^2))/s with s = sqrt(var "
    "+ eps), C the centring projector and xc = C x, for every d >= 1.",
    assumptions=[NONZERO.replace("x != 0", "x not constant")],
)
def ln_jac() -> list[Evidence]:
    """Differentiate the definition and contract."""
    proof = Symbolic("derivative of the definition by x_j in index notation")
    derived = differentiate(layer_norm(x), x, j)
    proof.equal("dy_i/dx_j = B_ij", derived, layer_jacobian(i, j), LN_FACTS)
    proof.equal("C x = xc", contract(total(lambda k: centring(i, k) * x[k])), xc(i), LN_FACTS)
    proof.reject(
        "centring forgotten in C",
        derived,
        (delta(i, j) - xc(i) * xc(j) / (d * s**2)) / s,
        LN_FACTS,
        mutation="centring dropped",
    )
    proof.reject(
        "centring forgotten in x",
        derived,
        (centring(i, j) - x[i] * x[j] / (d * s**2)) / s,
        LN_FACTS,
        mutation="centring dropped",
    )
    proof.reject("rank-one term dropped", derived, centring(i, j) / s, LN_FACTS, mutation="term dropped")
    proof.reject(
        "eps forgotten",
        derived,
        (centring(i, j) - xc(i) * xc(j) / (d * (s**2 - eps))) / s,
        LN_FACTS,
        mutation="eps dropped",
    )
    proof.reject(
        "unbiased variance (d - 1)",
        derived,
        (centring(i, j) - xc(i) * xc(j) / ((d - 1) * s**2)) / s,
        LN_FACTS,
        mutation="dimension off by one",
    )
    return [proof.evidence()]


@claim(
    "LN-SPEC",
    title="Spectrum of LayerNorm's Jacobian",
    statement="The singular values of B are 1/s (d - 2 times, orthogonal to x and to the ones), eps/s^3 "
    "(once, along xc) and 0 (once, along the ones) where x is not constant, and 1/s (d - 1 times) and 0 "
    "(once) where it is.",
    assumptions=[NONZERO.replace("x != 0", "x not constant")],
    uses=["LN-JAC"],
)
def ln_spec() -> list[Evidence]:
    """Check the eigen-equations, the dimensions and two traces; for constant x too."""
    proof = Symbolic("eigen-equations by contraction; dimensions add up to d; traces of B and B^2")
    LN_SPECTRUM.prove(layer_jacobian, LN_FACTS, [inner(v, x), inner(v)], proof)
    LN_SPECTRUM_CONSTANT.prove(constant_layer_jacobian, {}, [inner(v)], proof)
    proof.equal(
        "constant x gives C/s", layer_jacobian(i, j), constant_layer_jacobian(i, j), {x[i]: mu, x[j]: mu}
    )
    proof.true("no eigenvalue is negative", all(space.value.is_nonnegative for space in LN_SPECTRUM.spaces))
    image = _image(layer_jacobian, xc)
    proof.reject("0 along xc (eps forgotten)", image, sp.S.Zero, LN_FACTS, mutation="eps dropped")
    proof.reject(
        "1/s along xc (rank-one term forgotten)", image, xc(i) / s, LN_FACTS, mutation="term dropped"
    )
    proof.reject(
        "1/s on the ones (centring forgotten)",
        _image(layer_jacobian, ones),
        1 / s,
        LN_FACTS,
        mutation="centring dropped",
    )
    proof.reject(
        "1/s on v orthogonal to x but not to the ones",
        _image(layer_jacobian, lambda k: v[k]),
        v[i] / s,
        LN_FACTS | {inner(v, x): sp.S.Zero},
        mutation="assumption dropped",
    )
    return [_with_spectrum(proof.evidence(), LN_SPECTRUM, constant=LN_SPECTRUM_CONSTANT)]


def _image(matrix: Matrix, u: Entry) -> sp.Expr:
    return contract(total(lambda k: matrix(i, k) * u(k)))


def _with_spectrum(evidence: Evidence, spectrum: Spectrum, **others: Spectrum) -> Evidence:
    tables = {"spectrum": spectrum.as_list()} | {f"spectrum_{k}": o.as_list() for k, o in others.items()}
    return Evidence(evidence.kind, evidence.outcome, evidence.detail | tables)
