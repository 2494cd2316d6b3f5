"""What removing blocks does to the last hidden state, the loss, the logits and the time (PRN-*, SPD-AMDAHL).

x_{k+1} = x_k + F_k(x_k); without block k its successor gets x_k = x_{k+1} - F_k(x_k).
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic, counterexample
from preln.theory.index import dot, inner, vector

x, F, u = vector("x"), vector("F"), vector("u")
t, beta, size = (sp.Symbol(n, nonnegative=True) for n in ("t", "beta", "F_size"))
slope, change, first = sp.symbols("slope change first_order", real=True)
before, after, lip, lip1 = (sp.Symbol(n, nonnegative=True) for n in ("before", "after", "Lip", "Lip_total"))


@claim(
    "PRN-TELESCOPE",
    title="Dropping the last n blocks",
    statement="Dropping the last n blocks changes x_L by exactly minus the sum of their updates: x_L - "
    "x_{L-n} = sum_{k=L-n}^{L-1} F_k(x_k), for every n and every kind of branch.",
    assumptions=["x_{k+1} = x_k + F_k(x_k); the updates are those of the whole model"],
)
def prn_telescope() -> list[Evidence]:
    """Induct over n."""
    start, updates = vector("start"), vector("updates")
    i = sp.Symbol("i", integer=True, positive=True)
    proof = Symbolic("induction over n, entry by entry: updates is the sum of the first n")
    proof.equal("n = 0", start[i] - start[i], sp.S.Zero)
    proof.equal("one more block", (start[i] + updates[i] + F[i]) - start[i], updates[i] + F[i])
    proof.reject(
        "one update forgotten", (start[i] + updates[i] + F[i]) - start[i], updates[i], mutation="term dropped"
    )
    proof.reject(
        "the opposite sign",
        (start[i] + updates[i] + F[i]) - start[i],
        -updates[i] - F[i],
        mutation="inequality turned",
    )
    return [proof.evidence()]


@claim(
    "PRN-TELESCOPE-ANY",
    title="Dropping any blocks",
    statement="Dropping any set of blocks changes x_L by exactly minus the sum of their updates.",
    uses=["PRN-TELESCOPE"],
    source="own: the telescope read for blocks that are not last",
    expect="refuted",
)
def prn_telescope_any() -> list[Evidence]:
    """Two blocks x -> x + x at d = 1: dropping the first takes the second's update down too."""
    one = sp.Integer(1)
    whole, cut, update = 2 * (2 * one), 2 * one, one
    found = counterexample(
        check="x_L without the dropped block = x_L - its update; blocks x -> x + w x, one after the other",
        violated=sp.Eq(cut, whole - update),
        instance={"x": [1], "weights": [1, 1], "dropped": [0]},
        values={"whole": whole, "cut": cut, "claimed": whole - update},
        harmless={"dropping the last": sp.Eq(cut, whole - 2 * one)},
        sharp_condition="exact if no kept block follows a dropped one; else PRN-BOUND bounds the change",
        corrected_by="PRN-TELESCOPE",
    )
    return [found]


@claim(
    "PRN-FIRST-ORDER",
    title="Damage of dropping a block, to first order",
    statement="Dropping block k changes the loss by -<dL/dx_{k+1}, F_k(x_k)> + R with |R| <= "
    "(beta/2)|F_k(x_k)|^2, beta a Lipschitz constant of dL/dx_{k+1} on the segment from x_{k+1} to x_k. "
    "Both gradient and update stand in one backward pass for all blocks. A quadratic loss attains the "
    "remainder.",
    assumptions=[
        "the loss is differentiable in x_{k+1} with beta-Lipschitz gradient on the segment",
        "one block at a time",
    ],
)
def prn_first_order() -> list[Evidence]:
    """phi(t) = loss at x_{k+1} - t F: derivative at 0, remainder by integrating the Lipschitz bound."""
    grad = vector("grad")
    proof = Symbolic("phi(t) = loss(x_{k+1} - t F); phi(1) is the loss without the block")
    quadratic = dot(lambda m: grad[m], lambda m: -t * F[m]) + beta / 2 * dot(
        lambda m: t * F[m], lambda m: t * F[m]
    )
    proof.equal("x_{k+1} - F_k = x_k", (x[m_] + F[m_]) - F[m_], x[m_])
    proof.equal("phi'(0) = -<grad, F>", quadratic.diff(t).subs(t, 0), -inner(grad, F))
    proof.equal(
        "a quadratic's remainder is (beta/2)|F|^2",
        quadratic.subs(t, 1) + inner(grad, F),
        beta / 2 * inner(F, F),
    )
    tau = sp.Symbol("tau", nonnegative=True)
    bound = sp.integrate(beta * size**2 * tau, (tau, 0, 1))
    proof.equal("integral of beta tau |F|^2", bound, beta * size**2 / 2)
    proof.reject(
        "phi'(0) = <grad, F>", quadratic.diff(t).subs(t, 0), inner(grad, F), mutation="inequality turned"
    )
    proof.reject("no remainder", quadratic.subs(t, 1), -inner(grad, F), mutation="term dropped")
    remainder = Smt("phi'(t) = slope + deviation, |deviation| <= beta t |F|^2; change = slope + integral", [])
    deviation = sp.Symbol("integral", real=True)
    # |deviation| <= integral of |phi'(tau) - phi'(0)| <= integral of beta tau |F|^2.
    known = [sp.Eq(change, slope + deviation), sp.Abs(deviation) <= bound]
    remainder.show("|change - slope| <= (beta/2)|F|^2", sp.Abs(change - slope) <= beta * size**2 / 2, *known)
    remainder.reject(
        "(beta/4)|F|^2", sp.Abs(change - slope) <= beta * size**2 / 4, *known, mutation="bound tightened"
    )
    remainder.reject(
        "the change is never above the slope", change <= slope, *known, mutation="inequality turned"
    )
    remainder.reject("beta |F|/2", sp.Abs(change - slope) <= beta * size / 2, *known, mutation="other")
    return [proof.evidence(), remainder.evidence()]


