"""What a model is worth: perplexity on tokens, accuracy on lm-eval tasks."""

from __future__ import annotations

from preln.base.rooms import callable_room
from preln.evaluate.api import evaluate, write_results
from preln.evaluate.harness import REASSESSING, SUITES, evaluate_tasks
from preln.evaluate.perplexity import LossResult, perplexity

__all__ = [
    "REASSESSING",
    "SUITES",
    "LossResult",
    "evaluate",
    "evaluate_tasks",
    "perplexity",
    "write_results",
]

callable_room(__name__)
