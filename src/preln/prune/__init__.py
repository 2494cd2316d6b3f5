"""Criteria -> plan -> surgery. The room can be called like its verb: ``preln.prune(model, drop=[...])``."""

from __future__ import annotations

from preln.base.rooms import callable_room
from preln.prune.command import carry_out, plan_for
from preln.prune.compare import Comparison, compare
from preln.prune.criteria import CRITERIA, Criterion, random_orders
from preln.prune.half_scores import score_any, score_halves
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
from preln.prune.record import describe_scores, orders, write_scores
from preln.prune.registry import HALF_METRICS, depends_on_size
from preln.prune.removals import removal_losses
from preln.prune.replace import REPLACEMENTS, elder_weights, replace_blocks
from preln.prune.scores import leave_one_out, score
from preln.prune.surgery import prune, write_checkpoint
from preln.prune.sweep import depth_sweep

__all__ = [
    "CRITERIA",
    "HALF_METRICS",
    "PRESETS",
    "REPLACEMENTS",
    "Comparison",
    "Criterion",
    "Plan",
    "carry_out",
    "compare",
    "depends_on_size",
    "depth_sweep",
    "describe_scores",
    "elder_weights",
    "leave_one_out",
    "make_plan",
    "orders",
    "parse_layers",
    "plan_for",
    "plan_layers",
    "protected_blocks",
    "prune",
    "random_orders",
    "read_plan",
    "removal_losses",
    "replace_blocks",
    "score",
    "score_any",
    "score_halves",
    "write_checkpoint",
    "write_plan",
    "write_scores",
]

callable_room(__name__)
