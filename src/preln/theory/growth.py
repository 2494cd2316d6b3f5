"""How the residual stream grows with depth, and what that does to the bound on gradients (STK-GROWTH).

x_{k+1} = x_k + f_k with f_k the k-th branch's output. A norm divides by s_k >= rms(x_k), so a block's share
in the bound is 1 + a/s_k.
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import d, dot, inner, vector

x, f = vector("x"), vector("f")
v, p, k, t = (sp.Symbol(n, nonnegative=True) for n in ("v", "p", "k", "t"))
size = sp.Symbol("Exx", nonnegative=True)
here, more, less = (sp.Symbol(n, positive=True) for n in ("root_k", "root_k1", "root_km1"))


@claim(
    "STK-GROWTH",
    title="Growth of the stream with depth, and the bound it gives",
    statement="(a) If the branches' outputs are uncorrelated with each other and with x_0 and have mean "
    "square v: E|x_l|^2 = E|x_0|^2 + l d v. With s_k >= sqrt(v k) and c = 2 a/sqrt(v) the bound's exponent "
    "sum_{k=l}^{L-1} a/sqrt(v k) lies between c (sqrt(L) - sqrt(l)) and c (sqrt(L - 1) - sqrt(l - 1)), so "
    "prod (1 + a/s_k) <= exp(c (sqrt(L - 1) - sqrt(l - 1))). (b) If they all are the same vector of mean "
    "square v and x_0 = 0, rms(x_l) = l sqrt(v); with p = a/sqrt(v) the bound prod_{k=l}^{L-1} (1 + p/k) is "
    "at least (L/l)^p for p <= 1 and at most (L/l)^p for p >= 1, and at most ((L - 1)/(l - 1))^p for every "
    "p and l >= 2.",
    assumptions=[
        "1 <= l < L, v > 0",
        "E<x_0,f_k> = 0 and E<f_j,f_k> = 0 for j != k in (a)",
        "a_k <= a for every block",
    ],
    uses=["STK-UPPER"],
    source="The Curse of Depth (Sun et al. 2025); the constants are this project's",
)
def stk_growth() -> list[Evidence]:
    """Contract one step; compare sums with telescoping ones; Bernoulli's inequality by calculus."""
    return [
        _second_moments().evidence(),
        _square_roots().evidence(),
        _powers().evidence(),
        _signs().evidence(),
    ]


def _second_moments() -> Symbolic:
    proof = Symbolic("one step by contraction, expectations put in; induction over the blocks")

    def after(m: sp.Symbol) -> sp.Expr:
        return x[m] + f[m]

    start, blocks = sp.Symbol("Ex0", nonnegative=True), sp.Symbol("l", nonnegative=True)
    uncorrelated = {inner(x, x): start + blocks * d * v, inner(f, f): d * v, inner(f, x): sp.S.Zero}
    step = dot(after, after)
    proof.equal("uncorrelated: one step", step, start + (blocks + 1) * d * v, uncorrelated)
    root = sp.sqrt(v)
    aligned = {inner(x, x): blocks**2 * d * v, inner(f, f): d * v, inner(f, x): blocks * d * v}
    proof.equal("aligned: x = l f gives (l + 1)^2", step, (blocks + 1) ** 2 * d * v, aligned)
    proof.equal("rms of l f", sp.sqrt(blocks**2 * v), blocks * root)
    proof.reject(
        "aligned branches grow like uncorrelated ones",
        step,
        (blocks + 1) * d * v,
        aligned,
        mutation="assumption dropped",
    )
    proof.reject("cross term dropped", step, inner(x, x) + inner(f, f), aligned, mutation="term dropped")
    proof.reject("d forgotten", step, start + (blocks + 1) * v, uncorrelated, mutation="dimension off by one")
    return proof


