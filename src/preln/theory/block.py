"""One block: its Jacobian and what bounds it, for each place of the norm (BLK-*).

Everything acts on the whole sequence of T tokens. A is the Jacobian of a branch (attention or MLP), G that
of a norm, M = A G; a = sigma(A) and g = sigma(G) = max over tokens (BLK-TOKENS).

Pre-LN     x + F(N(x))        J = I + A G
parallel   x + F1 + F2        J = I + A1 G1 + A2 G2
Post-LN    N(x + F(x))        J = G (I + A)
sandwich   x + N2(F(N1(x)))   J = I + G2 A G1
after      x + N(F(x))        J = I + G A
"""

from __future__ import annotations

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.index import Matrix, d, delta, differentiate, i, j, product, total, vector
from preln.theory.norms import RMS_FACTS, eps, rms_jacobian, s, x
from preln.theory.smt import Formula

PAPER = "Reassessing Layer Pruning in LLMs"
AXIOMS = [
    "chain rule",
    "operator norm: |X + Y| <= |X| + |Y|, |X Y| <= |X||Y|, |X v| <= |X||v|",
    "a = sigma(A), g = max over tokens of sigma(G), both at the point where the block is differentiated",
]
a, g, a1, g1, a2, g2 = (sp.Symbol(n, nonnegative=True) for n in ("a", "g", "a1", "g1", "a2", "g2"))
m1, m2, norm_j, norm_rest = (sp.Symbol(n, nonnegative=True) for n in ("m1", "m2", "sigma_J", "sigma_JI"))
v0, v1, v2, part1, part2 = (sp.Symbol(n, nonnegative=True) for n in ("v0", "v1", "v2", "part1", "part2"))
M1, M2, A1, A2, G1, G2 = sp.symbols("M1 M2 A1 A2 G1 G2", commutative=False)
b, c = vector("b"), vector("c")
"""A generic branch is a sum of rank-one maps b c^T; derivatives are linear in it."""


def multiple(factor: sp.Expr) -> Matrix:
    """Return a multiple of the identity."""
    return lambda row, column: factor * delta(row, column)


def positive_part(e: sp.Expr) -> sp.Expr:
    """Return max(0, e)."""
    return sp.Max(0, e)


def largest_part(part: str) -> Smt:
    """Show that a map that acts on every part by itself has the largest part's sigma.

    Args:
        part: what a part is called, such as a token or a head's slice.
    """
    here, more, all_, one = (sp.Symbol(n, nonnegative=True) for n in ("g_all", "g_one", "out_all", "out_one"))
    axioms = [all_ <= here**2 * v1**2, one <= more**2 * v2**2]
    proof = Smt(f"squared lengths; one more {part} at a time", axioms)
    size = v1**2 + v2**2
    largest = sp.Max(here, more) ** 2 * size
    proof.show("|G v| <= max(g_all, g_one)|v|", all_ + one <= largest)
    alone = [sp.Eq(v1, 0), more >= here, sp.Eq(one, more**2 * v2**2)]
    proof.show(f"attained on one {part}", sp.Eq(all_ + one, largest), *alone)
    mean = (here**2 + more**2) / 2 * size
    proof.reject("the mean of the squares", all_ + one <= mean, mutation="bound tightened")
    least = sp.Min(here, more) ** 2 * size
    proof.reject("the least", all_ + one <= least, mutation="bound tightened")
    return proof


@claim(
    "BLK-TOKENS",
    title="Sigma of a norm over a sequence",
    statement="A norm acts on every token by itself, so its Jacobian on the sequence is block-diagonal and "
    "sigma(G) = max over tokens of sigma(G_t), attained by moving only the token with the largest.",
    assumptions=["lengths: |(v_1, ..., v_T)|^2 = sum |v_t|^2", "|G_t v| <= sigma(G_t)|v|"],
)
def blk_tokens() -> list[Evidence]:
    """Induct over tokens: the first ones against one more."""
    return [largest_part("token").evidence()]


