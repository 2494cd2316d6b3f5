"""What must hold, and why: definitions, derived Jacobians, spectra, bounds, a registry of claims."""

from __future__ import annotations

from preln.theory.claims import CLAIMS, Claim, Evidence, Registry, claim
from preln.theory.evidence import Smt, Symbolic, counterexample, settle
from preln.theory.ledger import Decided, Ledger, decide, registry, select

__all__ = [
    "CLAIMS",
    "Claim",
    "Decided",
    "Evidence",
    "Ledger",
    "Registry",
    "Smt",
    "Symbolic",
    "claim",
    "counterexample",
    "decide",
    "registry",
    "select",
    "settle",
]