def _square_roots() -> Smt:
    """2 (sqrt(k+1) - sqrt(k)) <= 1/sqrt(k) <= 2 (sqrt(k) - sqrt(k-1)): both sides telescope."""
    roots = [sp.Eq(more**2, here**2 + 1), sp.Eq(here**2, less**2 + 1)]
    proof = Smt("root_k = sqrt(k) and its neighbours", [sp.Eq(more**2, here**2 + 1)])
    proof.show("from below", 2 * (more - here) <= 1 / here)
    proof.show("from above", 1 / here <= 2 * (here - less), roots[1])
    low, total_ = sp.symbols("low sum", real=True)
    proof.show("the sum telescopes", total_ + 1 / here >= 2 * (more - low), total_ >= 2 * (here - low))
    proof.show("from above too", total_ + 1 / here <= 2 * (here - low), total_ <= 2 * (less - low), roots[1])
    proof.show("s_k >= sqrt(v k) gives the larger share", 1 / more <= 1 / here, more >= here)
    proof.reject(
        "the upper sum from below", 2 * (here - less) <= 1 / here, roots[1], mutation="inequality turned"
    )
    proof.reject(
        "1/sqrt(k) <= 2 (sqrt(k+1) - sqrt(k))", 1 / here <= 2 * (more - here), mutation="bound tightened"
    )
    proof.reject("without the factor 2", 1 / here <= here - less, roots[1], mutation="bound tightened")
    return proof


def _powers() -> Symbolic:
    """1 + p t against (1 + t)^p, and log(1 + t) against t/(1 + t), by the derivative of the difference."""
    proof = Symbolic("h(0) = 0 and the sign of h'")
    exponent = sp.Symbol("p", positive=True)
    h = 1 + exponent * t - (1 + t) ** exponent
    proof.equal("Bernoulli: h(0)", h.subs(t, 0), sp.S.Zero)
    slope = exponent * (1 - (1 + t) ** (exponent - 1))
    proof.true("Bernoulli: h' = p (1 - (1 + t)^(p - 1))", sp.simplify(h.diff(t) - slope) == 0)
    log = sp.log(1 + t) - t / (1 + t)
    proof.equal("log(1 + t) - t/(1 + t) at 0", log.subs(t, 0), sp.S.Zero)
    proof.equal("its derivative t/(1 + t)^2", log.diff(t), t / (1 + t) ** 2)
    proof.equal("log(1 + t) has derivative 1/(1 + t)", sp.log(1 + t).diff(t), 1 / (1 + t))
    n = sp.Symbol("n", positive=True)
    proof.equal("t = 1/(n - 1): t/(1 + t) = 1/n", (t / (1 + t)).subs(t, 1 / (n - 1)), 1 / n)
    proof.equal("p = 1: 1 + 1/k = (k + 1)/k telescopes", (1 + 1 / n) * n, n + 1)
    power = ((n + 1) / n) ** exponent * n**exponent / (n + 1) ** exponent
    proof.true(
        "any p: ((k + 1)/k)^p k^p = (k + 1)^p telescopes", sp.simplify(sp.powdenest(power, force=True)) == 1
    )
    proof.reject(
        "Bernoulli with p^2",
        (1 + exponent**2 * t - (1 + t) ** exponent).diff(t).subs(t, 0),
        sp.S.Zero,
        mutation="other",
    )
    proof.reject(
        "log(1 + t) against t", (sp.log(1 + t) - t).diff(t), t / (1 + t) ** 2, mutation="bound tightened"
    )
    return proof


def _signs() -> Smt:
    """The signs that _powers needs: (1 + t)^(p - 1) = exp((p - 1) log(1 + t)) against 1."""
    log, power = sp.symbols("log power", nonnegative=True)
    monotone = [sp.Equivalent(power <= 1, (p - 1) * log <= 0), sp.Equivalent(power >= 1, (p - 1) * log >= 0)]
    proof = Smt("log = log(1 + t) >= 0 and power = exp((p - 1) log), exp monotone with exp(0) = 1", monotone)
    proof.show("p <= 1: h' >= 0, so 1 + p t >= (1 + t)^p", p * (1 - power) >= 0, p <= 1)
    proof.show("p >= 1: h' <= 0, so 1 + p t <= (1 + t)^p", p * (1 - power) <= 0, p >= 1)
    proof.show("t/(1 + t)^2 >= 0", t / (1 + t) ** 2 >= 0)
    proof.reject("h' >= 0 for every p", p * (1 - power) >= 0, mutation="assumption dropped")
    proof.reject("h' <= 0 for p <= 1", p * (1 - power) <= 0, p <= 1, mutation="inequality turned")
    return proof