@claim(
    "BLK-PRE",
    title="Jacobian of a Pre-LN block",
    statement="Two residual halves: J = (I + A2 G2)(I + A1 G1), on the whole sequence. sigma(J) <= (1 + a1 "
    "g1)(1 + a2 g2), sigma(J - I) <= (1 + a1 g1)(1 + a2 g2) - 1, and every singular value of J is at least "
    "max(0, 1 - a1 g1) max(0, 1 - a2 g2). All three are attained where G_i is a multiple of I (RMSNorm "
    "without gain at x = 0), by A_i = a_i I and, if a_i g_i <= 1, by - a_i I; the last says something "
    "exactly if a1 g1 < 1 and a2 g2 < 1.",
    assumptions=AXIOMS,
    uses=["RMS-JAC", "LN-JAC", "BLK-TOKENS"],
    source=PAPER + "; the bounds are this project's",
)
def blk_pre() -> list[Evidence]:
    """Differentiate a rank-one branch, expand the product, bound it term by term."""
    proof = Symbolic(
        "derivative of a rank-one branch by contraction; expansion in noncommuting M_i = A_i G_i"
    )

    def normed(k: sp.Symbol) -> sp.Expr:
        return x[k] / sp.sqrt(total(lambda m: x[m] ** 2) / d + eps)

    def half(a: sp.Symbol, b_: sp.Symbol) -> sp.Expr:
        return delta(a, b_) + product(lambda p, q: b[p] * c[q], rms_jacobian)(a, b_)

    derived = differentiate(x[i] + b[i] * total(lambda k: c[k] * normed(k)), x, j)
    proof.equal("x + b <c, N(x)>: J = I + A G", derived, half(i, j), RMS_FACTS)
    two = (1 + M2) * (1 + M1)
    proof.equal("(I + M2)(I + M1) - I", two - 1, M1 + M2 + M2 * M1)
    proof.reject(
        "identity path dropped", derived, half(i, j) - delta(i, j), RMS_FACTS, mutation="term dropped"
    )
    wrong = product(rms_jacobian, lambda p, q: b[p] * c[q])(i, j)
    proof.reject("G A in place of A G", derived, delta(i, j) + wrong, RMS_FACTS, mutation="other")
    proof.reject("halves in the wrong order", two, (1 + M1) * (1 + M2), mutation="other")
    proof.reject("cross term dropped", two - 1, M1 + M2, mutation="term dropped")

    # Multiples of I attain the bounds: halves (1 + a_i g_i) I, or (1 - a_i g_i) I.
    for sign in (1, -1):
        halves = [multiple(1 + sign * a_ * g_) for a_, g_ in ((a1, g1), (a2, g2))]
        attained = (1 + sign * a1 * g1) * (1 + sign * a2 * g2) * delta(i, j)
        proof.equal(f"A_i = {sign} a_i I, G_i = g_i I", product(*halves)(i, j), attained)
    bound = (1 + a1 * g1) * (1 + a2 * g2)
    sizes = [m1 <= a1 * g1, m2 <= a2 * g2]
    norms = Smt("m_i = |M_i| <= a_i g_i; sigma_JI = |M1 + M2 + M2 M1|", sizes)
    triangle = [norm_rest <= m1 + m2 + m2 * m1, norm_j <= (1 + m2) * (1 + m1)]
    norms.show("sigma(J) <= (1 + a1 g1)(1 + a2 g2)", norm_j <= bound, *triangle)
    norms.show("sigma(J - I) <= that less 1", norm_rest <= bound - 1, *triangle)
    least = positive_part(1 - a1 * g1) * positive_part(1 - a2 * g2)
    norms.show("|J v| >= max(0, 1 - a1 g1) max(0, 1 - a2 g2) |v|", v2 >= least * v0, *_shrinking())
    says = sp.Equivalent(least > 0, sp.And(a1 * g1 < 1, a2 * g2 < 1))
    norms.show("the lower bound is positive exactly if both a_i g_i < 1", says)
    p, q = a1 * g1, a2 * g2
    norms.reject("sigma(J - I) <= a1 g1 + a2 g2", norm_rest <= p + q, *triangle, mutation="term dropped")
    norms.reject(
        "sigma(J) <= 1 + max a_i g_i", norm_j <= 1 + sp.Max(p, q), *triangle, mutation="bound tightened"
    )
    norms.reject(
        "gain dropped: sigma(J) <= (1 + a1)(1 + a2)",
        norm_j <= (1 + a1) * (1 + a2),
        *triangle,
        mutation="gain dropped",
    )
    norms.reject(
        "|J v| >= (1 - a1 g1)(1 - a2 g2)|v| without max(0, .)",
        v2 >= (1 - p) * (1 - q) * v0,
        *_shrinking(),
        mutation="assumption dropped",
    )
    norms.reject("|J v| <= |v|", v2 <= v0, *_shrinking(), mutation="inequality turned")
    return [proof.evidence(), norms.evidence()]


def _shrinking() -> list[Formula]:
    """v1 = |(I + M1) v|, v2 = |(I + M2)(I + M1) v|, by the triangle inequality."""
    first = [part1 <= m1 * v0, v1 >= v0 - part1, v1 <= v0 + part1]
    return [*first, part2 <= m2 * v1, v2 >= v1 - part2, v2 <= v1 + part2]


