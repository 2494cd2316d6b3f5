"""How a decision is put together: identities, solver questions, counterexamples, negative controls.

A negative control is a false variant of the step (eps forgotten, a bound too strong) that goes through the
same machinery and must be rejected. One that survives makes the evidence fail: a machine that proves
everything proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy as sp

from preln.theory.claims import Evidence
from preln.theory.index import Facts, contract, normal
from preln.theory.mutation import control, expression_mutants, turned
from preln.theory.smt import Formula, prove


class Symbolic:
    """Identities in index notation, for every dimension d."""

    def __init__(self, method: str):
        self.method = method
        self.steps: list[dict[str, Any]] = []
        self.controls: list[dict[str, Any]] = []

    def equal(self, name: str, left: sp.Expr, right: sp.Expr, facts: Facts | None = None) -> None:
        """Show that two index expressions are equal under `facts`, and that mutants of `right` are not."""
        left = contract(left)
        rest = normal(left - right, facts)
        self.steps.append(
            {"step": name, "holds": bool(rest == 0)} | ({} if rest == 0 else {"rest": str(rest)})
        )
        for mutation, wrong in expression_mutants(right):
            self.reject(f"{name}: {mutation}", left, wrong, facts, mutation=mutation)

    def true(self, name: str, holds: bool) -> None:
        """Record a step that SymPy decided as true or false."""
        self.steps.append({"step": name, "holds": holds is True or holds is sp.true})

    def reject(
        self,
        name: str,
        left: sp.Expr,
        wrong: sp.Expr,
        facts: Facts | None = None,
        *,
        mutation: str = "other",
    ) -> None:
        """Negative control: the difference must not vanish."""
        rest = normal(left - wrong, facts)
        self.controls.append(control(name, mutation, rest != 0, rest=str(rest)))

    def evidence(self) -> Evidence:
        """Return the `symbolic` evidence; it passes if every step holds and every control is rejected."""
        good = bool(self.steps) and all(s["holds"] for s in self.steps)
        good = good and all(c["rejected"] for c in self.controls)
        detail = {
            "method": self.method,
            "dimension": "every d",
            "steps": self.steps,
            "negative_controls": self.controls,
        }
        return Evidence("symbolic", "pass" if good else "fail", detail)


class Smt:
    """Questions to the solver that together make up a proof."""

    def __init__(self, method: str, assumptions: Iterable[Formula] = ()):
        self.method = method
        self.assumptions = list(assumptions)
        self.steps: list[dict[str, Any]] = []
        self.controls: list[dict[str, Any]] = []

    def show(self, name: str, claim: Formula, *more: Formula) -> None:
        """Ask for `claim` under the common assumptions and `more`; an inequality must not hold turned."""
        certificate = prove(claim, [*self.assumptions, *more])
        self.steps.append({"step": name, "holds": certificate.holds} | certificate.as_dict())
        wrong = turned(claim)
        if wrong is None:
            return
        self.reject(f"{name}: turned", wrong, *more, mutation="inequality turned")
        equal = sp.Eq(*claim.args)
        if not self.controls[-1]["rejected"] and prove(equal, [*self.assumptions, *more]).holds:
            # Both sides are equal here, so turning the inequality changes nothing: not a mutant.
            self.controls.pop()

    def reject(self, name: str, claim: Formula, *more: Formula, mutation: str = "other") -> None:
        """Negative control: the solver must find a model against `claim`."""
        certificate = prove(claim, [*self.assumptions, *more])
        rejected = certificate.answer == "sat"
        self.controls.append(control(name, mutation, rejected, claim=str(claim), model=certificate.model))

    def evidence(self) -> Evidence:
        """Return the `smt` evidence; it passes if every step is unsat and every control sat."""
        good = bool(self.steps) and all(s["holds"] for s in self.steps)
        good = good and all(c["rejected"] for c in self.controls)
        detail = {"method": self.method, "steps": self.steps, "negative_controls": self.controls}
        return Evidence("smt", "pass" if good else "fail", detail)


def settle(
    claim: Formula, assumptions: Iterable[Formula] = (), *, method: str = "negation to the solver"
) -> Evidence:
    """Decide a scalar claim: `smt` evidence if it holds, a `counterexample` with the model if not."""
    certificate = prove(claim, assumptions)
    kind = "counterexample" if certificate.answer == "sat" else "smt"
    outcome = "pass" if certificate.answer in ("sat", "unsat") else "fail"
    return Evidence(kind, outcome, {"method": method} | certificate.as_dict())


def counterexample(
    *,
    check: str,
    violated: sp.Basic,
    instance: Mapping[str, Any],
    values: Mapping[str, Any],
    harmless: Mapping[str, sp.Basic] | None = None,
    **more: Any,
) -> Evidence:
    """Return a counterexample that was evaluated exactly.

    Args:
        check: which statement a reader evaluates on `instance`, in words.
        violated: the statement on this instance; it must evaluate to False exactly.
        instance: the numbers that make up the instance, as exact values.
        values: the quantities compared, as exact values.
        harmless: negative controls: the statement on instances that do not violate it, by name; each must
            evaluate to True.
        more: anything else for the ledger.
    """
    verdict = sp.simplify(violated)
    controls = [
        control(name, "other", sp.simplify(holds) == sp.true) for name, holds in (harmless or {}).items()
    ]
    detail = {
        "check": check,
        "instance": _plain(instance),
        "values": _plain(values),
        "claim_on_instance": str(verdict),
        "negative_controls": controls,
    } | more
    good = verdict == sp.false and all(c["rejected"] for c in controls)
    return Evidence("counterexample", "pass" if good else "fail", detail)


def _plain(value: Any) -> Any:
    """Turn exact numbers into text, keep whole numbers and containers."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | bool) else str(value)
