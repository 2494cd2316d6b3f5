"""The bridge to the solver: certificates, exact models, and no guesses."""

import pytest
import sympy as sp
import z3

from preln.base.errors import InputError
from preln.theory.claims import status_of
from preln.theory.evidence import Smt, Symbolic, counterexample, settle
from preln.theory.index import d, inner, total, vector
from preln.theory.smt import prove

a, b = sp.symbols("a b", real=True)
p = sp.Symbol("p", positive=True)


def test_a_true_claim_gets_a_certificate_and_a_false_one_a_model():
    assert prove(a**2 + b**2 >= 2 * a * b).status == "proved"
    answer = prove(a**2 >= a, [a >= 0])
    assert answer.status == "refuted"
    value = sp.Rational(answer.model["a"])
    assert value >= 0 and not value**2 >= value


def test_models_are_exact_even_where_irrational():
    answer = prove(sp.Ne(a**2, 2), [a > 0])
    assert answer.status == "refuted" and answer.model["a"].startswith(
        "root 2 of polynomial ['-2', '0', '1']"
    )


def test_clashing_assumptions_prove_nothing():
    assert prove(a > 5, [a > 1, a < 0]).answer == "vacuous"
    assert prove(a > 5, [a > 1, a < 0]).status == "open"


def test_a_division_by_zero_refutes_nothing():
    """1/0 is any number to the solver: neither a counterexample nor a proof may rest on it."""
    answer = prove(1 / a >= 0, [sp.Eq(a, 0)])
    assert answer.answer == "unknown" and answer.status == "open"
    assert prove(1 / a <= b, [a >= 0, b >= 0]).answer == "sat"
    assert sp.Rational(prove(1 / a <= b, [a >= 0, b >= 0]).model["a"]) != 0
    assert prove(sp.Eq(1 / a, b), [sp.Eq(a * b, 1)]).holds


def test_a_solver_that_gives_up_leaves_the_claim_open(monkeypatch):
    monkeypatch.setattr(z3.Solver, "check", lambda self, *assumptions: z3.unknown)
    answer = prove(a**2 >= 0)
    assert answer.answer == "unknown" and answer.status == "open" and not answer.holds
    proof = Smt("gives up")
    proof.show("a^2 >= 0", a**2 >= 0)
    proof.reject("a > 0", a > 0)
    evidence = proof.evidence()
    assert not evidence.passed and not evidence.detail["negative_controls"][0]["rejected"]
    assert status_of("theorem", [evidence], {}) == "open"
    assert not settle(a**2 >= 0).passed


def test_declared_signs_and_dimensions_are_assumed():
    assert prove(p + a**2 > 0).holds
    assert not prove(a + a**2 >= 0).holds
    assert prove(sp.Or(sp.Eq(d, 1), d >= 2)).holds
    assert not prove(d >= 2).holds


def test_division_piecewise_and_max():
    assert prove(1 / (1 + p) < 1).holds
    assert prove(sp.Max(a, b, evaluate=False) >= a).holds
    assert prove(sp.Piecewise((a, a > 0), (-a, True)) >= 0).holds
    assert not prove(sp.Abs(a) > 0).holds


@pytest.mark.parametrize("claim", [sp.sqrt(p) > b, sp.exp(a) > 1 + a, sp.sin(a) <= 1 + b])
def test_what_is_not_real_arithmetic_is_refused(claim):
    with pytest.raises(InputError, match="not a formula of real arithmetic"):
        prove(claim)


def test_a_surviving_control_makes_evidence_fail():
    x = vector("x")
    square = total(lambda k: x[k] ** 2)
    proof = Symbolic("contraction")
    proof.equal("<x,x>", square, inner(x, x))
    assert proof.evidence().passed
    proof.reject("not false at all", square, inner(x, x))
    assert not proof.evidence().passed

    solver = Smt("squares")
    solver.show("a^2 >= 0", a**2 >= 0)
    assert solver.evidence().passed
    solver.reject("not false at all", a**2 + 1 > 0)
    assert not solver.evidence().passed


def test_nothing_shown_is_nothing_proved():
    assert not Symbolic("empty").evidence().passed
    assert not Smt("empty").evidence().passed


def test_a_counterexample_must_violate_and_its_twin_must_not():
    common = {"check": "a < 1", "instance": {"a": 2}, "values": {"a": 2}}
    assert counterexample(violated=sp.Lt(2, 1), **common).passed
    assert not counterexample(violated=sp.Lt(0, 1), **common).passed
    assert not counterexample(violated=sp.Lt(2, 1), harmless={"a = 3": sp.Lt(3, 1)}, **common).passed


def test_decide_tells_a_true_bound_from_a_false_one():
    assert settle(p + 1 / p >= 2).kind == "smt"
    wrong = settle(p + 1 / p >= 3)
    assert wrong.kind == "counterexample" and wrong.passed and "p" in wrong.detail["model"]