@claim(
    "BLK-PARALLEL",
    title="Jacobian of a parallel block",
    statement="Attention and MLP side by side (GPT-NeoX, Falcon, Phi): J = I + A1 G1 + A2 G2. sigma(J) <= 1 "
    "+ a1 g1 + a2 g2, sigma(J - I) <= a1 g1 + a2 g2, every singular value is at least max(0, 1 - a1 g1 - a2 "
    "g2). All are attained where G_i is a multiple of I, by A_i = a_i I and, if a1 g1 + a2 g2 <= 1, by - "
    "a_i I. With one norm for both, sigma(J - I) <= g sigma(A1 + A2). Against two halves in a row the term "
    "a1 g1 a2 g2 is missing.",
    assumptions=AXIOMS,
    uses=["BLK-PRE"],
)
def blk_parallel() -> list[Evidence]:
    """Differentiate two rank-one branches; bound the sum."""
    proof = Symbolic("derivative of two rank-one branches by contraction")
    e, f = vector("e"), vector("f")

    def normed(k: sp.Symbol) -> sp.Expr:
        return x[k] / sp.sqrt(total(lambda m: x[m] ** 2) / d + eps)

    y = x[i] + b[i] * total(lambda k: c[k] * normed(k)) + e[i] * total(lambda k: f[k] * normed(k))
    both = product(lambda p, q: b[p] * c[q] + e[p] * f[q], rms_jacobian)(i, j)
    derived = differentiate(y, x, j)
    proof.equal("J = I + (A1 + A2) G with one norm", derived, delta(i, j) + both, RMS_FACTS)
    other = sp.Symbol("eps_2", nonnegative=True)
    s2 = sp.sqrt(s**2 - eps + other)

    def second(p: sp.Symbol, q: sp.Symbol) -> sp.Expr:
        return (delta(p, q) - x[p] * x[q] / (d * s2**2)) / s2

    away = total(lambda k: f[k] * x[k]) / sp.sqrt(total(lambda m: x[m] ** 2) / d + other)
    two = differentiate(x[i] + b[i] * total(lambda k: c[k] * normed(k)) + e[i] * away, x, j)
    each = product(lambda p, q: b[p] * c[q], rms_jacobian)(i, j) + product(lambda p, q: e[p] * f[q], second)(
        i, j
    )
    proof.equal("J = I + A1 G1 + A2 G2 with two norms", two, delta(i, j) + each, RMS_FACTS)
    proof.reject(
        "the second norm's eps that of the first", two, delta(i, j) + both, RMS_FACTS, mutation="eps moved"
    )
    for sign in (1, -1):
        sides = [product(multiple(sign * a_), multiple(g_))(i, j) for a_, g_ in ((a1, g1), (a2, g2))]
        attained = (1 + sign * (a1 * g1 + a2 * g2)) * delta(i, j)
        proof.equal(f"A_i = {sign} a_i I, G_i = g_i I", delta(i, j) + sum(sides), attained)
    proof.reject(
        "two halves in a row", (1 + A2 * G2) * (1 + A1 * G1), 1 + A1 * G1 + A2 * G2, mutation="other"
    )
    proof.reject("identity path dropped", derived, both, RMS_FACTS, mutation="term dropped")
    sizes = [m1 <= a1 * g1, m2 <= a2 * g2, part1 <= m1 * v0, part2 <= m2 * v0]
    bound = a1 * g1 + a2 * g2
    norms = Smt("m_i = |A_i G_i|; triangle inequality", sizes)
    norms.show("sigma(J - I) <= a1 g1 + a2 g2", norm_rest <= bound, norm_rest <= m1 + m2)
    norms.show("sigma(J) <= 1 + a1 g1 + a2 g2", norm_j <= 1 + bound, norm_j <= 1 + m1 + m2)
    below = v1 >= v0 - part1 - part2
    norms.show("|J v| >= max(0, 1 - a1 g1 - a2 g2)|v|", v1 >= positive_part(1 - bound) * v0, below)
    norms.show("never above the bound of two halves", 1 + bound <= (1 + a1 * g1) * (1 + a2 * g2))
    norms.show(
        "one norm: |(A1 + A2) G| <= a g",
        norm_rest <= a * g,
        norm_rest <= part1 * part2,
        part1 <= a,
        part2 <= g,
    )
    norms.reject(
        "sigma(J - I) <= max",
        norm_rest <= sp.Max(a1 * g1, a2 * g2),
        norm_rest <= m1 + m2,
        mutation="bound tightened",
    )
    norms.reject("gain dropped", norm_rest <= a1 + a2, norm_rest <= m1 + m2, mutation="gain dropped")
    norms.reject("|J v| >= (1 - a1 g1)|v|", v1 >= (1 - a1 * g1) * v0, below, mutation="term dropped")
    norms.reject(
        "1 + a1 g1 + a2 g2 >= the bound of two halves",
        1 + bound >= (1 + a1 * g1) * (1 + a2 * g2),
        mutation="inequality turned",
    )
    return [proof.evidence(), norms.evidence()]
