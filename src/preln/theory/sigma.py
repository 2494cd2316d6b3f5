"""Sigma of a norm's Jacobian without gain, read off its spectrum (RMS-NORM, RMS-PAPER, LN-NORM).

Which multiplicities are positive depends on d, so the dimension is part of every statement.
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic, counterexample
from preln.theory.index import d, differentiate, i, inner, j
from preln.theory.instance import sigma_at
from preln.theory.norms import (
    LN_SPECTRUM,
    LN_SPECTRUM_CONSTANT,
    OUTSIDE_FACTS,
    OUTSIDE_SPECTRUM,
    RMS_SPECTRUM,
    RMS_SPECTRUM_AT_0,
    eps,
    outside_jacobian,
    r,
    rms_norm_outside,
    s,
    x,
)
from preln.theory.spectrum import v

ms = sp.Symbol("ms", nonnegative=True)
var = sp.Symbol("var", nonnegative=True)
Q = sp.Rational

RMS_DENOMINATOR = sp.Eq(s**2, ms + eps)
LN_DENOMINATOR = sp.Eq(s**2, var + eps)
ONE_ENTRY_IS_CONSTANT = sp.Implies(sp.Eq(d, 1), sp.Eq(var, 0))

SIGMA_RMS = sp.Piecewise((RMS_SPECTRUM.largest(), ms > 0), (RMS_SPECTRUM_AT_0.largest(), True))
SIGMA_LN = sp.Piecewise((LN_SPECTRUM.largest(), var > 0), (LN_SPECTRUM_CONSTANT.largest(), True))


@claim(
    "RMS-NORM",
    title="Spectral norm of RMSNorm's Jacobian",
    statement="sigma(B) = 1/sqrt(ms + eps) for every d >= 2 and every x; for d = 1 exactly where x = 0 "
    "(else it is eps/s^3, which is smaller).",
    assumptions=["s = sqrt(ms + eps) > 0", "no gain"],
    uses=["RMS-SPEC"],
    source="Reassessing Layer Pruning in LLMs, with the eps of the code",
)
def rms_norm_sigma() -> list[Evidence]:
    """Compare the spectrum's entries, counting only spaces of positive dimension."""
    proof = Smt("the largest entry of RMS-SPEC among those with positive multiplicity", [RMS_DENOMINATOR])
    proof.show("never above 1/s", 1 / s >= SIGMA_RMS)
    proof.show(
        "equal exactly if d >= 2 or x = 0",
        sp.Equivalent(sp.Eq(SIGMA_RMS, 1 / s), sp.Or(d >= 2, sp.Eq(ms, 0))),
    )
    proof.show(
        "d = 1, x != 0: eps/s^3, smaller",
        sp.And(sp.Eq(SIGMA_RMS, eps / s**3), 1 / s > SIGMA_RMS),
        sp.Eq(d, 1),
        ms > 0,
    )
    proof.reject("for every d >= 1", sp.Eq(SIGMA_RMS, 1 / s), mutation="assumption dropped")
    proof.reject(
        "1/sqrt(ms) (eps forgotten)", sp.Eq(SIGMA_RMS**2 * ms, 1), d >= 2, ms > 0, mutation="eps dropped"
    )
    proof.reject("smaller than 1/s", 1 / s > SIGMA_RMS, d >= 2, mutation="bound tightened")
    return [proof.evidence()]


