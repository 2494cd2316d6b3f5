"""The norms that models really use, brought back to the two plain ones (VAR-*)."""

from __future__ import annotations

import sympy as sp

from preln.theory.block import largest_part
from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.gains import gamma
from preln.theory.index import differentiate, i, j, vector
from preln.theory.norms import (
    LN_FACTS,
    RMS_FACTS,
    eps,
    layer_jacobian,
    layer_norm,
    rms_jacobian,
    rms_norm,
    s,
    x,
)

weight, bias = vector("w"), vector("b")
g1, g2 = sp.symbols("g1 g2", nonnegative=True)


@claim(
    "VAR-ONE-PLUS",
    title="A gain stored as 1 + w",
    statement="Gemma's RMSNorm and LayerNorm1P multiply by 1 + w_i: G = diag(1 + w) B, so every theorem "
    "with a gain holds with gamma = 1 + w. w = 0 gives sigma = 1/s (d >= 2 for RMSNorm, d >= 3 for "
    "LayerNorm), and the derivative of the output by w_i is the one by gamma_i. Read as a gain, w itself "
    "gives 0 there: bounds and magnitudes must use 1 + w.",
    assumptions=["s > 0"],
    uses=["RMS-JAC", "LN-JAC", "RMS-NORM", "LN-NORM-D3", "RMS-GAIN-BOUND", "LN-GAIN-BOUND"],
)
def var_one_plus() -> list[Evidence]:
    """Differentiate both layers with the stored weight."""
    proof = Symbolic("derivative of the definition by x_j and by the stored weight")
    stored = 1 + weight[i]
    for name, layer, matrix, facts in _plain_layers():
        derived = differentiate(stored * layer, x, j)
        proof.equal(f"{name}: dy_i/dx_j = (1 + w_i) B_ij", derived, stored * matrix, facts)
        by_weight = sp.diff(stored * layer, weight[i])
        proof.equal(f"{name}: derivative by w_i", by_weight, sp.diff(gamma[i] * layer, gamma[i]))
        proof.equal(f"{name}: w = 0 gives B", derived.subs(weight[i], 0), matrix, facts)
        proof.reject(f"{name}: gain w", derived, weight[i] * matrix, facts, mutation="other")
        proof.reject(f"{name}: gain dropped", derived, matrix, facts, mutation="gain dropped")
    return [proof.evidence()]


@claim(
    "VAR-HEADS",
    title="A norm on every head by itself (QK-norm)",
    statement="A norm applied to each of H slices of h entries has a block-diagonal Jacobian, each block "
    "the plain one with d = h and the slice's own s. So sigma is the largest of the heads' sigmas: with h "
    ">= 2 and no gain 1/min_h s_h for RMSNorm, h >= 3 for LayerNorm. For RMSNorm without gain it is never "
    "below the sigma of one norm over all H h entries, and equal to it exactly if all slices have one mean "
    "square.",
    assumptions=["every slice has s > 0"],
    uses=["RMS-NORM", "LN-NORM-D3"],
)
def var_heads() -> list[Evidence]:
    """Slices are parts that the norm acts on by themselves; compare the largest with one norm over all."""
    m1, m2, s1, s2, whole = sp.symbols("m1 m2 s1 s2 s_all", nonnegative=True)
    slices = [sp.Eq(s1**2, m1 + eps), sp.Eq(s2**2, m2 + eps), sp.Eq(whole**2, (m1 + m2) / 2 + eps), eps > 0]
    pooled = Smt("two slices of mean squares m1, m2 against one norm over both", slices)
    pooled.show("max(1/s1, 1/s2) >= 1/s_all", sp.Max(1 / s1, 1 / s2) >= 1 / whole)
    pooled.show(
        "equal exactly if m1 = m2", sp.Equivalent(sp.Eq(sp.Max(1 / s1, 1 / s2), 1 / whole), sp.Eq(m1, m2))
    )
    pooled.reject(
        "the same value always", sp.Eq(sp.Max(1 / s1, 1 / s2), 1 / whole), mutation="assumption dropped"
    )
    pooled.reject(
        "max(1/s1, 1/s2) <= 1/s_all", sp.Max(1 / s1, 1 / s2) <= 1 / whole, mutation="inequality turned"
    )
    return [largest_part("slice").evidence(), pooled.evidence()]


@claim(
    "VAR-PLAIN",
    title="Norms without bias or without gain",
    statement="A bias does not change the Jacobian. A layer without a gain is the one with gamma = 1, where "
    "RMS-GAIN-BOUND and LN-GAIN-BOUND leave one value: sigma = 1/s (d >= 2, d >= 3). A common factor c of "
    "all gains multiplies sigma by |c|.",
    assumptions=["s > 0"],
    uses=["RMS-JAC", "LN-JAC", "RMS-GAIN-BOUND", "LN-GAIN-BOUND"],
)
def var_plain() -> list[Evidence]:
    """Differentiate with a bias; put equal gains into the bounds."""
    proof = Symbolic("derivative of the definition with a bias")
    factor = sp.Symbol("c", real=True)
    for name, layer, matrix, facts in _plain_layers():
        derived = differentiate(gamma[i] * layer + bias[i], x, j)
        proof.equal(f"{name}: the bias drops out", derived, gamma[i] * matrix, facts)
        proof.equal(f"{name}: gamma = 1", derived.subs(gamma[i], 1), matrix, facts)
        proof.equal(f"{name}: a common factor", differentiate(factor * layer, x, j), factor * matrix, facts)
        added = differentiate(gamma[i] * layer + bias[i] * x[i], x, j)
        proof.reject(f"{name}: a bias that multiplies x", added, gamma[i] * matrix, facts, mutation="other")
        proof.reject(f"{name}: gain dropped", derived, matrix, facts, mutation="gain dropped")
    value = sp.Symbol("sigma", nonnegative=True)
    bounds = Smt("|gamma|_(k)/s <= sigma <= |gamma|_(1)/s", [value >= g2 / s, value <= g1 / s])
    bounds.show("equal gains leave one value", sp.Eq(value, g1 / s), sp.Eq(g1, g2))
    bounds.reject("unequal gains do too", sp.Eq(value, g1 / s), g1 >= g2, mutation="assumption dropped")
    return [proof.evidence(), bounds.evidence()]


def _plain_layers() -> list[tuple[str, sp.Expr, sp.Expr, dict[sp.Expr, sp.Expr]]]:
    return [
        ("RMSNorm", rms_norm(x), rms_jacobian(i, j), RMS_FACTS),
        ("LayerNorm", layer_norm(x), layer_jacobian(i, j), LN_FACTS),
    ]
