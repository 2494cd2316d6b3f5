"""``preln.evaluate``: perplexity and tasks in one call, and the files that hold the outcome."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from preln.base.errors import InputError
from preln.base.files import write_json, write_parquet
from preln.data import fingerprint
from preln.evaluate.harness import evaluate_tasks
from preln.evaluate.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BESIDE = ("lm_eval", "documents", "sequences")  # parts of a result that get files of their own


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: Sequence[str] | None = None,
    *,
    tokens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    source: str | os.PathLike[str] = "auto",
    seed: int = 0,
    name: str | None = None,
) -> dict[str, Any]:
    """Weigh a model: perplexity on tokens, accuracy on lm-eval tasks, or both.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; needed for tasks.
        tasks: Names of lm-eval tasks, see :func:`preln.evaluate.evaluate_tasks`.
        tokens: Ids ``[n, T]`` for perplexity, see :func:`preln.evaluate.perplexity`.
        attention_mask: ``[n, T]``, 1 where ``tokens`` are real.
        limit: Documents a task.
        batch_size: Requests in one forward pass.
        source: Where benchmark rows come from, see :func:`preln.data.locate`.
        seed: Seed of bootstrap and of tasks that draw.
        name: What to call the model in the result.

    Returns:
        ``model``, ``tasks``, ``mean_acc``, ``source``, and where asked for ``perplexity`` (loss, low, high,
        perplexity, tokens, n, and the ``fingerprint`` of the tokens), ``settings``, ``lm_eval``, and the
        frames ``documents`` and ``sequences``. :func:`write_results` stores it.

    Raises:
        InputError: Neither tasks nor tokens are given, or one of them is bad.
    """
    if not tasks and tokens is None:
        raise InputError("nothing to evaluate: give tasks, tokens, or both")
    if tasks and tokenizer is None:
        raise InputError("tasks need the model's tokenizer: give it as the second argument")
    result: dict[str, Any] = {"model": name, "tasks": {}, "mean_acc": None, "source": {}}
    if tokens is not None:
        measured = perplexity(model, tokens, attention_mask, seed=seed)
        result["perplexity"] = {**measured.as_dict(), "fingerprint": fingerprint(tokens)}
        result["sequences"] = measured.sequences
    if tasks and tokenizer is not None:
        result |= evaluate_tasks(
            model, tokenizer, tasks, limit=limit, batch_size=batch_size, source=source, seed=seed
        )
    return result


def write_results(result: dict[str, Any], out: str | os.PathLike[str]) -> Path:
    """Store what :func:`evaluate` returned, each file whole or not at all, ``results.json`` last.

    Writes ``results.json`` (names, numbers, source, settings), ``lm_eval.json`` (lm-eval's own results,
    untouched), ``documents.parquet`` (each document's outcome) and ``sequences.parquet`` (each sequence's
    loss), as far as the result has them.

    Returns:
        The path of ``results.json``.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if "lm_eval" in result:
        write_json(folder / "lm_eval.json", result["lm_eval"])
    for part in ("documents", "sequences"):
        if isinstance(result.get(part), pd.DataFrame):
            write_parquet(folder / f"{part}.parquet", result[part])
    return write_json(folder / "results.json", {k: v for k, v in result.items() if k not in _BESIDE})
