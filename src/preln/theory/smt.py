"""Scalar inequalities go to Z3; claims state them in SymPy, and they are translated here.

`prove` asks for a model of the assumptions and the negated claim. No model exists: a certificate. A model
exists: an exact counterexample. The solver gives up: `open`, never a guess. The assumptions themselves must
have a model, or the answer would be vacuous. A SymPy function without a definition, such as `U(x)`, becomes
an uninterpreted function: the solver then knows that equal arguments give equal values, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import sympy as sp
from sympy.core.function import AppliedUndef

from preln.base.errors import InputError, require

Formula = sp.Basic
EFFORT = 5_000_000
"""The solver's limit, in its own count of steps: unlike a time limit it is the same on every machine."""


@dataclass(frozen=True)
class Certificate:
    """The solver's answer on one claim.

    Attributes:
        answer: `unsat` (the claim holds), `sat` (`model` violates it), `unknown` (the solver gave up, or only
            a division by 0 violates it), or `vacuous` (the assumptions clash).
        model: exact values of the symbols, as text, when the answer is `sat`.
        claim: the claim as text.
        assumptions: the assumptions as text.
    """

    answer: str
    claim: str
    assumptions: tuple[str, ...]
    model: dict[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """True only if the negation was shown to have no model."""
        return self.answer == "unsat"

    @property
    def status(self) -> str:
        """`proved`, `refuted` or `open`."""
        return {"unsat": "proved", "sat": "refuted"}.get(self.answer, "open")

    def as_dict(self) -> dict[str, Any]:
        """Return the certificate as plain data for the ledger."""
        plain = {"answer": self.answer, "claim": self.claim, "assumptions": list(self.assumptions)}
        return plain | ({"model": self.model} if self.model else {})


def prove(claim: Formula, assumptions: Iterable[Formula] = (), *, effort: int = EFFORT) -> Certificate:
    """Decide a claim about real numbers under assumptions.

    What a symbol is declared to be (positive, nonnegative) is assumed as well. A positive integer n becomes a
    real with `n = 1 or n = 2 or n >= 3`, a superset of the integers: a proof carries over.

    Args:
        claim: relations between rational expressions, joined by And, Or, Not, Implies, Equivalent.
        assumptions: likewise; all of them are taken together.
        effort: the solver's limit of steps, for each of its two questions.

    Raises:
        InputError: the claim holds something that is not a formula of real arithmetic, such as `sqrt` or
            `exp`.
    """
    z3 = require("z3", extra="theory")
    assumptions = [sp.sympify(a) for a in assumptions]
    claim = sp.sympify(claim)
    translate = _Translator(z3)
    premises = [translate(a) for a in assumptions]
    goal = translate(claim)
    text = {"claim": str(claim), "assumptions": tuple(str(a) for a in assumptions)}

    def ask(*facts: Any) -> tuple[Any, Any]:
        solver = z3.Solver(ctx=translate.context)
        solver.set("rlimit", effort)
        solver.set("random_seed", 0)
        solver.add(*premises, *translate.declared(), *facts)
        return solver.check(), solver

    if ask()[0] == z3.unsat:
        return Certificate("vacuous", **text)
    # A quotient by 0 is any number to the solver: a counterexample must not need one, a proof must bear it.
    answer, solver = ask(z3.Not(goal), *[divisor != 0 for divisor in translate.divisors])
    if answer == z3.sat:
        model = solver.model()
        values = {
            name: exact(model.eval(variable, model_completion=True)) for name, variable in translate.names()
        }
        return Certificate("sat", **text, model=values)
    if translate.divisors:
        answer, _ = ask(z3.Not(goal))
    return Certificate("unsat" if answer == z3.unsat else "unknown", **text)


def exact(value: Any) -> str:
    """Write a solver's value exactly: a fraction, or a polynomial and which of its roots."""
    if hasattr(value, "as_fraction"):
        return str(Fraction(value.as_fraction()))
    coefficients = [str(Fraction(c.as_fraction())) for c in value.poly()]
    return f"root {value.index()} of polynomial {coefficients} (about {value.approx(12).as_decimal(12)})"


class _Translator:
    """SymPy formulas to Z3 formulas over the reals, one variable a symbol, one context a question."""

    def __init__(self, z3: Any):
        self.z3 = z3
        # A context of its own: what was asked before must not change the solver's path.
        self.context = z3.Context()
        self.variables: dict[sp.Symbol, Any] = {}
        self.divisors: list[Any] = []

    def names(self) -> list[tuple[str, Any]]:
        return sorted((symbol.name, variable) for symbol, variable in self.variables.items())

    def declared(self) -> list[Any]:
        """The symbols' own assumptions as formulas."""
        facts = []
        for symbol, v in self.variables.items():
            if symbol.is_integer and symbol.is_positive:
                facts.append(self.z3.Or(v == 1, v == 2, v >= 3))
            elif symbol.is_integer:
                raise InputError(f"symbol {symbol}: only positive integers can be handed to the solver")
            elif symbol.is_positive:
                facts.append(v > 0)
            elif symbol.is_nonnegative:
                facts.append(v >= 0)
        return facts

    def __call__(self, e: Any) -> Any:
        z3 = self.z3
        if e is sp.true or e is sp.false:
            return z3.BoolVal(e is sp.true, self.context)
        if isinstance(e, sp.Symbol):
            if e not in self.variables:
                self.variables[e] = z3.Real(e.name, self.context)
            return self.variables[e]
        if isinstance(e, sp.Rational):
            return z3.RealVal(f"{e.p}/{e.q}", self.context)
        args = [self(a) for a in e.args] if not isinstance(e, sp.Pow | sp.Piecewise) else []
        if isinstance(e, AppliedUndef):
            sorts = [z3.RealSort(self.context)] * (len(args) + 1)
            return z3.Function(e.func.__name__, *sorts)(*args)
        if isinstance(e, sp.Add):
            return z3.Sum(args)
        if isinstance(e, sp.Mul):
            return z3.Product(args)
        if isinstance(e, sp.Pow) and e.exp.is_Integer:
            power = z3.Product([self(e.base)] * abs(int(e.exp)))
            if e.exp > 0:
                return power
            self.divisors.append(power)
            return 1 / power
        if isinstance(e, sp.Abs):
            return z3.If(args[0] >= 0, args[0], -args[0])
        if isinstance(e, sp.Max | sp.Min):
            best = args[0]
            for a in args[1:]:
                best = z3.If((a > best) if isinstance(e, sp.Max) else (a < best), a, best)
            return best
        if isinstance(e, sp.Piecewise):
            *cases, (last, condition) = e.args
            if condition != sp.true:
                raise InputError(f"{e}: the last case must be `True`")
            result = self(last)
            for value, when in reversed(cases):
                result = z3.If(self(when), self(value), result)
            return result
        relations = {
            sp.Eq: lambda a, b: a == b,
            sp.Ne: lambda a, b: a != b,
            sp.Le: lambda a, b: a <= b,
            sp.Lt: lambda a, b: a < b,
            sp.Ge: lambda a, b: a >= b,
            sp.Gt: lambda a, b: a > b,
            sp.Implies: z3.Implies,
            sp.Equivalent: lambda a, b: a == b,
            sp.And: z3.And,
            sp.Or: z3.Or,
            sp.Not: z3.Not,
        }
        for kind, build in relations.items():
            if isinstance(e, kind):
                return build(*args)
        raise InputError(
            f"{e} is not a formula of real arithmetic: state roots and exponentials through new symbols"
        )
