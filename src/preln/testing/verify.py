"""Deciding the theorems and putting them to the test: what `preln verify` runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from preln.base.errors import InputError
from preln.base.progress import track
from preln.testing.checks import checks, in_use, measurements
from preln.testing.checks.mutants import formula_mutants
from preln.testing.checks.reproduce import REPRODUCE, reproduce
from preln.theory import Evidence, Ledger, decide, registry, select
from preln.theory.own import own_claims

ROUNDS = {"quick": 4, "full": 60}
"""How often each profile goes through the dimensions."""


def verify(
    ids: Iterable[str] | None = None, profile: str = "quick", ledgers: Iterable[str | Path] = ()
) -> Ledger:
    """Decide claims by proof, then check the proved ones on numbers.

    Every claim gets the evidence of its derivation; those with a check get `property` evidence from autograd
    in float64 and from modules in use, or a `measurement` by Monte Carlo; mutated formulas go through the
    same checks; every counterexample is evaluated again by autograd. A piece that fails shows as outcome
    `fail`, takes `proved` away and makes `.ok` false.

    Args:
        ids: the claims; None for all of them.
        profile: `quick` (seconds) or `full` (fifteen times the examples).
        ledgers: Python files with claims of your own, decided with the built-in ones (`preln.theory.own`).

    Returns:
        The ledger: `.claims[id].status`, `.claims[id].evidence`, `.ok`, `.failures`, `.families()`,
        `.survivors()`, `.to_json()`, `.write(path)`.

    Raises:
        InputError: an ID or the profile is unknown, or a file of claims cannot be used.
    """
    if profile not in ROUNDS:
        raise InputError(f"unknown profile {profile!r}: use one of {', '.join(ROUNDS)}")
    with own_claims(ledgers):
        wanted = select(ids, registry())
        ledger = decide(wanted)
        claims = dict(ledger.claims)
        for id in track(wanted, label="checking on numbers", total=len(wanted)):
            claims[id] = claims[id].with_evidence(*properties(id, claims[id].evidence, ROUNDS[profile]))
    return Ledger(claims)


def properties(id: str, evidence: Iterable[Evidence], rounds: int) -> list[Evidence]:
    """Return a claim's evidence from numbers: its check, its mutants, its counterexamples evaluated again."""
    found = [e for table in (checks(), measurements()) if id in table for e in table[id](rounds)]
    examples = [e for e in evidence if e.kind == "counterexample" and id in REPRODUCE]
    return [*found, *in_use(id, rounds), *formula_mutants(id), *(reproduce(id, e.detail) for e in examples)]
