"""How many bits a model needs for an answer that is known to be right: a measure without chance level."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from preln.base.errors import InputError, require
from preln.data.gold import GoldAnswer
from preln.evaluate.decoding import check_room
from preln.evaluate.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ["task", "document", "bits", "bytes", "bits_per_byte"]


def gold_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[GoldAnswer]],
    *,
    batch_size: int = 4,
) -> pd.DataFrame:
    """``-log2 p(answer | prompt)`` of every answer, and the same over the answer's bytes.

    Accuracy says nothing of a model that guesses; bits a byte fall smoothly with what a model knows, and do
    not depend on the tokenizer (OLMES, Gu et al. 2024, reports them for worked solutions). The likelihood is
    lm-eval's, the bytes are those of the answer in UTF-8 with its leading space.

    Args:
        model: A causal language model of transformers; it is left as it was.
        tokenizer: Its tokenizer; a copy is used.
        tasks: By name, answers of :func:`preln.data.load_gold`.
        batch_size: Answers in one forward pass.

    Returns:
        One row an answer: ``task``, ``document`` (its number in the task), ``bits``, ``bytes``,
        ``bits_per_byte``.

    Raises:
        InputError: No task, an empty answer, one too long for the model, or a likelihood that is not finite.
    """
    require("lm_eval", extra="eval")
    rows = [(task, row) for task, answers in tasks.items() for row in answers]
    if not rows:
        raise InputError("no answers to weigh: name at least one task")
    for task, row in rows:
        if not row.answer.strip() or not row.prompt.strip():
            raise InputError(f"{task}: document {row.number} has an empty prompt or answer: leave it out")
    check_room(model, max(len(tokenizer(row.prompt + row.answer)["input_ids"]) for _, row in rows))
    logs = _log_likelihoods(model, tokenizer, [row for _, row in rows], batch_size)
    found = []
    for (task, row), log in zip(rows, logs, strict=True):
        if not math.isfinite(log):
            raise InputError(
                f"{task}: document {row.number} has a log-likelihood of {log}: check the model's weights and "
                "its dtype"
            )
        bits, size = -log / math.log(2.0), len(row.answer.encode())
        found.append((task, row.number, bits, size, bits / size))
    return pd.DataFrame(found, columns=pd.Index(COLUMNS))


def _log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[GoldAnswer], batch_size: int
) -> list[float]:
    """lm-eval's log p(answer | prompt), in nats."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    wrapper: Any = HFLM  # its signature is hidden by a decorator
    was_training = model.training
    try:
        with quiet():
            wrapped = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            asked = [
                Instance(request_type="loglikelihood", doc={}, arguments=(row.prompt, row.answer), idx=number)
                for number, row in enumerate(rows)
            ]
            return [float(log) for log, _ in wrapped.loglikelihood(asked, disable_tqdm=True)]
    finally:
        model.train(was_training)
