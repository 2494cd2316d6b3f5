"""The block of the original transformer, with the norm after the sum (BLK-POST)."""

from __future__ import annotations

import sympy as sp

from preln.theory.block import AXIOMS, a, b, c, g, norm_j, part1
from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import apply, d, delta, differentiate, i, inner, j, product, total
from preln.theory.norms import LN_FACTS, RMS_FACTS, eps, layer_jacobian, ones, rms_jacobian, s, x


@claim(
    "BLK-POST",
    title="Jacobian of a Post-LN block",
    statement="y = N(x + F(x)): J = G (I + A), G at x + F(x), A at x. sigma(J) <= g (1 + a). There is no "
    "identity path: with F = 0 J = G, which for LayerNorm is never I and for RMSNorm only where G = I, so L "
    "such blocks scale a gradient by up to prod g_k (1 + a_k), while Pre-LN keeps it between prod max(0, 1 "
    "- a_k g_k) and prod (1 + a_k g_k). What else is lost: with LayerNorm J is singular (y - beta over "
    "gamma has mean 0 on every token); with RMSNorm one token's smallest singular value is at most "
    "|gamma|_(1) eps/s^3 (1 + a).",
    assumptions=AXIOMS,
    uses=["RMS-SPEC", "LN-SPEC", "BLK-TOKENS", "STK-UPPER", "STK-LOWER"],
    source="own; Post-LN: Vaswani et al. 2017, Xiong et al. 2020",
)
def blk_post() -> list[Evidence]:
    """Differentiate through the outer norm; read the lost directions off the spectra."""
    proof = Symbolic("derivative of a rank-one branch inside the norm, by contraction")
    inside = inner(c, x)  # <c, x>: the branch adds b <c, x>

    def z(k: sp.Symbol) -> sp.Expr:
        return x[k] + b[k] * total(lambda m: c[m] * x[m])

    length = inner(x, x) + 2 * inside * inner(b, x) + inside**2 * inner(b, b)
    facts = {inner(x, x): d * (s**2 - eps) - (length - inner(x, x))}
    derived = differentiate(z(i) / sp.sqrt(total(lambda k: z(k) ** 2) / d + eps), x, j)

    def outer(p: sp.Symbol, q: sp.Symbol) -> sp.Expr:
        moved = [x[k] + b[k] * inside for k in (p, q)]
        return (delta(p, q) - moved[0] * moved[1] / (d * s**2)) / s

    def branch(p: sp.Symbol, q: sp.Symbol) -> sp.Expr:
        return delta(p, q) + b[p] * c[q]

    proof.equal("N(x + b <c, x>): J = G (I + A)", derived, product(outer, branch)(i, j), facts)
    without_branch = {b[i]: 0, b[j]: 0, inner(b, x): 0, inner(b, b): 0} | RMS_FACTS
    proof.equal(
        "no branch: J = G",
        product(outer, branch)(i, j).subs({b[i]: 0, b[j]: 0}),
        rms_jacobian(i, j),
        without_branch,
    )
    proof.reject(
        "J = I + G A",
        derived,
        delta(i, j) + product(outer, lambda p, q: b[p] * c[q])(i, j),
        facts,
        mutation="other",
    )
    proof.reject("J = (I + A) G", derived, product(branch, outer)(i, j), facts, mutation="other")
    proof.reject("no branch: J = I", rms_jacobian(i, j), delta(i, j), RMS_FACTS, mutation="term dropped")
    # The top direction of one token: <z, G w> = (eps/s^3) <z, w>, so |J^T z| <= (eps/s^3)(1 + a)|z|.
    left = apply(rms_jacobian, lambda k: x[k])(i)
    proof.equal("G z = (eps/s^3) z without a gain", left, x[i] * eps / s**3, RMS_FACTS)
    proof.reject("G z = 0", left, sp.S.Zero, RMS_FACTS, mutation="eps dropped")
    inner_size = sp.Symbol("sigma_IA", nonnegative=True)
    proof.equal("LayerNorm: B 1 = 0, so det J = 0", apply(layer_jacobian, ones)(i), sp.S.Zero, LN_FACTS)
    norms = Smt(
        "|G (I + A)| <= |G||I + A|, |I + A| <= 1 + |A|", [norm_j <= g * inner_size, inner_size <= 1 + a]
    )
    norms.show("sigma(J) <= g (1 + a)", norm_j <= g * (1 + a))
    small, first = sp.symbols("small gamma_1", nonnegative=True)
    # sigma_min(diag(gamma) B (I + A)) <= |gamma|_(1) sigma_min(B (I + A)) <= |gamma|_(1) (eps/s^3)(1 + a).
    norms.show(
        "smallest, RMSNorm",
        small <= first * eps / s**3 * (1 + a),
        small <= first * part1,
        part1 <= eps / s**3 * (1 + a),
    )
    norms.reject("sigma(J) <= 1 + a g", norm_j <= 1 + a * g, mutation="other")
    norms.reject("sigma(J) <= g", norm_j <= g, mutation="term dropped")
    norms.reject("gain dropped", norm_j <= 1 + a, mutation="gain dropped")
    norms.reject(
        "smallest with the gain dropped",
        small <= eps / s**3 * (1 + a),
        small <= first * part1,
        part1 <= eps / s**3 * (1 + a),
        mutation="gain dropped",
    )
    return [proof.evidence(), norms.evidence()]
