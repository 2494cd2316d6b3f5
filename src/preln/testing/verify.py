"""Deciding the theorems and putting them to the test: what `preln verify` runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError, require
from preln.base.progress import note, track

if TYPE_CHECKING:
    from preln.theory import Evidence, Ledger

ROUNDS = {"quick": 4, "full": 60}
"""How often each profile goes through the dimensions."""
PACKAGES = ("sympy", "z3", "hypothesis")
"""What deciding and checking need."""


def verify(
    ids: Iterable[str] | None = None, profile: str = "quick", ledgers: Iterable[str | Path] = ()
) -> Ledger:
    """Decide claims by proof, then check the proved ones on numbers.

    Every claim gets the evidence of its derivation; those with a check get `property` evidence from autograd
    in float64 and from modules in use, or a `measurement` by Monte Carlo; mutated formulas go through the
    same checks; every counterexample is evaluated again by autograd. Where there is a GPU, the formulas of
    the norms are also computed there and go through the same checks; where there is none, a line on stderr
    says so. A piece that fails shows as outcome `fail`, takes `proved` away and makes `.ok` false.

    Args:
        ids: the claims; None for all of them.
        profile: `quick` (under a minute on one core) or `full` (fifteen times the examples).
        ledgers: Python files with claims of your own, decided with the built-in ones (`preln.theory.own`).
            They are run as code, and a line on stderr says so first.

    Returns:
        The ledger: `.claims[id].status`, `.claims[id].evidence`, `.ok`, `.failures`, `.families()`,
        `.survivors()`, `.to_json()`, `.write(path)`.

    Raises:
        InputError: an ID or the profile is unknown, or a file of claims cannot be used.
        MissingExtraError: a package that deciding needs is not installed.
    """
    if profile not in ROUNDS:
        raise InputError(f"unknown profile {profile!r}: use one of {', '.join(ROUNDS)}")
    for package in PACKAGES:
        require(package, extra="theory")
    from preln.testing.checks.device import gpu
    from preln.testing.checks.norm import PROPERTIES
    from preln.theory import Ledger, decide, registry, select
    from preln.theory.own import own_claims

    files = list(ledgers)
    try:
        with own_claims(_announced(files)):
            wanted = select(ids, registry())
            if gpu() is None and not PROPERTIES.keys().isdisjoint(wanted):
                note("no GPU here: the check of the norms' formulas on a GPU is skipped")
            ledger = decide(wanted)
            claims = dict(ledger.claims)
            for id in track(wanted, label="checking on numbers", total=len(wanted)):
                claims[id] = claims[id].with_evidence(*properties(id, claims[id].evidence, ROUNDS[profile]))
    except SystemExit as stop:
        named = ", ".join(map(str, files))
        raise InputError(f"{named}: its code ends the process (exit {stop.code}): take that out") from stop
    for id in claims.keys() - registry().keys():
        _check_storable(id, claims[id].as_dict())
    return Ledger(claims)


def _check_storable(id: str, entry: dict[str, Any]) -> None:
    """Refuse evidence of a user's claim that a ledger file cannot hold.

    Raises:
        InputError: a detail is no plain data, or not finite.
    """
    try:
        json.dumps(entry, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"claim {id}: a detail of its evidence is no plain data for JSON ({reason}): give text, finite "
            "numbers, lists and dictionaries"
        ) from error


def _announced(ledgers: Iterable[str | Path]) -> Iterator[str | Path]:
    """Yield files of claims, each that is there after a line which says that it is run."""
    for path in ledgers:
        if Path(path).is_file() and Path(path).suffix == ".py":
            note(f"{path}: a file of claims is Python code, and is run now with your rights")
        yield path


def properties(id: str, evidence: Iterable[Evidence], rounds: int) -> list[Evidence]:
    """Return a claim's evidence from numbers: its check, its mutants, its counterexamples evaluated again."""
    from preln.testing.checks import checks, in_use, measurements
    from preln.testing.checks.device import gpu, on_device
    from preln.testing.checks.mutants import formula_mutants
    from preln.testing.checks.reproduce import REPRODUCE, reproduce

    found = [e for table in (checks(), measurements()) if id in table for e in table[id](rounds)]
    name = gpu()
    found += [] if name is None else on_device(id, "cuda", name)
    examples = [e for e in evidence if e.kind == "counterexample" and id in REPRODUCE]
    return [*found, *in_use(id, rounds), *formula_mutants(id), *(reproduce(id, e.detail) for e in examples)]
