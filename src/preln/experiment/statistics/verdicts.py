"""Verdicts: a hypothesis of the ledger, the rule that a study fixed for it, and the numbers that it found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preln.experiment.sections import Hypothesis

# imported for their registrations
from preln.experiment.statistics import alike, damage, depth, healing, kept, shift
from preln.experiment.statistics.decisions import as_row
from preln.experiment.statistics.registry import STATISTICS, MissingData

if TYPE_CHECKING:
    from preln.experiment.lab import Lab

__all__ = ["STATISTICS", "alike", "damage", "decide", "depth", "healing", "kept", "shift"]


def decide(hypothesis: Hypothesis, lab: Lab) -> dict[str, Any]:
    """The verdict on one hypothesis; ``untested`` with the reason where the study lacks what it needs."""
    from preln.theory.ledger import registry

    claim = registry()[hypothesis.id]
    found = STATISTICS[hypothesis.id][hypothesis.statistic]
    rule = {**hypothesis.model_dump(), "meaning": found.meaning}
    described = {"id": claim.id, "statement": claim.statement, "source": claim.source}
    try:
        return as_row(found(lab, hypothesis.model), claim=described, rule=rule)
    except MissingData as error:
        return as_row(None, claim=described, rule=rule, missing=str(error))