m_ = sp.Symbol("m", integer=True, positive=True)


@claim(
    "PRN-BOUND",
    title="How far dropping a block can move the last hidden state",
    statement="Dropping block k changes x_L by at most |F_k(x_k)| prod_{j>k} Lip_j, Lip_j a Lipschitz "
    "constant of block j on a set that holds both trajectories; x -> Lip_j x attains it. For a block x + "
    "F(N(x)), on a convex set, Lip_j <= 1 + Lip(F) sup sigma(G_j). (Dot-product attention has no Lipschitz "
    "constant on all of R^d: the set matters.)",
    assumptions=["|B_j(x) - B_j(y)| <= Lip_j |x - y| on that set"],
    uses=["PRN-TELESCOPE"],
    source="own; attention: Kim, Papamakarios and Mnih 2021",
)
def prn_bound() -> list[Evidence]:
    """Induct over the blocks above."""
    proof = Smt(
        "before, after: distance of the trajectories before and after block j; Lip_total = prod so far", []
    )
    step = [after <= lip * before, before <= size * lip1]
    proof.show("start: the distance is |F_k|", before <= size * lip1, sp.Eq(before, size), sp.Eq(lip1, 1))
    proof.show("step", after <= size * lip1 * lip, *step)
    attained = [sp.Eq(after, lip * before), sp.Eq(before, size * lip1)]
    proof.show("attained", sp.Eq(after, size * lip1 * lip), *attained)
    branch, sup = sp.symbols("Lip_branch sup_sigma", nonnegative=True)
    residual = [after <= before + branch * sup * before]
    proof.show("Lip_j <= 1 + Lip(branch) sup sigma(G)", after <= (1 + branch * sup) * before, *residual)
    proof.reject("without the blocks above", after <= size, *step, mutation="term dropped")
    proof.reject("Lipschitz constants added up", after <= size * (lip1 + lip), *step, mutation="other")
    proof.reject("gain dropped", after <= (1 + branch) * before, *residual, mutation="gain dropped")
    proof.reject("at least", after >= size * lip1 * lip, *step, mutation="inequality turned")
    return [proof.evidence()]


@claim(
    "SPD-AMDAHL",
    title="Speed-up from removing blocks",
    statement="Removing a share p of equal blocks that together take a share b of the time speeds up by "
    "exactly 1/(1 - p b) if nothing else changes, and by at most that if the rest gets no faster. As p goes "
    "to 1 it tends to 1/(1 - b).",
    assumptions=["0 <= p <= 1, 0 <= b < 1", "the blocks take equal times"],
    source="Amdahl 1967",
)
def spd_amdahl() -> list[Evidence]:
    """Compare times."""
    share, b, rest, time = (sp.Symbol(n, nonnegative=True) for n in ("p", "b", "rest", "time"))
    known = [share <= 1, b < 1, time > 0, rest >= 1 - b, sp.Eq(time, rest + (1 - share) * b)]
    proof = Smt("time of the whole model 1; time = rest + (1 - p) b", known)
    proof.show("at most 1/(1 - p b)", 1 / time <= 1 / (1 - share * b))
    proof.show("exactly, if the rest stays", sp.Eq(1 / time, 1 / (1 - share * b)), sp.Eq(rest, 1 - b))
    proof.show("at most 1/(1 - b)", 1 / time <= 1 / (1 - b))
    proof.reject(
        "1/(1 - p)", sp.Eq(1 / time, 1 / (1 - share)), share < 1, sp.Eq(rest, 1 - b), mutation="term dropped"
    )
    proof.reject("at least 1/(1 - p b)", 1 / time >= 1 / (1 - share * b), mutation="inequality turned")
    proof.reject("at most 1 + p b", 1 / time <= 1 + share * b, mutation="bound tightened")
    proof.reject("the rest may get faster", 1 / rest <= 1 / (1 - share * b), mutation="assumption dropped")
    return [proof.evidence()]
