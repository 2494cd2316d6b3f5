"""Where eps stands, and RMSNorm as a sphere (RMS-EPS, RMS-SPHERE).

inside   s_in = sqrt(ms + eps)        outside   s_out = sqrt(ms) + eps
sphere   append c = sqrt(d eps) to x: the longer vector has length sqrt(d) s, and RMSNorm scales it to
         length sqrt(d) and drops the last entry again.
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import d, delta, differentiate, dot, i, inner, j, total
from preln.theory.norms import RMS_FACTS, along_x, eps, r, rms_jacobian, rms_norm, s, x
from preln.theory.sigma import Q
from preln.theory.spectrum import v

root = sp.Symbol("r", nonnegative=True)
s_in, s_out = sp.symbols("s_in s_out", positive=True)
c = sp.Symbol("c", nonnegative=True)
ratio = s_in / s_out  # sigma outside over sigma inside, for d >= 2


@claim(
    "RMS-EPS",
    title="How far apart the two places of eps are",
    statement="With r = sqrt(ms), q = sigma_outside/sigma_inside = sqrt(r^2 + eps)/(r + eps), eps > 0, d >= "
    "2: 1/sqrt(1 + eps) <= q <= max(1, 1/sqrt(eps)). The lower side is attained exactly at ms = 1, the "
    "upper one exactly at ms = 0 if eps <= 1, and approached as ms grows without bound if eps > 1. q falls "
    "with ms up to ms = 1 and rises from there; q = 1 exactly if 2 r + eps = 1, q > 1 exactly if 2 r + eps "
    "< 1. Where ms >= 1/4 the two differ by less than eps/2, relatively.",
    assumptions=["eps > 0, the same in both", "no gain (a gain multiplies both alike)", "d >= 2"],
    uses=["RMS-NORM", "RMS-PAPER"],
)
def rms_eps() -> list[Evidence]:
    """Compare squares of the denominators."""
    proof = Smt(
        "s_in^2 = r^2 + eps, s_out = r + eps",
        [sp.Eq(s_in**2, root**2 + eps), sp.Eq(s_out, root + eps), eps > 0],
    )
    proof.show("q^2 >= 1/(1 + eps)", ratio**2 >= 1 / (1 + eps))
    proof.show("equal exactly at r = 1", sp.Equivalent(sp.Eq(ratio**2, 1 / (1 + eps)), sp.Eq(root, 1)))
    proof.show("q^2 <= max(1, 1/eps)", ratio**2 <= sp.Max(1, 1 / eps))
    at_zero = sp.Equivalent(sp.Eq(ratio**2, 1 / eps), sp.Eq(root, 0))
    proof.show("eps <= 1: equal to 1/eps exactly at r = 0", at_zero, eps <= 1)
    proof.show("q = 1 exactly if 2 r + eps = 1", sp.Equivalent(sp.Eq(s_in, s_out), sp.Eq(2 * root + eps, 1)))
    proof.show("q > 1 exactly if 2 r + eps < 1", sp.Equivalent(s_in > s_out, 2 * root + eps < 1))
    proof.show("r >= 1/2: 1 - q < eps/2", sp.And(ratio <= 1, 1 - ratio < eps / 2), root >= Q(1, 2))
    proof.reject("q >= 1", ratio >= 1, mutation="bound tightened")
    proof.reject("q^2 >= 1/(1 + eps/2)", ratio**2 >= 1 / (1 + eps / 2), mutation="bound tightened")
    proof.reject("q <= 1", ratio <= 1, mutation="bound tightened")
    proof.reject("q^2 <= 1/(1 + eps)", ratio**2 <= 1 / (1 + eps), mutation="inequality turned")
    proof.reject(
        "1 - q < eps/3 from r = 1/2 on", 1 - ratio < eps / 3, root >= Q(1, 2), mutation="bound tightened"
    )
    proof.reject("1 - q < eps/2 and q <= 1 for every r", ratio <= 1, eps <= 1, mutation="assumption dropped")
    proof.reject(
        "eps of s_in dropped: q^2 >= 1/(1 + eps)",
        (root / s_out) ** 2 >= 1 / (1 + eps),
        mutation="eps dropped",
    )

    square = (r**2 + eps) / (r + eps) ** 2
    calculus = Symbolic("q^2 as a function of r: its derivative and its limit")
    calculus.equal("derivative", square.diff(r), 2 * eps * (r - 1) / (r + eps) ** 3)
    calculus.true("it tends to 1", sp.limit(square, r, sp.oo) == 1)
    calculus.reject("derivative without eps", square.diff(r), sp.S.Zero, mutation="eps dropped")
    wrong = 2 * eps * (r - eps) / (r + eps) ** 3
    calculus.reject("least at r = eps", square.diff(r), wrong, mutation="eps moved")
    return [proof.evidence(), calculus.evidence()]


@claim(
    "RMS-SPHERE",
    title="RMSNorm with eps is normalisation onto a sphere one dimension up",
    statement="Append c = sqrt(d eps) to x. The vector (x, c) has length sqrt(d) s, and RMSNorm(x) is the "
    "first d entries of sqrt(d) (x, c)/|(x, c)|: exact normalisation onto the sphere of radius sqrt(d) in "
    "R^(d+1), projected back. Its Jacobian is that block of the sphere map's, (I - z z^T)/s with z = (x, "
    "c)/(sqrt(d) s), and RMS-SPEC follows: 1/s on what is orthogonal to x, eps/s^3 along x. |RMSNorm(x)|^2 "
    "= d (1 - eps/s^2), and for eps > 0 the image is the whole open ball |y|^2 < d.",
    assumptions=["s > 0", "every d >= 1"],
    uses=["RMS-JAC"],
)
def rms_sphere() -> list[Evidence]:
    """Contract in d entries plus one."""
    facts = RMS_FACTS | {c**2: d * eps}
    length = sp.sqrt(inner(x, x) + c**2)  # |(x, c)|

    def z(k: sp.Symbol) -> sp.Expr:
        return x[k] / (sp.sqrt(d) * s)

    last = c / (sp.sqrt(d) * s)

    def sphere(a: sp.Symbol, b: sp.Symbol) -> sp.Expr:
        return (delta(a, b) - z(a) * z(b)) / s

    proof = Symbolic("contraction over d entries plus the appended one")
    proof.equal("|(x, c)|^2 = d s^2", inner(x, x) + c**2, d * s**2, facts)
    proof.equal(
        "RMSNorm is the projected sphere map", rms_norm(x) ** 2, (sp.sqrt(d) * x[i] / length) ** 2, facts
    )
    derived = differentiate(sp.sqrt(d) * x[i] / sp.sqrt(total(lambda k: x[k] ** 2) + c**2), x, j)
    proof.equal("derivative of the sphere map, first d entries", derived, sphere(i, j), facts)
    proof.equal("that block is B", sphere(i, j), rms_jacobian(i, j))
    proof.equal("z is a unit vector", dot(z, z) + last**2, sp.S.One, facts)
    # (I - z z^T)(v, 0) and (I - z z^T)(x, 0), first d entries, over s.
    proof.equal(
        "v orthogonal to x",
        (v[i] - z(i) * dot(z, lambda k: v[k])) / s,
        v[i] / s,
        facts | {inner(v, x): sp.S.Zero},
    )
    proof.equal("along x", (x[i] - z(i) * dot(z, along_x)) / s, x[i] * eps / s**3, facts)
    norm_square = dot(lambda k: x[k] / s, lambda k: x[k] / s)
    proof.equal("|RMSNorm(x)|^2", norm_square, d * (1 - eps / s**2), facts)
    # y with |y|^2 = q d, q < 1, is the image of y sqrt(eps)/sqrt(1 - q), whose mean square is q eps/(1 - q).
    share = sp.Symbol("q", nonnegative=True)
    proof.equal(
        "every y of the open ball is reached: s^2", share * eps / (1 - share) + eps, eps / (1 - share)
    )
    proof.equal("so x/s = y", (sp.sqrt(eps) / sp.sqrt(1 - share)) ** 2 / (eps / (1 - share)), sp.S.One)
    proof.reject(
        "c = sqrt(eps) gives the length",
        inner(x, x) + c**2,
        d * s**2,
        RMS_FACTS | {c**2: eps},
        mutation="dimension off by one",
    )
    proof.reject(
        "c = 0 gives the length", inner(x, x) + c**2, d * s**2, RMS_FACTS | {c: 0}, mutation="eps dropped"
    )
    proof.reject("0 along x", (x[i] - z(i) * dot(z, along_x)) / s, sp.S.Zero, facts, mutation="eps dropped")
    proof.reject("|RMSNorm(x)|^2 = d", norm_square, d * sp.S.One, facts, mutation="eps dropped")
    proof.reject("sphere of radius 1", derived, sphere(i, j) / sp.sqrt(d), facts, mutation="other")
    proof.reject("projector forgotten", derived, delta(i, j) / s, facts, mutation="term dropped")
    return [proof.evidence()]
