"""Criteria -> plan -> surgery. The room can be called like its verb: ``preln.prune(model, drop=[...])``."""

from __future__ import annotations

from preln.base.rooms import callable_room
from preln.prune.command import plan_for, write_scores
from preln.prune.criteria import CRITERIA, Criterion
from preln.prune.plan import (
    PRESETS,
    Plan,
    make_plan,
    parse_layers,
    plan_layers,
    protected_blocks,
    read_plan,
    write_plan,
)
from preln.prune.scores import leave_one_out, score
from preln.prune.surgery import prune, write_checkpoint

__all__ = [
    "CRITERIA",
    "PRESETS",
    "Criterion",
    "Plan",
    "leave_one_out",
    "make_plan",
    "parse_layers",
    "plan_for",
    "plan_layers",
    "protected_blocks",
    "prune",
    "read_plan",
    "score",
    "write_checkpoint",
    "write_plan",
    "write_scores",
]

callable_room(__name__)
