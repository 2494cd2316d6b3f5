"""Stacks of Pre-LN blocks: the chain of Jacobians and what bounds their product (STK-*).

A block is x -> x + F(norm(x)), its Jacobian I + M with M = A G: A the branch's Jacobian, G the norm's. Both
act on the whole sequence at once; a = sigma(A), and g = sigma(G) = max over tokens of the norm's sigma, as G
is block-diagonal over tokens.
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic, counterexample
from preln.theory.instance import jacobian, sigma
from preln.theory.sigma import Q

a, g, bound, product, step, total_ag = (
    sp.Symbol(name, nonnegative=True) for name in ("a", "g", "bound", "product", "step", "E")
)
bound_exp, lower, before, after, moved = (
    sp.Symbol(name, nonnegative=True) for name in ("exp_t", "lower", "before", "after", "moved")
)
PAPER = "Reassessing Layer Pruning in LLMs"


@claim(
    "STK-UPPER",
    title="Upper bound on a stack's Jacobian",
    statement="Every singular value of prod (I + A_k G_k) is at most prod (1 + a_k g_k) <= exp(sum a_k "
    "g_k), for every number of blocks and any order.",
    assumptions=[
        "operator norm: |I| = 1, |X + Y| <= |X| + |Y|, |X Y| <= |X| |Y|",
        "a_k = sigma(A_k), g_k = max over tokens of sigma(G_k)",
    ],
)
def stk_upper() -> list[Evidence]:
    """Induct over the blocks: one solver question a step; 1 + t <= exp(t) by calculus."""
    norm_m = sp.Symbol("norm_AG", nonnegative=True)
    # What the axioms give for one more block: |AG| <= a g, |I + AG| <= 1 + |AG|, |P (I + AG)| <= |P| |I +
    # AG|.
    axioms = [norm_m <= a * g, step <= 1 + norm_m]
    next_product = sp.Symbol("next_product", nonnegative=True)
    induct = Smt("induction over blocks: product is |P_n|, bound is prod (1 + a_k g_k)", axioms)
    induct.show(
        "start: |I| <= the empty product 1 = exp(0)", product <= bound, sp.Eq(product, 1), sp.Eq(bound, 1)
    )
    one_more = [next_product <= product * step, product <= bound]
    induct.show("step", next_product <= bound * (1 + a * g), *one_more)
    induct.show(
        "step for exp: bound <= E gives bound (1 + t) <= E exp(t)",
        bound * (1 + a * g) <= total_ag * bound_exp,
        bound <= total_ag,
        bound_exp >= 1 + a * g,
    )
    induct.reject(
        "step without the identity: bound a g",
        next_product <= bound * a * g,
        *one_more,
        mutation="term dropped",
    )
    induct.reject(
        "step with a bound that adds up instead",
        next_product <= bound + a * g,
        *one_more,
        mutation="bound tightened",
    )
    induct.reject(
        "step without |X Y| <= |X| |Y|",
        next_product <= bound * (1 + a * g),
        product <= bound,
        mutation="assumption dropped",
    )
    t = sp.Symbol("t", nonnegative=True)
    f = sp.exp(t) - 1 - t
    calculus = Symbolic("f(t) = exp(t) - 1 - t: f(0) = 0, f'(0) = 0, f'' >= 0, so f >= 0 on t >= 0")
    calculus.equal("f(0)", f.subs(t, 0), sp.S.Zero)
    calculus.equal("f'(0)", f.diff(t).subs(t, 0), sp.S.Zero)
    calculus.true("f'' = exp(t) > 0", sp.simplify(f.diff(t, 2) - sp.exp(t)) == 0 and sp.exp(t).is_positive)
    total_t = sp.Symbol("T", nonnegative=True)
    calculus.true(
        "exp(T) exp(t) = exp(T + t)", sp.simplify(sp.exp(total_t) * sp.exp(t) - sp.exp(total_t + t)) == 0
    )
    wrong = sp.exp(t / 2) - 1 - t
    calculus.reject(
        "1 + t <= exp(t/2): its slope at 0 is not 0",
        wrong.diff(t).subs(t, 0),
        sp.S.Zero,
        mutation="bound tightened",
    )
    return [induct.evidence(), calculus.evidence()]


@claim(
    "STK-LOWER",
    title="Lower bound on a stack's Jacobian",
    statement="Every singular value of prod (I + A_k G_k) is at least prod max(0, 1 - a_k g_k). It says "
    "something exactly if every a_k g_k < 1, and is then attained by A_k G_k = - a_k g_k I.",
    assumptions=["operator norm axioms", "a_k = sigma(A_k), g_k = max over tokens of sigma(G_k)"],
    source="own",
)
def stk_lower() -> list[Evidence]:
    """Induct over the blocks with the reverse triangle inequality."""
    return [_lower_induction().evidence()]


def _lower_induction() -> Smt:
    reverse = [after >= before - moved, moved <= a * g * before, before >= lower]
    proof = Smt("lengths: before = |P v|, after = |(I + A G) P v|, moved = |A G P v|, |v| = 1", [])
    proof.show("start: the empty product is 1", before >= lower, sp.Eq(before, 1), sp.Eq(lower, 1))
    proof.show("step", after >= lower * sp.Max(0, 1 - a * g), *reverse)
    rest = sp.Max(0, 1 - a * g)
    proof.show(
        "positive exactly if each a g < 1", sp.Equivalent(lower * rest > 0, sp.And(lower > 0, a * g < 1))
    )
    attained = [sp.Eq(after, sp.Abs(1 - a * g) * before), sp.Eq(before, lower), a * g <= 1]
    proof.show("attained by - a g I", sp.Eq(after, lower * rest), *attained)
    raw = sp.Symbol("raw", real=True)
    proof.reject(
        "step without max(0, .)",
        after >= raw * (1 - a * g),
        *reverse[:2],
        before >= raw,
        mutation="assumption dropped",
    )
    proof.reject(
        "step with 1 - a (gain dropped)", after >= lower * sp.Max(0, 1 - a), *reverse, mutation="gain dropped"
    )
    proof.reject("step with 1", after >= lower, *reverse, mutation="bound tightened")
    proof.reject("the bound from above", after <= lower * rest, *reverse, mutation="inequality turned")
    return proof


@claim(
    "STK-LOWER-RAW",
    title="The lower bound without a condition",
    statement="Every singular value of prod (I + A_k G_k) is at least prod (1 - a_k g_k), whatever a_k g_k.",
    uses=["STK-LOWER"],
    source="own: the product as it is often written",
    expect="refuted",
)
def stk_lower_raw() -> list[Evidence]:
    """Two blocks whose factors are both negative, so that their product is positive."""
    point, eps_ = [Q(7, 5), sp.Integer(0)], Q(1, 50)  # s = 1, so B = diag(1/50, 1) and g = 1
    branch = sp.diag(0, -1)
    branch[0, 0] = sp.Integer(2)
    norm = jacobian("rms_norm", point, eps_)
    block = sp.eye(2) + branch * norm
    second = sp.eye(2) + branch * norm
    smallest = sp.sqrt(sp.Min(*[sp.simplify(k) for k in ((second * block).T * second * block).eigenvals()]))
    size = sigma(branch) * sigma(norm)
    claimed = (1 - size) * (1 - size)
    found = counterexample(
        check="smallest singular value of the product of two equal blocks I + A G >= (1 - a g)^2",
        violated=sp.Ge(smallest, claimed),
        instance={"layer": "rms_norm", "x": point, "eps": eps_, "branch": branch.tolist(), "blocks": 2},
        values={"smallest": smallest, "claimed": claimed},
        harmless={"with max(0, 1 - a g)": sp.Ge(smallest, sp.Max(0, 1 - size) ** 2)},
        sharp_condition="d >= 2: for all A_k, G_k of these sizes exactly if the number of k with a_k g_k > 1 "
        "is 0 or odd, or some a_k g_k = 1",
        corrected_by="STK-LOWER",
    )
    return [found, _lower_induction().evidence()]


@claim(
    "STK-TAIL",
    title="How near the identity the blocks above l are",
    statement="|prod_{k>l} (I + A_k G_k) - I| <= prod_{k>l} (1 + a_k g_k) - 1 <= exp(sum_{k>l} a_k g_k) - "
    "1, and A_k G_k = a_k g_k I attains the first. So dL/dx_{l+1} differs from dL/dx_L by at most that "
    "share of |dL/dx_L|. It says nothing about a block by itself: the bound is 0 at l = L - 1 for every "
    "model, since no factor is left, and small only where the remaining a_k g_k add up to little. Near the "
    "identity means unchanged, not attenuated.",
    assumptions=["operator norm axioms", "a_k = sigma(A_k), g_k = max over tokens of sigma(G_k)"],
    uses=["STK-UPPER"],
    source=PAPER + ', "as l approaches L the product nears the identity"',
)
def stk_tail() -> list[Evidence]:
    """Expand P (I + M) - I; induct."""
    P, M = sp.symbols("P M", commutative=False)
    proof = Symbolic("expansion in noncommuting symbols")
    proof.equal("P (I + M) - I = (P - I)(I + M) + M", P * (1 + M) - 1, (P - 1) * (1 + M) + M)
    proof.reject("without the last M", P * (1 + M) - 1, (P - 1) * (1 + M), mutation="term dropped")
    distance, next_distance, size = (sp.Symbol(n, nonnegative=True) for n in ("distance", "next", "M_size"))
    grown = [next_distance <= distance * (1 + size) + size, size <= a * g, distance <= bound - 1, bound >= 1]
    induct = Smt("distance = |P - I| <= bound - 1", [])
    induct.show("start: no block, no distance", distance <= bound - 1, sp.Eq(distance, 0), sp.Eq(bound, 1))
    induct.show("step", next_distance <= bound * (1 + a * g) - 1, *grown)
    attained = [
        sp.Eq(distance, bound - 1),
        bound >= 1,
        sp.Eq(next_distance, (1 + distance) * (1 + a * g) - 1),
    ]
    induct.show("attained by a g I", sp.Eq(next_distance, bound * (1 + a * g) - 1), *attained)
    induct.show(
        "the gradient moves by at most that share",
        moved <= (bound - 1) * before,
        moved <= distance * before,
        distance <= bound - 1,
    )
    induct.reject(
        "step with the sizes added up", next_distance <= (bound - 1) + a * g, *grown, mutation="term dropped"
    )
    induct.reject("gain dropped", next_distance <= bound * (1 + a) - 1, *grown, mutation="gain dropped")
    induct.reject(
        "near the identity means smaller",
        after <= before,
        after <= before + moved,
        moved <= distance * before,
        mutation="other",
    )
    induct.reject(
        "small whenever one block is", next_distance <= a * g, *grown, mutation="assumption dropped"
    )
    return [proof.evidence(), induct.evidence()]


@claim(
    "STK-BOUND-MONOTONE",
    title="The bound on gradients does not increase with depth",
    statement="U_l = prod_{k>=l} (1 + a_k g_k) bounds |dL/dx_l|/|dL/dx_L| and does not increase with l; it "
    "falls from l to l + 1 exactly if a_l g_l > 0. That the bound falls does not make the gradient fall: "
    "STK-GRADIENT-MONOTONE.",
    assumptions=["dL/dx_l = J_l^T dL/dx_{l+1}", "operator norm axioms"],
    uses=["STK-UPPER"],
    source=PAPER,
)
def stk_bound_monotone() -> list[Evidence]:
    """U_l = U_{l+1} (1 + a_l g_l)."""
    later = sp.Symbol("U_next", nonnegative=True)
    here = later * (1 + a * g)
    proof = Smt(
        "U_l = U_{l+1} (1 + a g) with U_L = 1; before = |dL/dx_{l+1}|, after = |dL/dx_l|", [later >= 1]
    )
    proof.show("it does not increase with l", here >= later)
    proof.show("it falls exactly if a g > 0", sp.Equivalent(here > later, a * g > 0))
    proof.show("it stays at least 1", here >= 1)
    proof.show("it bounds the gradient", after <= here, after <= (1 + a * g) * before, before <= later)
    proof.reject("it increases with l", here <= later, mutation="inequality turned")
    proof.reject("it falls at every block", here > later, mutation="assumption dropped")
    proof.reject(
        "the gradient itself does not increase with l",
        after >= before,
        after <= (1 + a * g) * before,
        mutation="other",
    )
    proof.reject("U_l <= exp-free bound 1 + a g", here <= 1 + a * g, mutation="term dropped")
    return [proof.evidence()]
