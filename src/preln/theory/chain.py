"""The gradient of a parameter as a chain of the Jacobians above it (STK-CHAIN)."""

from __future__ import annotations

import sympy as sp

from preln.theory.block import PAPER
from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Symbolic
from preln.theory.index import apply, contract, d, delta, dot, inner, total, vector
from preln.theory.norms import eps, s


@claim(
    "STK-CHAIN",
    title="The gradient of a block's parameters is a chain of Jacobians",
    statement="dL/dtheta_l = dL/dx_L J_{L-1} ... J_{l+1} dx_{l+1}/dtheta_l, later blocks on the left, for "
    "every number of blocks; the product is I for l = L - 1. It holds where theta_l enters through block l "
    "alone: for tied parameters it is one summand of several.",
    assumptions=["chain rule for one composition", "J_k = dx_{k+1}/dx_k", "theta_l is used by block l only"],
    source=PAPER,
)
def stk_chain() -> list[Evidence]:
    """Derive one composition from the definitions; induct over the blocks above in noncommuting symbols."""
    direct, chained, swapped = _one_composition()
    proof = Symbolic("L = <u, z + b <c, RMSNorm(z)>> with z = x + theta e, differentiated by theta directly")
    proof.equal("dL/dtheta = <u, J e>, J = I + A G at z", direct, chained, AT_Z)
    proof.reject("J^T in place of J", direct, swapped, AT_Z, mutation="other")
    proof.reject("the upper block forgotten", direct, inner(u, e), AT_Z, mutation="term dropped")
    top, below, here, last = sp.symbols("u P J T", commutative=False)
    # With P = J_{L-1} ... J_{l+2}: dL/dx_{l+2} = u P, hence dL/dx_{l+1} = (u P) J by the composition above.
    gradient = top * below * here
    proof.equal("one more block: u (P J) T", gradient * last, top * (below * here) * last)
    proof.reject("earlier blocks on the left", gradient * last, top * (here * below) * last, mutation="other")
    tied = sp.Symbol("T2", commutative=False)
    two_paths = gradient * last + top * tied
    proof.reject("tied parameters", two_paths, gradient * last, mutation="assumption dropped")
    return [proof.evidence()]


u, e, b, c, x = (vector(name) for name in "uebcx")
theta = sp.Symbol("theta", real=True)


def z(k: sp.Symbol) -> sp.Expr:
    """Return the entries of z = x + theta e: the output of block l, whose parameter is theta."""
    return x[k] + theta * e[k]


ZZ = inner(x, x) + 2 * theta * inner(e, x) + theta**2 * inner(e, e)  # |z|^2
AT_Z = {inner(x, x): d * (s**2 - eps) - (ZZ - inner(x, x))}


def _one_composition() -> tuple[sp.Expr, sp.Expr, sp.Expr]:
    """Return dL/dtheta by the definitions, <u, J e> and <u, J^T e>."""
    denominator = sp.sqrt(total(lambda m: z(m) ** 2) / d + eps)
    loss = total(lambda k: u[k] * (z(k) + b[k] * total(lambda m: c[m] * z(m)) / denominator))

    def norm(row: sp.Symbol, column: sp.Symbol) -> sp.Expr:
        return (delta(row, column) - z(row) * z(column) / (d * s**2)) / s

    def block(row: sp.Symbol, column: sp.Symbol) -> sp.Expr:
        return delta(row, column) + b[row] * dot(lambda k: c[k], lambda k: norm(k, column))

    direct = contract(sp.diff(loss, theta))
    chained = dot(lambda k: u[k], apply(block, lambda k: e[k]))
    swapped = dot(lambda k: e[k], apply(block, lambda k: u[k]))
    return direct, chained, swapped