@claim(
    "RMS-PAPER",
    title="RMSNorm with eps outside the root",
    statement="For x/(sqrt(ms) + eps), eps > 0, the Jacobian has sigma(B) = 1/(sqrt(ms) + eps) for every "
    "d >= 2 and every x; for d = 1 exactly where x = 0. (Whether models compute this layer is "
    "RMS-PAPER-MODELS.)",
    assumptions=["eps > 0", "no gain", "d >= 2, or d = 1 and x = 0"],
    source="Reassessing Layer Pruning in LLMs",
)
def rms_paper() -> list[Evidence]:
    """Derive Jacobian and spectrum for x != 0, the derivative at 0 by a limit, and compare the entries."""
    proof = Symbolic(
        "derivative of the definition, spectrum by contraction; at x = 0 the difference quotient"
    )
    derived = differentiate(rms_norm_outside(x), x, j)
    proof.equal("dy_i/dx_j = B_ij for x != 0", derived, outside_jacobian(i, j), OUTSIDE_FACTS)
    OUTSIDE_SPECTRUM.prove(outside_jacobian, OUTSIDE_FACTS, [inner(v, x)], proof)
    positive = sp.Symbol("eps", positive=True)
    # y(h) - h/eps = -h r/(eps (r + eps)), so its length relative to |h| depends on r = rms(h) alone.
    rest = sp.together(1 / positive - 1 / (r + positive))
    proof.equal("remainder at 0 relative to |h|", rest, r / (positive * (r + positive)))
    proof.true("it tends to 0, so B = I/eps at x = 0", sp.limit(rest, r, 0, "+") == 0)
    proof.reject(
        "remainder relative to |h|^2 tends to 0", sp.limit(rest / r, r, 0, "+"), sp.S.Zero, mutation="other"
    )
    proof.reject(
        "rank-one term of eps inside",
        derived,
        outside_jacobian(i, j) + x[i] * x[j] * (1 / (d * r * (r + eps) ** 2) - 1 / (d * (r + eps) ** 3)),
        OUTSIDE_FACTS,
        mutation="eps moved",
    )
    # r = 0 stands for x = 0, where B = I/eps; the spectrum's own r is positive.
    root = sp.Symbol("r", nonnegative=True)
    largest = OUTSIDE_SPECTRUM.largest().subs(r, root)
    sigma = sp.Piecewise((largest, root > 0), (1 / eps, True))
    compare = Smt("largest entry of the spectrum among those with positive multiplicity", [eps > 0])
    bound = 1 / (root + eps)
    compare.show(
        "equal exactly if d >= 2 or x = 0", sp.Equivalent(sp.Eq(sigma, bound), sp.Or(d >= 2, sp.Eq(root, 0)))
    )
    compare.show("never above", sigma <= bound)
    compare.reject("for every d >= 1", sp.Eq(sigma, bound), mutation="assumption dropped")
    compare.reject("1/r (eps forgotten)", sp.Eq(sigma * root, 1), d >= 2, root > 0, mutation="eps dropped")
    return [proof.evidence(), compare.evidence()]


@claim(
    "RMS-PAPER-MODELS",
    title="Do models compute RMSNorm with eps outside?",
    statement="The layer that torch and transformers compute, x/sqrt(ms + eps) with eps > 0, has sigma(B) "
    "= 1/(sqrt(ms) + eps).",
    assumptions=["eps > 0", "no gain", "d >= 2"],
    uses=["RMS-NORM"],
    source="Reassessing Layer Pruning in LLMs, read as a statement about its models",
    expect="refuted",
)
def rms_paper_models() -> list[Evidence]:
    """Evaluate an exact instance; find when the two formulas agree."""
    root = sp.Symbol("r", nonnegative=True)
    proof = Smt("with r = sqrt(ms) and s = sqrt(r^2 + eps)", [sp.Eq(s**2, root**2 + eps), eps > 0])
    proof.show(
        "equal exactly if 2 sqrt(ms) + eps = 1", sp.Equivalent(sp.Eq(s, root + eps), sp.Eq(2 * root + eps, 1))
    )
    proof.show(
        "the paper's value is too large exactly if 2 sqrt(ms) + eps < 1",
        sp.Equivalent(1 / s < 1 / (root + eps), 2 * root + eps < 1),
    )
    proof.reject("always equal", sp.Eq(s, root + eps), mutation="assumption dropped")
    proof.reject(
        "the paper's value is never too small", 1 / s <= 1 / (root + eps), mutation="inequality turned"
    )
    entries, e = [sp.S.One, sp.S.One], Q(9, 16)
    actual, claimed = sigma_at("rms_norm", entries, e), 1 / (sp.Integer(1) + e)
    example = counterexample(
        check="sigma of the Jacobian of x/sqrt(ms + eps) equals 1/(sqrt(ms) + eps)",
        violated=sp.Eq(actual, claimed),
        instance={"layer": "rms_norm", "x": entries, "eps": e},
        values={"sigma": actual, "claimed": claimed},
        sharp_condition="equal exactly if 2 sqrt(ms) + eps = 1",
        corrected_by="RMS-NORM",
    )
    return [example, proof.evidence()]


