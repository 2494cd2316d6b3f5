"""``preln.evaluate``: whatever weighs a model in one call, and the files that hold the outcome."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from preln.base.errors import InputError
from preln.base.files import read_json, verify_checksums, write_json, write_parquet
from preln.data import fingerprint
from preln.evaluate.generation import Continuations, Embed, Prompts, compare_generation
from preln.evaluate.harness import evaluate_tasks
from preln.evaluate.paired import compare_results
from preln.evaluate.perplexity import perplexity
from preln.evaluate.speed import compare_speed, speed
from preln.evaluate.windows import loss_by_position, strided_perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: Sequence[str] | None = None,
    *,
    tokens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    stride: int | None = None,
    positions: bool = False,
    prompts: Prompts | None = None,
    timed: bool = False,
    reference: PreTrainedModel | Continuations | None = None,
    against: dict[str, Any] | None = None,
    new_tokens: int = 64,
    embed: Embed | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    source: str | os.PathLike[str] = "auto",
    seed: int = 0,
    name: str | None = None,
) -> dict[str, Any]:
    """Weigh a model: perplexity on tokens, accuracy on lm-eval tasks, speed, and what it writes.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; needed for tasks and prompts.
        tasks: Names of lm-eval tasks, see :func:`preln.evaluate.evaluate_tasks`.
        tokens: Ids ``[n, T]`` for perplexity, see :func:`preln.evaluate.perplexity`.
        attention_mask: ``[n, T]``, 1 where ``tokens`` are real.
        stride: Also the perplexity of each sequence's tokens joined to one text, in windows of T tokens that
            begin every ``stride`` tokens, see :func:`preln.evaluate.strided_perplexity`.
        positions: Whether to add the loss by position, in powers of two.
        prompts: Texts or ids to continue; with ``reference``, see :func:`preln.evaluate.compare_generation`.
        timed: Whether to time prefill and decode; beside ``reference`` where that is a model.
        reference: The unpruned model, or what it wrote after the prompts.
        against: Another model's result on the same tasks, to compare document by document.
        new_tokens: Limit of each continuation.
        embed: From texts to vectors, instead of the packaged sentence model.
        limit: Documents a task.
        batch_size: Requests in one forward pass.
        source: Where benchmark rows come from, see :func:`preln.data.locate`.
        seed: Seed of bootstrap and of tasks that draw.
        name: What to call the model in the result.

    Returns:
        ``model``, ``tasks``, ``mean_acc``, ``source``, and where asked for ``perplexity`` (loss, low, high,
        perplexity, tokens, n, and the ``fingerprint`` of the tokens), ``strided`` (the same, ``length`` and
        ``stride``), ``settings``, ``lm_eval``, ``generation`` (a row a measure), and frames: ``documents``,
        ``sequences``, ``windows``, ``positions``, ``continuations``, ``speed``, ``speedup`` and
        ``comparison``. :func:`write_results` stores it.

    Raises:
        InputError: There is nothing to do, or a part of it is bad or lacks what it needs.
    """
    if not tasks and tokens is None and prompts is None and not timed:
        raise InputError("nothing to evaluate: give tasks, tokens, prompts or timed")
    if (tasks or prompts is not None) and tokenizer is None:
        raise InputError("tasks and prompts need the model's tokenizer: give it as the second argument")
    if prompts is not None and reference is None:
        raise InputError("prompts need the unpruned model, or what it wrote: give it as reference")
    if tokens is None and (stride is not None or positions):
        raise InputError("stride and positions need tokens: give ids [n, T]")
    if stride is not None and attention_mask is not None:
        raise InputError("stride joins the sequences to one text: give tokens without padding")
    if against is not None and not tasks:
        raise InputError("against compares documents of tasks: name the tasks of that result")
    result: dict[str, Any] = {"model": name, "tasks": {}, "mean_acc": None, "source": {}}
    if tokens is not None:
        measured = perplexity(model, tokens, attention_mask, seed=seed)
        result["perplexity"] = {**measured.as_dict(), "fingerprint": fingerprint(tokens)}
        result["sequences"] = measured.sequences
        if positions:
            result["positions"] = loss_by_position(model, tokens, attention_mask, buckets=True, seed=seed)
        if stride is not None:
            length = tokens.shape[1]
            found = strided_perplexity(model, tokens.flatten(), length=length, stride=stride, seed=seed)
            result["strided"] = {**found.as_dict(), "length": length, "stride": stride}
            result["windows"] = found.sequences
    if tasks and tokenizer is not None:
        result |= evaluate_tasks(
            model, tokenizer, tasks, limit=limit, batch_size=batch_size, source=source, seed=seed
        )
        if against is not None:
            result["comparison"] = compare_results(against, result, seed=seed)
    if prompts is not None and tokenizer is not None and reference is not None:
        told: dict[str, Any] = {"new_tokens": new_tokens, "batch_size": batch_size, "embed": embed}
        table, summary = compare_generation(model, reference, tokenizer, prompts, seed=seed, **told)
        result |= {"continuations": table, "generation": records(summary)}
    if timed:
        if reference is None or isinstance(reference, Continuations):
            result["speed"] = speed(model, seed=seed)
        else:
            result["speed"], result["speedup"] = compare_speed(reference, model, seed=seed)
    return result


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as JSON has them: a number that is not finite becomes None."""
    known = frame.replace([float("inf"), float("-inf")], float("nan"))
    return known.astype(object).where(known.notna(), None).to_dict("records")


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write_results` stored, for ``against``: the numbers, lm-eval's own, and the documents.

    Raises:
        InputError: The folder holds no results, or no documents, or they were changed.
    """
    root = Path(folder)
    verify_checksums(root)
    result = read_json(root / "results.json")
    if not (root / "documents.parquet").is_file():
        raise InputError(f"{folder}: holds no documents to compare: evaluate that model on tasks first")
    result["documents"] = pd.read_parquet(root / "documents.parquet")
    return {**result, "lm_eval": read_json(root / "lm_eval.json")}


def write_results(result: dict[str, Any], out: str | os.PathLike[str]) -> Path:
    """Store what :func:`evaluate` returned, each file whole or not at all, ``results.json`` last.

    Writes ``results.json`` (names, numbers, source, settings), ``lm_eval.json`` (lm-eval's own results,
    untouched), and a ``.parquet`` file of each frame under its name, such as ``documents.parquet`` (each
    document's outcome) and ``sequences.parquet`` (each sequence's loss), as far as the result has them.

    Returns:
        The path of ``results.json``.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if "lm_eval" in result:
        write_json(folder / "lm_eval.json", result["lm_eval"])
    frames = {part: value for part, value in result.items() if isinstance(value, pd.DataFrame)}
    for part, frame in frames.items():
        write_parquet(folder / f"{part}.parquet", frame)
    beside = {"lm_eval", *frames}
    return write_json(folder / "results.json", {k: v for k, v in result.items() if k not in beside})
