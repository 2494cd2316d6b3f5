"""Deciding claims, and the ledger that holds what came out."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import write_json
from preln.base.progress import track
from preln.theory.claims import (
    CLAIMS,
    EVIDENCE_KINDS,
    THEOREM_STATUSES,
    Claim,
    Evidence,
    Registry,
    status_of,
)

SCHEMA_VERSION = 1
FAMILIES = {
    "Normalisation layers": (
        *("norms", "sigma", "placement", "gains", "secular", "comparison", "below_one", "variants"),
    ),
    "One block": ("block", "post", "sandwich"),
    "Depth": ("stack", "chain", "monotone", "growth", "initialisation"),
    "Pruning and similarity": ("pruning", "head", "similarity", "angles"),
    "Healing": ("healing", "cost"),
    "Hypotheses": ("hypotheses",),
}
"""Families of claims, and the modules of `preln.theory` that register them, in the order of the ledger."""
OWN = "Your claims"


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

    @property
    def controls(self) -> list[dict[str, Any]]:
        """Every negative control of every piece of evidence."""
        return [c for e in self.evidence for c in e.detail.get("negative_controls", [])]

    def as_dict(self) -> dict[str, Any]:
        """Return the claim as plain data in the ledger's schema."""
        return {
            "id": self.claim.id,
            "kind": self.claim.kind,
            "family": family_of(self.claim),
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
            rows.append((id, entry.status, kinds or "-", killed(entry.controls), entry.claim.title))
        return "\n".join([*_aligned(rows), *(f"NOT AS LISTED: {line}" for line in self.failures)])

    def families(self) -> list[dict[str, Any]]:
        """Return `family_rows` of this ledger."""
        return family_rows(self.to_json()["claims"])

    def survivors(self) -> list[str]:
        """Return the mutants that nothing noticed, as `ID: name`."""
        return [
            f"{id}: {c['name']}"
            for id, entry in self.claims.items()
            for c in entry.controls
            if not c["rejected"]
        ]

    def family_table(self) -> str:
        """Return `families()` as aligned text, the survivors below it."""
        rows = self.families()
        if not rows:
            return ""
        table = [tuple(rows[0]), *(tuple(str(v) for v in row.values()) for row in rows)]
        return "\n".join([*_aligned(table), *(f"MUTANT SURVIVES: {line}" for line in self.survivors())])


def family_rows(claims: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a family of theorems: how many, how they came out, on what evidence.

    Args:
        claims: as a ledger file holds them; those without a family (of an older file) are left out.

    Returns:
        Keys `family`, `theorems`, `proved`, `refuted`, `open`, one for every kind of evidence that occurs
        (the theorems that have it), `mutants` and `killed`.
    """
    theorems = [c for c in claims if c["kind"] == "theorem" and c.get("family")]
    found = {e["kind"] for c in theorems for e in c["evidence"]}
    kinds = [kind for kind in EVIDENCE_KINDS if kind in found]
    rows = []
    for family in dict.fromkeys(c["family"] for c in theorems):
        members = [c for c in theorems if c["family"] == family]
        row: dict[str, Any] = {"family": family, "theorems": len(members)}
        row |= {s: sum(m["status"] == s for m in members) for s in THEOREM_STATUSES}
        row |= {k: sum(any(e["kind"] == k for e in m["evidence"]) for m in members) for k in kinds}
        details = [e["detail"] for m in members for e in m["evidence"]]
        controls = [n for detail in details for n in detail.get("negative_controls", [])]
        rows.append(row | {"mutants": len(controls), "killed": sum(n["rejected"] for n in controls)})
    return rows


def killed(controls: list[dict[str, Any]]) -> str:
    """Return how many mutants were noticed, as `5/5`; `-` without any."""
    return f"{sum(c['rejected'] for c in controls)}/{len(controls)}" if controls else "-"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def family_of(claim: Claim) -> str:
    """Return the family of a claim, by the module that decides it; `OWN` for a user's."""
    module = claim.decide.__module__
    for family, modules in FAMILIES.items():
        if module in {f"preln.theory.{m}" for m in modules}:
            return family
    return OWN


def registry() -> Registry:
    """Return the registry with the built-in claims in it."""
    for modules in FAMILIES.values():
        for module in modules:
            importlib.import_module(f"preln.theory.{module}")
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


def _evidence(claim: Claim) -> tuple[Evidence, ...]:
    """Run a claim's decision; a user's mistake becomes one line that names the claim."""
    try:
        found = tuple(claim.decide())
        if not all(isinstance(e, Evidence) for e in found):
            raise TypeError("it must return pieces of Evidence")
    except Exception as error:
        if family_of(claim) != OWN:
            raise
        if isinstance(error, InputError):
            raise InputError(f"claim {claim.id}: {error}") from error
        raise InputError(
            f"claim {claim.id}: its function failed with {type(error).__name__}: {error}"
        ) from error
    return found


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
            evidence = _evidence(claims[id])
            done[id] = Decided(claims[id], evidence, status_of(claims[id].kind, evidence, used))
        return done[id]

    wanted = select(ids, claims)
    return Ledger({id: visit(id, ()) for id in track(wanted, label="deriving", total=len(wanted))})
