"""What a model is worth: perplexity, accuracy, speed, and what it writes; alone, and beside another."""

from __future__ import annotations

from preln.base.rooms import callable_room
from preln.evaluate.api import evaluate, read_results, write_results
from preln.evaluate.generation import Continuations, compare_generation, write_on
from preln.evaluate.gold import gold_bits
from preln.evaluate.harness import REASSESSING, SUITES, evaluate_tasks
from preln.evaluate.paired import compare_documents, compare_results, compare_several
from preln.evaluate.perplexity import LossResult, perplexity
from preln.evaluate.sentences import load_sentence_encoder
from preln.evaluate.speed import amdahl_limit, compare_speed, speed
from preln.evaluate.variants import evaluate_variants
from preln.evaluate.windows import loss_by_position, strided_perplexity

__all__ = [
    "REASSESSING",
    "SUITES",
    "Continuations",
    "LossResult",
    "amdahl_limit",
    "compare_documents",
    "compare_generation",
    "compare_results",
    "compare_several",
    "compare_speed",
    "evaluate",
    "evaluate_tasks",
    "evaluate_variants",
    "gold_bits",
    "load_sentence_encoder",
    "loss_by_position",
    "perplexity",
    "read_results",
    "speed",
    "strided_perplexity",
    "write_on",
    "write_results",
]

callable_room(__name__)