@claim(
    "LN-NORM",
    title="Spectral norm of LayerNorm's Jacobian, as published",
    statement="sigma(B) = 1/sqrt(var + eps), for every d >= 1 and every x.",
    assumptions=["s = sqrt(var + eps) > 0", "no gain"],
    uses=["LN-SPEC"],
    source="Reassessing Layer Pruning in LLMs",
    expect="refuted",
)
def ln_norm() -> list[Evidence]:
    """Evaluate the smallest instances exactly: d = 1, and d = 2 with x not constant."""
    sharp = {"sharp_condition": "d >= 3, or d = 2 and x constant", "corrected_by": "LN-NORM-D3"}
    found = []
    for entries in ([sp.Integer(0)], [sp.Integer(1), sp.Integer(-1)]):
        e = Q(9, 16)
        spread = sum((a - sum(entries) / len(entries)) ** 2 for a in entries) / len(entries)
        actual, claimed = sigma_at("layer_norm", entries, e), 1 / sp.sqrt(spread + e)
        found.append(
            counterexample(
                check="sigma of the Jacobian of (x - mu)/sqrt(var + eps) equals 1/sqrt(var + eps)",
                violated=sp.Eq(actual, claimed),
                instance={"layer": "layer_norm", "x": entries, "eps": e},
                values={"sigma": actual, "claimed": claimed},
                **sharp,
            )
        )
    return [*found, _ln_sigma().evidence()]


@claim(
    "LN-NORM-D3",
    title="Spectral norm of LayerNorm's Jacobian, with its dimension",
    statement="sigma(B) = 1/sqrt(var + eps) exactly if d >= 3, or d = 2 and x is constant. For d = 2 and "
    "x not constant it is eps/s^3, for d = 1 it is 0; both are smaller.",
    assumptions=["s = sqrt(var + eps) > 0", "no gain"],
    uses=["LN-SPEC"],
    source="own, correcting Reassessing Layer Pruning in LLMs",
)
def ln_norm_d3() -> list[Evidence]:
    """Compare the spectrum's entries, counting only spaces of positive dimension."""
    return [_ln_sigma().evidence()]


def _ln_sigma() -> Smt:
    proof = Smt(
        "the largest entry of LN-SPEC among those with positive multiplicity",
        [LN_DENOMINATOR, ONE_ENTRY_IS_CONSTANT],
    )
    where = sp.Or(d >= 3, sp.And(sp.Eq(d, 2), sp.Eq(var, 0)))
    proof.show(
        "equal exactly if d >= 3, or d = 2 and x constant", sp.Equivalent(sp.Eq(SIGMA_LN, 1 / s), where)
    )
    proof.show("never above 1/s", 1 / s >= SIGMA_LN)
    proof.show("d = 2, x not constant: eps/s^3", sp.Eq(SIGMA_LN, eps / s**3), sp.Eq(d, 2), var > 0)
    proof.show("d = 1: 0", sp.Eq(SIGMA_LN, 0), sp.Eq(d, 1))
    proof.reject("for every d and x", sp.Eq(SIGMA_LN, 1 / s), mutation="assumption dropped")
    proof.reject("for every d >= 2", sp.Eq(SIGMA_LN, 1 / s), d >= 2, mutation="assumption dropped")
    proof.reject(
        "1/sqrt(var) (eps forgotten)", sp.Eq(SIGMA_LN**2 * var, 1), d >= 3, var > 0, mutation="eps dropped"
    )
    return proof
