"""Mutants made by rule: what the steps of a proof must not let through.

Every identity with d, eps, the mean or a gain on its right side is also tried with d - 1 for d, without eps,
without centring, without the gain; every inequality also the other way round. A mutant that changes nothing
(an inequality whose sides are equal under the assumptions) is no mutant and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy as sp

from preln.base.errors import InputError
from preln.theory.index import contract

MUTATIONS = (
    "eps dropped",
    "eps moved",
    "dimension off by one",
    "gain dropped",
    "centring dropped",
    "term dropped",
    "assumption dropped",
    "bound tightened",
    "bound loosened",
    "inequality turned",
    "other",
)
"""What a negative control does to a true statement."""

_SYMBOLS = {"d": ("dimension off by one", -1), "eps": ("eps dropped", None), "mu": ("centring dropped", None)}
_TURNED = {sp.Le: sp.Ge, sp.Ge: sp.Le, sp.Lt: sp.Ge, sp.Gt: sp.Le}


def control(name: str, mutation: str, rejected: bool, **more: Any) -> dict[str, Any]:
    """Return one negative control as plain data for the ledger.

    Raises:
        InputError: the mutation is none of `MUTATIONS`.
    """
    if mutation not in MUTATIONS:
        raise InputError(f"mutation {mutation!r} is unknown: use one of {', '.join(MUTATIONS)}")
    return {"name": name, "mutation": mutation, "rejected": bool(rejected)} | more


def expression_mutants(expression: sp.Expr) -> Iterator[tuple[str, sp.Expr]]:
    """Yield (mutation, mutated) for an index expression; nothing for one in noncommuting symbols."""
    expression = sp.sympify(expression)
    if not expression.is_commutative:
        return
    expression = contract(expression)
    for symbol in sorted(expression.free_symbols, key=str):
        if isinstance(symbol, sp.Symbol) and symbol.name in _SYMBOLS:
            mutation, shift = _SYMBOLS[symbol.name]
            yield mutation, expression.subs(symbol, 0 if shift is None else symbol + shift)
    gains = [entry for entry in expression.atoms(sp.Indexed) if str(entry.base) == "gamma"]
    if gains:
        yield "gain dropped", expression.subs(dict.fromkeys(gains, sp.S.One))


def turned(claim: sp.Basic) -> sp.Basic | None:
    """Return an inequality the other way round (with equality allowed), None for any other formula."""
    for kind, other in _TURNED.items():
        if isinstance(claim, kind):
            return other(*claim.args)
    return None
