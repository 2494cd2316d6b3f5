"""RMSNorm against LayerNorm at the same x (CMP-SAME, CMP-PAPER and their companions).

Everything follows from ms = mu^2 + var and from the spectral norms of RMS-NORM, RMS-PAPER and LN-NORM-D3.
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic, counterexample
from preln.theory.index import d, inner
from preln.theory.instance import sigma_at
from preln.theory.norms import eps, mean, mean_square, mu, variance, x
from preln.theory.sigma import Q, var

s_rms = sp.Symbol("s_rms", positive=True)
s_ln = sp.Symbol("s_ln", positive=True)
rms = sp.Symbol("rms", nonnegative=True)
c = sp.Symbol("c", nonnegative=True)

PAPER = "Reassessing Layer Pruning in LLMs"
SAME_EPS = [sp.Eq(s_rms**2, mu**2 + var + eps), sp.Eq(s_ln**2, var + eps)]
PAPER_EPS = [sp.Eq(rms**2, mu**2 + var), sp.Eq(s_ln**2, var + eps), eps > 0]
PAPER_CLAIM = 1 / (rms + eps) <= 1 / s_ln


def _decomposition() -> Symbolic:
    proof = Symbolic("contraction")
    proof.equal("ms = mu^2 + var", mean_square(x), mean(x) ** 2 + variance(x))
    proof.reject("ms = var (mean forgotten)", mean_square(x), variance(x), mutation="centring dropped")
    proof.reject(
        "unbiased variance",
        mean_square(x),
        mean(x) ** 2 + variance(x) * d / (d - 1),
        mutation="dimension off by one",
    )
    proof.equal("mu and <1,x>", mean(x), inner(x) / d)
    return proof


@claim(
    "CMP-SAME",
    title="RMSNorm's spectral norm is at most LayerNorm's, same eps",
    statement="sigma(B_RMS) <= sigma(B_LN) at every x, with eps inside both roots; equal exactly where mu "
    "= 0.",
    assumptions=["d >= 3 (needed: CMP-SAME-LOWD)", "the same eps in both, var + eps > 0", "no gain"],
    uses=["RMS-NORM", "LN-NORM-D3"],
    source=PAPER + ", with the eps of the code",
)
def cmp_same() -> list[Evidence]:
    """Compare the denominators."""
    proof = Smt("1/s_rms against 1/s_ln", SAME_EPS)
    proof.show("1/s_rms <= 1/s_ln", 1 / s_rms <= 1 / s_ln)
    proof.show("equal exactly where mu = 0", sp.Equivalent(sp.Eq(s_rms, s_ln), sp.Eq(mu, 0)))
    proof.reject("the inequality turned", 1 / s_rms >= 1 / s_ln, mutation="inequality turned")
    proof.reject("strict", 1 / s_rms < 1 / s_ln, mutation="bound tightened")
    return [_decomposition().evidence(), proof.evidence()]


@claim(
    "CMP-SAME-LOWD",
    title="The same comparison in every dimension",
    statement="sigma(B_RMS) <= sigma(B_LN) with eps inside both roots, for every d >= 1 and every x.",
    assumptions=["the same eps in both, var + eps > 0", "no gain"],
    uses=["RMS-NORM", "LN-NORM-D3"],
    expect="refuted",
)
def cmp_same_lowd() -> list[Evidence]:
    """Evaluate d = 2, x = (1, -1), where LayerNorm has lost both its directions."""
    entries, e = [sp.Integer(1), sp.Integer(-1)], Q(9, 16)
    left, right = sigma_at("rms_norm", entries, e), sigma_at("layer_norm", entries, e)
    return [
        counterexample(
            check="sigma(B_RMS) <= sigma(B_LN)",
            violated=sp.Le(left, right),
            instance={"x": entries, "eps": e, "layers": ["rms_norm", "layer_norm"]},
            values={"sigma_rms": left, "sigma_ln": right},
            harmless={
                "x = (1, -1, 0) at d = 3": sp.Le(
                    *(sigma_at(k, [1, -1, 0], e) for k in ("rms_norm", "layer_norm"))
                )
            },
            sharp_condition="d >= 3 suffices for every x",
            corrected_by="CMP-SAME",
        )
    ]


@claim(
    "CMP-PAPER",
    title="The comparison with the paper's two eps conventions",
    statement="sigma(B_RMS) <= sigma(B_LN) at every x, RMSNorm with eps outside the root, LayerNorm with "
    "eps inside.",
    assumptions=["d >= 3", "the same eps > 0 in both", "no gain"],
    uses=["RMS-PAPER", "LN-NORM-D3"],
    source=PAPER,
    expect="refuted",
)
def cmp_paper() -> list[Evidence]:
    """Evaluate exact instances (x constant at d = 3, of mean 0 at d = 4); find the sharp condition."""
    sharp = {
        "sharp_condition": "holds at x exactly if mu^2 + 2 eps sqrt(mu^2 + var) + eps^2 >= eps",
        "corrected_by": "CMP-PAPER-LATE",
    }
    found = []
    for entries, e in (([Q(1, 8)] * 3, Q(1, 4)), ([Q(1, 8), Q(-1, 8)] * 2, Q(15, 64))):
        left, right = sigma_at("rms_norm_outside", entries, e), sigma_at("layer_norm", entries, e)
        found.append(
            counterexample(
                check="sigma(B_RMS, eps outside) <= sigma(B_LN)",
                violated=sp.Le(left, right),
                instance={"x": entries, "eps": e, "layers": ["rms_norm_outside", "layer_norm"]},
                values={"sigma_rms": left, "sigma_ln": right},
                **sharp,
            )
        )
    proof = Smt("1/(rms + eps) against 1/s_ln", PAPER_EPS)
    proof.show("sharp condition", sp.Equivalent(PAPER_CLAIM, mu**2 + 2 * eps * rms + eps**2 >= eps))
    proof.reject("for every x", PAPER_CLAIM, mutation="assumption dropped")
    proof.reject(
        "for every x with eps <= 1/1000", PAPER_CLAIM, eps <= Q(1, 1000), mutation="assumption dropped"
    )
    return [*found, proof.evidence()]


@claim(
    "CMP-PAPER-LATE",
    title="The paper's comparison where the variance is large",
    statement="With the paper's two eps conventions sigma(B_RMS) <= sigma(B_LN) wherever var >= 1/4, and "
    "so where var > 1. For a given eps the smallest constant is max(0, (1 - eps)/2)^2; over all eps > 0 "
    "it is 1/4.",
    assumptions=["d >= 3", "the same eps > 0 in both", "no gain"],
    uses=["RMS-PAPER", "LN-NORM-D3"],
    source=PAPER + "; the constant is this project's",
)
def cmp_paper_late() -> list[Evidence]:
    """Show that the constants suffice and that no smaller ones do."""
    proof = Smt("1/(rms + eps) against 1/s_ln", PAPER_EPS)
    proof.show("var > 1 suffices", PAPER_CLAIM, var > 1)
    proof.show("var >= 1/4 suffices for every eps", PAPER_CLAIM, var >= Q(1, 4))
    constant = sp.Piecewise(((1 - eps) ** 2 / 4, eps < 1), (0, True))
    proof.show("var >= max(0, (1 - eps)/2)^2 suffices", PAPER_CLAIM, sp.Ge(var, constant))
    # Below the constant the claim fails at mu = 0, whatever c is: no smaller constant works.
    proof.show(
        "it fails at mu = 0 for every var below the constant",
        sp.Not(PAPER_CLAIM),
        sp.Eq(mu, 0),
        eps < 1,
        sp.Lt(var, (1 - eps) ** 2 / 4),
    )
    # 1/4 is the supremum of the constants: for c < 1/4 the eps = (1/2)(1/2 - root c), root = sqrt(c), still
    # fails above c.
    root, small, v0 = (sp.Symbol(n, nonnegative=True) for n in ("root_c", "small", "v0"))
    size, spread = sp.Eq(2 * small, Q(1, 2) - root), sp.Eq(v0, (root + small / 2) ** 2)
    below = Smt(
        "witness eps = (1/2 - sqrt(c))/2, mu = 0, var = (sqrt(c) + eps/2)^2 for any c < 1/4",
        [sp.Eq(root**2, c), spread],
    )
    between = sp.And(v0 > c, v0 < (1 - small) ** 2 / 4, small > 0)
    below.show("its var is above c and below its eps's own constant", between, size, c < Q(1, 4))
    proof.reject("var >= 1/5 suffices", PAPER_CLAIM, var >= Q(1, 5), mutation="bound loosened")
    proof.reject(
        "var >= (1 - 2 eps)^2/4 suffices",
        PAPER_CLAIM,
        var >= (1 - 2 * eps) ** 2 / 4,
        eps < Q(1, 2),
        mutation="bound loosened",
    )
    proof.reject(
        "strict at the constant", 1 / (rms + eps) < 1 / s_ln, sp.Ge(var, constant), mutation="bound tightened"
    )
    below.reject("c = 1/4 has such a witness", between, size, c <= Q(1, 4), mutation="bound tightened")
    below.reject(
        "eps twice as large is a witness",
        between,
        sp.Eq(small, Q(1, 2) - root),
        c < Q(1, 4),
        mutation="other",
    )
    return [_decomposition().evidence(), proof.evidence(), below.evidence()]
