"""Deciding claims, and the ledger that holds what came out."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import write_json
from preln.base.progress import track
from preln.theory.claims import CLAIMS, Claim, Evidence, Registry, status_of

SCHEMA_VERSION = 1
FAMILIES = ("norms", "sigma", "gains", "comparison", "stack", "similarity", "hypotheses")
"""Modules of `preln.theory` that register the built-in claims, in the order of the ledger."""


@dataclass(frozen=True)
class Decided:
    """A claim with the evidence found and the status that follows from it."""

    claim: Claim
    evidence: tuple[Evidence, ...]
    status: str

    @property
    def as_listed(self) -> bool:
        """True if the status is the one the claim is listed with and no evidence failed."""
        return self.status == self.claim.expect and all(e.passed for e in self.evidence)

    def with_evidence(self, *more: Evidence) -> Decided:
        """Return a copy with more evidence, and `open` in place of `proved` if some of it failed."""
        failed = self.status == "proved" and not all(e.passed for e in more)
        return replace(self, evidence=(*self.evidence, *more), status="open" if failed else self.status)

    def as_dict(self) -> dict[str, Any]:
        """Return the claim as plain data in the ledger's schema."""
        return {
            "id": self.claim.id,
            "kind": self.claim.kind,
            "title": self.claim.title,
            "statement": self.claim.statement,
            "assumptions": list(self.claim.assumptions),
            "uses": list(self.claim.uses),
            "status": self.status,
            "source": self.claim.source,
            "evidence": [e.as_dict() for e in self.evidence],
        }


@dataclass(frozen=True)
class Ledger:
    """Decided claims by ID.

    >>> decide(["RMS-JAC"]).claims["RMS-JAC"].status
    'proved'
    """

    claims: dict[str, Decided]

    @property
    def ok(self) -> bool:
        """True if every claim came out as it is listed and no evidence failed."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """One line for every claim that did not come out as it is listed."""
        lines = []
        for id, entry in self.claims.items():
            failed = sum(not e.passed for e in entry.evidence)
            if not entry.as_listed:
                rest = f", {failed} pieces of evidence failed" if failed else ""
                lines.append(f"{id} is listed as {entry.claim.expect} and came out as {entry.status}{rest}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as plain data, ready for `json.dump`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "claims": [entry.as_dict() for entry in self.claims.values()],
        }

    def write(self, path: str | Path) -> None:
        """Write `to_json()` to a file, making its folder: the whole file or nothing."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())

    def table(self) -> str:
        """Return one line a claim: ID, status, kinds of evidence, negative controls rejected, title."""
        rows = [("claim", "status", "evidence", "controls", "title")]
        for id, entry in self.claims.items():
            kinds = ", ".join(dict.fromkeys(e.kind + ("" if e.passed else " FAILED") for e in entry.evidence))
            controls = [c for e in entry.evidence for c in e.detail.get("negative_controls", [])]
            killed = f"{sum(c['rejected'] for c in controls)}/{len(controls)}" if controls else "-"
            rows.append((id, entry.status, kinds or "-", killed, entry.claim.title))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows
        ]
        return "\n".join(lines + [f"NOT AS LISTED: {line}" for line in self.failures])


def registry() -> Registry:
    """Return the registry with the built-in claims in it."""
    for family in FAMILIES:
        importlib.import_module(f"preln.theory.{family}")
    return CLAIMS


def select(ids: Iterable[str] | None, claims: Registry) -> list[str]:
    """Return the IDs asked for, in the ledger's order; all of them for None.

    Raises:
        InputError: an ID is not registered.
    """
    if ids is None:
        return list(claims)
    wanted = [ids] if isinstance(ids, str) else list(ids)
    for id in wanted:
        if id not in claims:
            raise InputError(f"unknown claim {id!r}: the known ones are {', '.join(claims)}")
    return [id for id in claims if id in wanted]


def decide(ids: Iterable[str] | None = None, *, claims: Registry | None = None) -> Ledger:
    """Decide claims by symbolic derivation and by the solver.

    A claim that uses another is `proved` only if that one is; the used claims are decided on the way and
    appear in the ledger only if they were asked for.

    Args:
        ids: the claims to decide; None for all.
        claims: where to look them up; the default is the built-in registry and what was added to it.

    Raises:
        InputError: an ID, asked for or used, is not registered, or claims use each other in a circle.
    """
    claims = registry() if claims is None else claims
    done: dict[str, Decided] = {}

    def visit(id: str, path: tuple[str, ...]) -> Decided:
        if id in path:
            raise InputError(f"claims use each other in a circle: {' -> '.join((*path, id))}; break it")
        if id not in claims:
            raise InputError(f"claim {path[-1]} uses {id!r}, which is not registered: register it or drop it")
        if id not in done:
            used = {other: visit(other, (*path, id)).status for other in claims[id].uses}
            evidence = tuple(claims[id].decide())
            done[id] = Decided(claims[id], evidence, status_of(claims[id].kind, evidence, used))
        return done[id]

    wanted = select(ids, claims)
    return Ledger({id: visit(id, ()) for id in track(wanted, label="deriving", total=len(wanted))})
