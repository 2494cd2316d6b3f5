"""Mutants by rule: which there are, that false ones are noticed, and that harmless ones are left out."""

import pytest
import sympy as sp

from preln.base.errors import InputError
from preln.theory.evidence import Smt, Symbolic, settle
from preln.theory.gains import gamma
from preln.theory.index import d, i
from preln.theory.mutation import MUTATIONS, control, expression_mutants, turned
from preln.theory.norms import eps, mu

a, b = sp.symbols("a b", positive=True)


def test_what_is_done_to_an_identity():
    found = dict(expression_mutants(gamma[i] * (eps + mu) / d))
    assert found == {
        "dimension off by one": gamma[i] * (eps + mu) / (d - 1),
        "eps dropped": gamma[i] * mu / d,
        "centring dropped": gamma[i] * eps / d,
        "gain dropped": (eps + mu) / d,
    }
    assert dict(expression_mutants(a)) == {}
    assert dict(expression_mutants(sp.Symbol("A", commutative=False) * d)) == {}


def test_what_is_done_to_an_inequality():
    assert turned(a <= b) == (a >= b) and turned(a < b) == (a >= b)
    assert turned(a >= b) == (a <= b) and turned(a > b) == (a <= b)
    assert turned(sp.Eq(a, b)) is None and turned(sp.Implies(a < b, a > 0)) is None


def test_an_identity_that_ignores_d_does_not_pass():
    """0 * d = 0 holds with d - 1 as well: a step that cannot tell them apart fails."""
    proof = Symbolic("blind to d")
    proof.equal("x = x + 0 d, unexpanded", d * a, sp.Mul(d, a, evaluate=False))
    assert proof.evidence().passed
    blind = Symbolic("blind to d")
    blind.equal("the same under a fact that removes d", a - a, d * b, {b: sp.S.Zero})
    assert not blind.evidence().passed
    assert [c["rejected"] for c in blind.evidence().detail["negative_controls"]] == [False]


def test_an_inequality_is_tried_the_other_way_round():
    proof = Smt("a < b", [a < b])
    proof.show("a <= b", a <= b)
    (mutant,) = proof.evidence().detail["negative_controls"]
    assert mutant["mutation"] == "inequality turned" and mutant["rejected"] and proof.evidence().passed
    equal = Smt("a = b", [sp.Eq(a, b)])
    equal.show("a <= b", a <= b)
    assert equal.evidence().detail["negative_controls"] == [] and equal.evidence().passed


def test_the_vocabulary_is_closed():
    assert control("n", "eps dropped", True)["mutation"] in MUTATIONS
    with pytest.raises(InputError, match="eps lost"):
        control("n", "eps lost", True)


def test_settling_a_formula():
    assert settle(a <= b, [a < b]).kind == "smt"
    false = settle(a < b, [a <= b])
    assert (false.kind, false.outcome) == ("counterexample", "pass") and false.detail["model"]
    f, g = sp.Function("f"), sp.Function("g")
    assert settle(sp.Eq(f(a), f(b)), [sp.Eq(a, b)]).kind == "smt"
    assert settle(sp.Eq(f(a), g(b)), [sp.Eq(a, b)]).kind == "counterexample"
