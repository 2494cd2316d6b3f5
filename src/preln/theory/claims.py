"""The registry of claims, what counts as evidence, and how evidence becomes a status.

A claim is a plain function that returns evidence; the decorator `claim` gives it its permanent ID. The status
is computed from the evidence and never written by hand:

- `refuted`: some evidence is a counterexample that was checked;
- `proved`: everything passed, and at least one piece holds for every dimension (`symbolic`, `smt`, `formal`);
- `open`: anything else, such as a check at fixed dimensions alone or a solver that gave up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from preln.base.errors import InputError

KINDS = ("theorem", "hypothesis")
EVIDENCE_KINDS = (
    "symbolic",
    "symbolic_fixed_d",
    "smt",
    "counterexample",
    "property",
    "measurement",
    "formal",
    "literature",
)
PROOFS = frozenset({"symbolic", "smt", "formal"})
THEOREM_STATUSES = ("proved", "refuted", "open")
HYPOTHESIS_STATUSES = ("supported", "unsupported", "inconclusive", "untested")


@dataclass(frozen=True)
class Evidence:
    """One piece of evidence.

    Attributes:
        kind: one of `EVIDENCE_KINDS`.
        outcome: `pass` if the evidence does what it is there to do (the identity holds, the solver says
            unsat, the counterexample reproduces), else `fail`.
        detail: plain data that goes to the ledger.
    """

    kind: str
    outcome: str
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.detail, dict):
            given = type(self.detail).__name__
            raise InputError(f"evidence of kind {self.kind!r}: its detail is {given}: give a dictionary")
        controls = self.detail.get("negative_controls", [])
        if not isinstance(controls, list) or not all(_is_control(c) for c in controls):
            raise InputError(
                f"evidence of kind {self.kind!r}: its negative_controls are no list of "
                "{'name': text, 'rejected': True or False}: make them with preln.theory.mutation.control"
            )
        if self.kind not in EVIDENCE_KINDS:
            raise InputError(
                f"evidence kind {self.kind!r} is unknown: use one of {', '.join(EVIDENCE_KINDS)}"
            )
        if self.outcome not in ("pass", "fail"):
            raise InputError(f"evidence outcome {self.outcome!r} is unknown: use 'pass' or 'fail'")

    @property
    def passed(self) -> bool:
        """True if the outcome is `pass`."""
        return self.outcome == "pass"

    def as_dict(self) -> dict[str, Any]:
        """Return the evidence as plain data for the ledger."""
        return {"kind": self.kind, "outcome": self.outcome, "detail": self.detail}


def _is_control(control: Any) -> bool:
    """Tell whether a negative control has what the ledger and its tables read."""
    named = isinstance(control, Mapping) and isinstance(control.get("name"), str)
    return named and isinstance(control.get("rejected"), bool)


@dataclass(frozen=True)
class Claim:
    """A statement with its permanent ID and the function that decides it.

    `expect` says how the claim is listed: a theorem that comes out otherwise makes `preln verify` exit with
    1.
    """

    id: str
    kind: str
    title: str
    statement: str
    assumptions: tuple[str, ...]
    uses: tuple[str, ...]
    source: str
    expect: str
    decide: Callable[[], Iterable[Evidence]]


class Registry(dict[str, Claim]):
    """Claims by ID. An ID is given once."""

    def add(self, new: Claim) -> None:
        """Register a claim.

        Raises:
            InputError: the ID is taken, or a field is no text or has a value outside the vocabulary.
        """
        for name in ("id", "title", "statement", "source"):
            text = getattr(new, name)
            lines = len(text.splitlines()) if isinstance(text, str) and text.strip() else 0
            if lines == 0 or (name in ("id", "title") and lines > 1):
                raise InputError(f"claim {new.id!r}: its {name} is {text!r}: give a line of text")
        for name in ("assumptions", "uses"):
            if not all(isinstance(text, str) for text in getattr(new, name)):
                raise InputError(f"claim {new.id!r}: its {name} are not all text: give a list of lines")
        if not callable(new.decide):
            raise InputError(f"claim {new.id!r}: what decides it is no function: decorate a function")
        if new.id in self:
            raise InputError(
                f"claim {new.id} is registered twice: an ID is unique and permanent, choose another"
            )
        if new.kind not in KINDS:
            raise InputError(f"claim {new.id}: kind {new.kind!r} is unknown, use one of {', '.join(KINDS)}")
        allowed = THEOREM_STATUSES if new.kind == "theorem" else HYPOTHESIS_STATUSES
        if new.expect not in allowed:
            raise InputError(
                f"claim {new.id}: expect {new.expect!r} is unknown, use one of {', '.join(allowed)}"
            )
        self[new.id] = new


CLAIMS = Registry()
"""Every claim imported so far; `preln.theory.ledger.registry` imports the built-in ones first."""


def claim(
    id: str,
    *,
    title: str,
    statement: str,
    kind: str = "theorem",
    assumptions: Iterable[str] = (),
    uses: Iterable[str] = (),
    source: str = "own",
    expect: str = "proved",
    registry: Registry | None = None,
) -> Callable[[Callable[[], Iterable[Evidence]]], Callable[[], Iterable[Evidence]]]:
    """Register the decorated function as the decision of a claim.

    Args:
        id: permanent ID, such as `RMS-NORM`.
        title: a few words.
        statement: the claim in full.
        kind: `theorem` or `hypothesis`.
        assumptions: everything the statement takes for granted, one line each.
        uses: IDs of claims whose results the decision relies on.
        source: who states it.
        expect: the status it is listed with.
        registry: where to register; the default is the global one.

    Raises:
        InputError: the ID is taken, or a field has a value outside the vocabulary.
    """

    def register(decide: Callable[[], Iterable[Evidence]]) -> Callable[[], Iterable[Evidence]]:
        target = CLAIMS if registry is None else registry
        target.add(Claim(id, kind, title, statement, tuple(assumptions), tuple(uses), source, expect, decide))
        return decide

    return register


def status_of(kind: str, evidence: Iterable[Evidence], used: Mapping[str, str]) -> str:
    """Compute a claim's status from its evidence and from the statuses of the claims it uses.

    A hypothesis is `untested` here: a study gives it its verdict, for one model and one data set at a time.
    """
    if kind == "hypothesis":
        return "untested"
    evidence = list(evidence)
    if any(e.kind == "counterexample" and e.passed for e in evidence):
        return "refuted"
    decisive = any(e.kind in PROOFS for e in evidence)
    if decisive and all(e.passed for e in evidence) and all(s == "proved" for s in used.values()):
        return "proved"
    return "open"
