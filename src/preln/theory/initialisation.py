"""Pre-LN and Post-LN at initialisation, in expectation over the weights (STK-INIT).

A block has attention with W_Q = 0, so that every token gets the mean of the values, and W_2 relu(W_1 y).
Entries of W_V, W_1, W_2 are independent with mean 0 and variance 1/d, symmetrically distributed (Xiong et
al. 2020, section 3).
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import contract, d, delta, dot, i, inner, total, vector
from preln.theory.sigma import Q

x, h, y, q = vector("x"), vector("h"), vector("y"), vector("q")
w = sp.Symbol("w", nonnegative=True)
now, after, attention, blocks = (sp.Symbol(n, nonnegative=True) for n in ("now", "next", "attention", "l"))
z = sp.Symbol("z", real=True)
m, s2 = sp.Symbol("m", positive=True), sp.Symbol("s2", positive=True)


@claim(
    "STK-INIT",
    title="Pre-LN against Post-LN at initialisation",
    statement="With E|x_0|^2 = d and eps = 0: Pre-LN has (1 + l/2) d <= E|x_l|^2 <= (1 + 3 l/2) d, and the "
    "upper side is attained by a single token. Post-LN has E|x|^2 = 3 d/2 before the norm after the MLP, at "
    "every depth. Hence the mean of 1/s_L^2, the square of the final norm's sigma, is at least 1/(1 + 3 "
    "L/2) for Pre-LN, and wherever s_L^2 reaches a share 1 - delta of its mean, sigma^2 <= 1/((1 - delta)(1 "
    "+ L/2)(1 - 1/d)): there the bound on dL/dx_L falls like 1/sqrt(L). Post-LN's last norm has E s^2 = 3/2 "
    "- 1/(2 d) whatever L.",
    assumptions=[
        "at initialisation, expectation over independent weights of mean 0, variance 1/d, symmetric",
        "W_Q = 0 (uniform attention); feed-forward width d; norms without gain",
        "E|x_0|^2 = d with independent entries of mean 0 and variance 1",
        "d >= 3, and almost surely no norm's input is constant (weights and x_0 with densities)",
    ],
    uses=["LN-SPEC", "LN-NORM-D3"],
    source="Xiong et al. 2020, Lemma 2 and Theorem 1; the single-token case and the constants are this "
    "project's",
)
def stk_init() -> list[Evidence]:
    """Contract second moments; relu by symmetry; induct over blocks; Jensen by a tangent."""
    return [_moments().evidence(), _steps().evidence()]


def _moments() -> Symbolic:
    proof = Symbolic("second moments by contraction: E[W_ik W_jl] = delta_ij delta_kl/d")

    def covariance(k: sp.Symbol, n: sp.Symbol) -> sp.Expr:
        return delta(k, n) / d

    square = contract(total(lambda a: total(lambda k: total(lambda n: covariance(k, n) * h[k] * h[n]))))
    proof.equal("E|W h|^2 = |h|^2", square, inner(h, h))
    # One entry of W h has second moment |h|^2/d, so the mean of the entries has |h|^2/d^2.
    one = contract(total(lambda k: total(lambda n: covariance(k, n) * h[k] * h[n])))
    proof.equal(
        "E var(W h) = (1 - 1/d)|h|^2/d",
        one - contract(total(lambda a: one)) / d**2,
        (1 - 1 / d) * inner(h, h) / d,
    )
    # Post-LN's last norm gets a vector of mean 0 and mean square 1, plus W h with |h|^2 = d/2 in mean.
    share = 1 + (one - contract(total(lambda a: one)) / d**2)
    proof.equal(
        "Post-LN: E s^2 at the last norm", share, sp.Rational(3, 2) - 1 / (2 * d), {inner(h, h): d / 2}
    )
    proof.reject(
        "Post-LN: (3/2)(1 - 1/d)",
        share,
        sp.Rational(3, 2) * (1 - 1 / d),
        {inner(h, h): d / 2},
        mutation="centring dropped",
    )
    cross = dot(lambda k: x[k] + y[k], lambda k: x[k] + y[k])
    proof.equal(
        "E<x, W h> = 0, so squares add up", cross, inner(x, x) + inner(y, y), {inner(x, y): sp.S.Zero}
    )
    # The mean of tokens, one more token at a time: convexity of the square.
    mixed = dot(lambda k: (1 - w) * q[k] + w * y[k], lambda k: (1 - w) * q[k] + w * y[k])
    gap = (1 - w) * inner(q, q) + w * inner(y, y) - mixed
    apart = dot(lambda k: q[k] - y[k], lambda k: q[k] - y[k])
    proof.equal(
        "|mean of tokens|^2 <= mean of |token|^2: the gap is w (1 - w)|q - y|^2", gap, w * (1 - w) * apart
    )
    proof.equal("after a norm |LN(x)|^2 = d", d * (s2 / s2), d)
    proof.reject("variance 1", square * d, inner(h, h), mutation="dimension off by one")
    proof.reject(
        "squares add up without independence", cross, inner(x, x) + inner(y, y), mutation="assumption dropped"
    )
    proof.reject(
        "E var(W h) = |h|^2/d",
        one - contract(total(lambda a: one)) / d**2,
        inner(h, h) / d,
        mutation="centring dropped",
    )
    proof.reject("the gap is 0", gap, sp.S.Zero, mutation="other")
    proof.true("no free index is left", not square.has(i))
    return proof


def _steps() -> Smt:
    proof = Smt("second moments, block by block; attention adds between 0 and d, the MLP adds d/2", [])
    relu = sp.Max(0, z) ** 2
    proof.show(
        "relu(z)^2 + relu(-z)^2 = z^2: half the second moment, by symmetry",
        sp.Eq(relu + sp.Max(0, -z) ** 2, z**2),
    )
    one_block = [sp.Eq(after, now + attention + d / 2), attention <= d]
    proof.show(
        "Pre-LN from below", after >= (1 + (blocks + 1) / 2) * d, *one_block, now >= (1 + blocks / 2) * d
    )
    top = [*one_block, now <= (1 + 3 * blocks / 2) * d]
    proof.show("Pre-LN from above", after <= (1 + 3 * (blocks + 1) / 2) * d, *top)
    single = [
        sp.Eq(after, now + attention + d / 2),
        sp.Eq(attention, d),
        sp.Eq(now, (1 + 3 * blocks / 2) * d),
    ]
    proof.show("a single token attains it", sp.Eq(after, (1 + 3 * (blocks + 1) / 2) * d), *single)
    post = [sp.Eq(after, now + d / 2), sp.Eq(now, d)]
    proof.show("Post-LN: from |x|^2 = d to 3 d/2", sp.Eq(after, Q(3, 2) * d), *post)
    proof.show("1/t is above its tangent at the mean m", 1 / s2 >= 2 / m - s2 / m**2)
    mean_inverse = sp.Symbol("mean_inverse", real=True)
    jensen = [mean_inverse >= 2 / m - m / m**2, m <= 1 + 3 * blocks / 2]
    proof.show("so E[1/s^2] >= 1/E[s^2] >= 1/(1 + 3 L/2)", mean_inverse >= 1 / (1 + 3 * blocks / 2), *jensen)
    share = sp.Symbol("share", positive=True)
    near = [s2 >= share * m, m >= (1 + blocks / 2) * (1 - 1 / d), d >= 2]
    proof.show(
        "near its mean: sigma^2 <= 1/(share (1 + L/2)(1 - 1/d))",
        1 / s2 <= 1 / (share * (1 + blocks / 2) * (1 - 1 / d)),
        *near,
    )
    proof.reject("without the relu: z^2", sp.Eq(relu, z**2), mutation="other")
    proof.reject("Pre-LN stays at 3/2", after <= Q(3, 2) * d, *top, mutation="other")
    proof.reject("Pre-LN at most 1 + l", after <= (1 + blocks + 1) * d, *top, mutation="bound tightened")
    proof.reject(
        "Pre-LN at least 1 + l",
        after >= (1 + blocks + 1) * d,
        *one_block,
        now >= (1 + blocks) * d,
        mutation="bound tightened",
    )
    proof.reject(
        "E[1/s^2] = 1/E[s^2]",
        sp.Eq(mean_inverse, 1 / m),
        mean_inverse >= 2 / m - m / m**2,
        mutation="inequality turned",
    )
    return proof
