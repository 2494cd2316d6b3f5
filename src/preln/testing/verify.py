"""Deciding the theorems and putting them to the test: what `preln verify` runs."""

from __future__ import annotations

from collections.abc import Iterable

from preln.base.errors import InputError
from preln.base.progress import track
from preln.testing import norm_properties, other_properties
from preln.theory import Evidence, Ledger, decide, registry, select

ROUNDS = {"quick": 4, "full": 60}
"""How often each profile goes through the dimensions."""


def verify(ids: Iterable[str] | None = None, profile: str = "quick") -> Ledger:
    """Decide claims by proof, then check the proved ones on numbers.

    Every claim gets the evidence of its derivation; those with a property check get `property` evidence from
    autograd in float64 and from modules in use, and every counterexample is evaluated again by autograd. A
    property that fails shows as outcome `fail`, takes `proved` away and makes `.ok` false.

    Args:
        ids: the claims; None for all of them.
        profile: `quick` (seconds) or `full` (fifteen times the examples).

    Returns:
        The ledger: `.claims[id].status`, `.claims[id].evidence`, `.ok`, `.failures`, `.to_json()`,
        `.write(path)`.

    Raises:
        InputError: an ID or the profile is unknown.
    """
    if profile not in ROUNDS:
        raise InputError(f"unknown profile {profile!r}: use one of {', '.join(ROUNDS)}")
    wanted = select(ids, registry())
    ledger = decide(wanted)
    claims = dict(ledger.claims)
    for id in track(wanted, label="checking on numbers", total=len(wanted)):
        claims[id] = claims[id].with_evidence(*properties(id, claims[id].evidence, ROUNDS[profile]))
    return Ledger(claims)


def properties(id: str, evidence: Iterable[Evidence], rounds: int) -> list[Evidence]:
    """Return a claim's `property` evidence: its registered check, and its counterexamples evaluated again."""
    checks = norm_properties.PROPERTIES | other_properties.PROPERTIES
    found = checks[id](rounds) if id in checks else []
    examples = [e for e in evidence if e.kind == "counterexample" and "instance" in e.detail]
    return [*found, *(other_properties.reproduce(e.detail, id) for e in examples)]
