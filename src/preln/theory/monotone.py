"""Whether the hidden-state gradient shrinks with depth (STK-GRADIENT-MONOTONE and its correction)."""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic, counterexample
from preln.theory.index import apply, delta, dot, i, total, vector
from preln.theory.instance import jacobian
from preln.theory.sigma import Q
from preln.theory.stack import PAPER, a, g


@claim(
    "STK-GRADIENT-MONOTONE",
    title="Does the hidden-state gradient never grow with depth?",
    statement="|dL/dx_l| >= |dL/dx_{l+1}| for every block of every Pre-LN stack and every loss.",
    source=PAPER,
    expect="refuted",
)
def stk_gradient_monotone() -> list[Evidence]:
    """Evaluate one linear branch exactly."""
    found = []
    for x, e, branch, upstream in (
        ([Q(7, 5), sp.Integer(0)], Q(1, 50), sp.eye(2) * Q(-1, 2), sp.Matrix([0, 1])),
        ([sp.Integer(0)], sp.Integer(1), sp.Matrix([[Q(-1, 2)]]), sp.Matrix([1])),
    ):
        norm = jacobian("rms_norm", x, e)
        block = sp.eye(len(x)) + branch * norm
        before, after = (block.T * upstream).norm(), upstream.norm()
        found.append(
            counterexample(
                check="|dL/dx_l| >= |dL/dx_{l+1}| for the block x -> x + A rms_norm(x)",
                violated=sp.Ge(before, after),
                instance={
                    "layer": "rms_norm",
                    "x": x,
                    "eps": e,
                    "branch": branch.tolist(),
                    "upstream": list(upstream),
                },
                values={"gradient_norm_before": before, "gradient_norm_after": after},
                sharp_condition="for every loss exactly if M + M^T + M M^T >= 0, M = A G",
                corrected_by="STK-GRADIENT-MONOTONE-PSD",
            )
        )
    return [*found, _gradient_identity().evidence()]


@claim(
    "STK-GRADIENT-MONOTONE-PSD",
    title="When the hidden-state gradient never grows with depth",
    statement="With J = I + M, M = A G: |dL/dx_l|^2 - |dL/dx_{l+1}|^2 = <u, (M + M^T + M M^T) u> with u = "
    "dL/dx_{l+1}. So the gradient does not grow with l across this block for every loss exactly if M + "
    "M^T + M M^T is positive semidefinite, and in a stack if that holds for each block. M + M^T >= 0 "
    "suffices. In any case (1 - a g)|u| <= |dL/dx_l| <= (1 + a g)|u|.",
    assumptions=["dL/dx_l = J^T dL/dx_{l+1}", "operator norm axioms", "a = sigma(A), g = sigma(G)"],
    source="own, correcting " + PAPER,
)
def stk_gradient_monotone_psd() -> list[Evidence]:
    """Contract the identity; chain it; bound it by the triangle inequality."""
    back, here, norm_m, quadratic, square = (
        sp.Symbol(n, real=True) for n in ("back", "u", "Mu", "quadratic", "MMu")
    )
    positive = [back >= 0, here >= 0, norm_m >= 0]
    proof = Smt("lengths; back = |J^T u|, u = |u|, Mu = |M^T u|", positive)
    proof.show(
        "the identity turns semidefiniteness into monotony",
        sp.Equivalent(back >= here, quadratic >= 0),
        sp.Eq(back**2 - here**2, quadratic),
    )
    proof.show(
        "M + M^T >= 0 suffices, as |M^T u|^2 >= 0",
        quadratic + square >= 0,
        quadratic >= 0,
        sp.Eq(square, norm_m**2),
    )
    triangle = [back <= here + norm_m, here <= back + norm_m, norm_m <= a * g * here]
    proof.show(
        "triangle inequality", sp.And((1 - a * g) * here <= back, back <= (1 + a * g) * here), *triangle
    )
    l1, l2, l3 = (sp.Symbol(f"l{k}", nonnegative=True) for k in range(3))
    proof.show("blocks chain", l1 >= l3, l1 >= l2, l2 >= l3)
    proof.reject(
        "monotone whenever a g < 1", back >= here, a * g < 1, *triangle, mutation="assumption dropped"
    )
    proof.reject(
        "M M^T forgotten: exactly if M + M^T >= 0",
        sp.Equivalent(back >= here, quadratic >= 0),
        sp.Eq(back**2 - here**2, quadratic + square),
        sp.Eq(square, norm_m**2),
        mutation="term dropped",
    )
    return [_gradient_identity().evidence(), proof.evidence()]


def _gradient_identity() -> Symbolic:
    """|u + M^T u|^2 - |u|^2 = <u, (M + M^T + M M^T) u>, with M a generic matrix."""
    u, w = vector("u"), vector("w")  # w = M^T u
    proof = Symbolic("contraction with u and w = M^T u")

    def gradient(k: sp.Symbol) -> sp.Expr:
        return u[k] + w[k]

    def upstream(k: sp.Symbol) -> sp.Expr:
        return u[k]

    change = dot(gradient, gradient) - dot(upstream, upstream)
    # <u, M u> = <M^T u, u> = <w, u>, likewise <u, M^T u>; <u, M M^T u> = <M^T u, M^T u> = <w, w>.
    form = 2 * dot(lambda k: w[k], upstream) + dot(lambda k: w[k], lambda k: w[k])
    proof.equal("|u + w|^2 - |u|^2 = <w,u> + <u,w> + <w,w>", change, form)
    # Rank-one M = b c^T stands for a generic summand: every matrix is a sum of those, and J^T u is linear in
    # M.
    b, c = vector("b"), vector("c")
    transposed = apply(lambda row, column: delta(row, column) + c[row] * b[column], upstream)
    proof.equal("J^T u = u + M^T u", transposed(i), u[i] + c[i] * total(lambda k: b[k] * u[k]))
    proof.reject("the square forgotten", change, 2 * dot(lambda k: w[k], upstream), mutation="term dropped")
    proof.reject("J for J^T", transposed(i), u[i] + b[i] * total(lambda k: c[k] * u[k]), mutation="other")
    return proof
