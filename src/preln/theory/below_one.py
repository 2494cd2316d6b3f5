"""When a norm's Jacobian has sigma below 1, without and with a gain (CMP-LT1, CMP-LT1-GAIN)."""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.comparison import PAPER
from preln.theory.evidence import Smt, counterexample
from preln.theory.index import d
from preln.theory.instance import jacobian, sigma
from preln.theory.norms import eps, s
from preln.theory.sigma import LN_DENOMINATOR, ONE_ENTRY_IS_CONSTANT, SIGMA_LN, Q, var


@claim(
    "CMP-LT1",
    title="When LayerNorm's Jacobian has spectral norm below 1",
    statement="sigma(B_LN) < 1 exactly if: d >= 3 and var + eps > 1; or d = 2 and x is constant and eps > "
    "1; or d = 2, x is not constant and eps < (var + eps)^(3/2); or d = 1. In particular wherever var > 1.",
    assumptions=["s = sqrt(var + eps) > 0", "no gain (with a gain: CMP-LT1-GAIN)"],
    uses=["LN-SPEC"],
    source=PAPER,
)
def cmp_lt1() -> list[Evidence]:
    """Compare the largest entry of the spectrum with 1, dimension by dimension."""
    proof = Smt("largest entry of LN-SPEC against 1", [LN_DENOMINATOR, ONE_ENTRY_IS_CONSTANT])
    below = SIGMA_LN < 1
    proof.show("d >= 3: exactly if var + eps > 1", sp.Equivalent(below, var + eps > 1), d >= 3)
    proof.show(
        "d = 2, x constant: exactly if eps > 1", sp.Equivalent(below, eps > 1), sp.Eq(d, 2), sp.Eq(var, 0)
    )
    proof.show(
        "d = 2, x not constant: exactly if eps < s^3", sp.Equivalent(below, eps < s**3), sp.Eq(d, 2), var > 0
    )
    proof.show("d = 1: always", below, sp.Eq(d, 1))
    proof.show("wherever var > 1", below, var > 1)
    proof.reject(
        "exactly if var > 1 (eps forgotten)", sp.Equivalent(below, var > 1), d >= 3, mutation="eps dropped"
    )
    proof.reject(
        "exactly if var + eps >= 1 (not strict)",
        sp.Equivalent(below, var + eps >= 1),
        d >= 3,
        mutation="bound loosened",
    )
    proof.reject("everywhere", below, mutation="assumption dropped")
    proof.reject(
        "exactly if var + eps > 1 for every d",
        sp.Equivalent(below, var + eps > 1),
        mutation="assumption dropped",
    )
    return [proof.evidence()]


@claim(
    "CMP-LT1-GAIN",
    title="Does a variance above 1 keep sigma below 1 with a gain?",
    statement="sigma(G) < 1 wherever var > 1, G LayerNorm's Jacobian with its gain.",
    assumptions=["s = sqrt(var + eps) > 0"],
    uses=["LN-GAIN-BOUND"],
    source=PAPER + ", read with the learned gain",
    expect="refuted",
)
def cmp_lt1_gain() -> list[Evidence]:
    """Evaluate exact instances: d = 2 (the smallest where sigma is not 0) and d = 3."""
    found = []
    for entries, gain, e in (([Q(5, 4), Q(-5, 4)], [4, 4], Q(39, 16)), ([2, -1, -1], [2, 2, 2], Q(1, 4))):
        actual = sp.simplify(sigma(sp.diag(*gain) * jacobian("layer_norm", entries, e)))
        harmless = sp.simplify(sigma(jacobian("layer_norm", entries, e)))
        found.append(
            counterexample(
                check="sigma(diag(gamma) B_LN) < 1, at var > 1",
                violated=sp.Lt(actual, 1),
                instance={"layer": "layer_norm", "x": entries, "eps": e, "weight": gain},
                values={"sigma": actual, "var": sum(a**2 for a in entries) / sp.Integer(len(entries))},
                harmless={"without the gain": sp.Lt(harmless, 1)},
                sharp_condition="var + eps > |gamma|_(1)^2 suffices; d >= 3 needs var + eps > |gamma|_(3)^2",
                corrected_by="CMP-LT1-GAIN-SCALED",
            )
        )
    return [*found, _scaled().evidence()]


@claim(
    "CMP-LT1-GAIN-SCALED",
    title="How large the variance must be for sigma below 1 with a gain",
    statement="sigma(G) < 1 wherever var + eps > |gamma|_(1)^2 (LayerNorm) or ms + eps > |gamma|_(1)^2 "
    "(RMSNorm). It needs var + eps > |gamma|_(3)^2 for d >= 3 (ms + eps > |gamma|_(2)^2 for d >= 2). So "
    "with three (two) largest gains of one size it is exact.",
    assumptions=["s^2 = var + eps > 0 (LayerNorm, d >= 3), s^2 = ms + eps > 0 (RMSNorm, d >= 2)"],
    uses=["LN-GAIN-BOUND", "RMS-GAIN-BOUND"],
    source="own, correcting " + PAPER,
)
def cmp_lt1_gain_scaled() -> list[Evidence]:
    """Read it off the two gain bounds."""
    return [_scaled().evidence()]


def _scaled() -> Smt:
    value, first, later = sp.symbols("sigma gamma_1 gamma_k", nonnegative=True)
    bounds = [value >= later / s, value <= first / s, sp.Eq(s**2, var + eps), first >= later]
    proof = Smt(
        "|gamma|_(k)/s <= sigma <= |gamma|_(1)/s; k = 3 for LayerNorm, 2 for RMSNorm (var read as ms)", bounds
    )
    proof.show("var + eps > |gamma|_(1)^2 suffices", value < 1, var + eps > first**2)
    proof.show("var + eps > |gamma|_(k)^2 is needed", var + eps > later**2, value < 1)
    proof.show("exact with a tie", sp.Equivalent(value < 1, var + eps > first**2), sp.Eq(first, later))
    proof.reject("var > 1 suffices", value < 1, var > 1, mutation="gain dropped")
    proof.reject(
        "var + eps >= |gamma|_(1)^2 suffices", value < 1, var + eps >= first**2, mutation="bound loosened"
    )
    proof.reject(
        "var + eps > |gamma|_(k)^2 suffices", value < 1, var + eps > later**2, mutation="bound tightened"
    )
    proof.reject("var > |gamma|_(1)^2 is needed", var > first**2, value < 1, mutation="eps dropped")
    proof.reject(
        "sigma > 1 where var + eps > |gamma|_(1)^2",
        value > 1,
        var + eps > first**2,
        mutation="inequality turned",
    )
    return proof
