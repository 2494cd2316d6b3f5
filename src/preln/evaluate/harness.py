"""lm-eval on a model in memory: accuracies with their errors, and every document's outcome."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pandas as pd

from preln.base.errors import InputError, require
from preln.evaluate.paired import groups_of
from preln.evaluate.quiet import quiet, seeded
from preln.evaluate.stock import LoadedTasks, leaves, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REASSESSING = ("mmlu", "cmmlu", "piqa", "openbookqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
SUITES = {"reassessing": REASSESSING, "quick": ("piqa", "arc_easy", "hellaswag", "winogrande")}


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | float | Mapping[str, int] | None = None,
    batch_size: int = 8,
    source: str | os.PathLike[str] = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Run lm-eval tasks on a model object, with the stock prompts, 0-shot.

    Args:
        model: A causal language model of transformers, pruned or not; it is left as it was.
        tokenizer: Its tokenizer; a copy is used.
        tasks: Names of lm-eval tasks, groups or tags.
        limit: The first so many documents of each task (of each subject, in a group); a share when below 1;
            or counts by name, where tasks that are not named run whole.
        batch_size: Requests in one forward pass.
        source: Where the known benchmarks' rows come from, see ``preln.data.locate``.
        seed: For tasks that draw few-shot examples or sample text.

    Returns:
        ``tasks`` (by name: ``acc``, ``acc_stderr``, ``acc_norm``, ``acc_norm_stderr`` where the task has
        them, else its own metrics, and ``n`` documents), ``mean_acc`` (plain mean over those with ``acc``),
        ``source`` (by name), ``settings``, ``groups`` (their single tasks by name), ``lm_eval`` (lm-eval's
        own results, JSON-ready), ``documents`` (a frame: ``task``, ``doc_id``, ``doc_hash``, ``acc``,
        ``acc_norm``).

    Raises:
        InputError: An unknown task, missing rows, a bad limit or batch size, or log-likelihoods that are not
            finite.
    """
    check_counts(limit, batch_size)
    require("lm_eval", extra="eval")
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    with quiet(), seeded(seed):
        loaded = load_tasks(names, source=source, seed=seed)
        raw = _run(model, tokenizer, loaded, limit=limit, batch_size=batch_size)
    return outcome(model, raw, loaded, limit=limit, batch_size=batch_size, seed=seed)


def outcome(
    model: PreTrainedModel, raw: dict[str, Any], loaded: LoadedTasks, **settings: Any
) -> dict[str, Any]:
    """What lm-eval found, as :func:`evaluate_tasks` tells it.

    Args:
        model: The model that ran.
        raw: What lm-eval's evaluator returned; its samples are taken out of it.
        loaded: The tasks.
        **settings: What to record of the run, in front of the model's own settings.
    """
    samples = raw.pop("samples", None) or {}
    _check_finite(samples)
    results = {name: _row(name, raw, loaded) for name in loaded.reported}
    accuracies = [row["acc"] for row in results.values() if row.get("acc") is not None]
    return {
        "tasks": results,
        "mean_acc": sum(accuracies) / len(accuracies) if accuracies else None,
        "source": copy.deepcopy(loaded.sources),
        "settings": {
            **settings,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attn_implementation": getattr(model.config, "_attn_implementation", None),
            "lm_eval": version("lm_eval"),
        },
        "groups": groups_of({"tasks": results, "lm_eval": raw}),
        "lm_eval": _jsonable(raw),
        "documents": _documents(samples),
    }


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    *,
    limit: int | float | Mapping[str, int] | None,
    batch_size: int,
) -> dict[str, Any]:
    """lm-eval's evaluator over the loaded tasks, with the model's mode kept."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        # a copy, for the wrapper gives a tokenizer without padding one
        wrapper: Any = HFLM  # its signature is hidden by a decorator
        wrapped = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        # evaluate, not simple_evaluate: the latter asks the hub for the model and runs system commands
        run: Any = evaluate
        chosen = {"samples": _chosen(loaded, limit)} if isinstance(limit, Mapping) else {"limit": limit}
        return dict(run(wrapped, task_dict=loaded.tasks, bootstrap_iters=1000, **chosen))
    finally:
        model.train(was_training)


def _chosen(loaded: LoadedTasks, limits: Mapping[str, int]) -> dict[str, list[int]]:
    """Documents by single task, as lm-eval takes them."""
    if unknown := [name for name in limits if name not in loaded.reported]:
        raise InputError(f"limit: {unknown[0]!r} is none of the tasks: name {', '.join(loaded.reported)}")
    found = {}
    for name in loaded.reported:
        for leaf in leaves(name, loaded.tasks):
            count = len(loaded.tasks["tasks"][leaf].eval_docs)
            found[leaf] = list(range(min(count, limits.get(name, count))))
    return found


def check_counts(limit: int | float | Mapping[str, int] | None, batch_size: int) -> None:
    """Refuse counts that lm-eval would misread."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    if isinstance(limit, Mapping):
        for each in limit.values():
            check_counts(each, batch_size)
        return
    if limit is None:
        return
    whole = not isinstance(limit, bool) and isinstance(limit, int) and limit >= 1
    share = isinstance(limit, float) and 0.0 < limit < 1.0
    if not (whole or share):
        raise InputError(f"limit must be a whole number of at least 1, or a share below 1, not {limit!r}")


def _row(name: str, raw: dict[str, Any], loaded: LoadedTasks) -> dict[str, Any]:
    """One task's numbers under plain names: lm-eval writes ``acc,none``, where none is a filter."""
    row: dict[str, Any] = {}
    for key, value in raw["results"].get(name, {}).items():
        metric, _, chosen = key.partition(",")
        if not chosen:
            continue
        plain = metric if chosen == "none" else f"{metric},{chosen}"
        row[plain] = float(value) if _is_finite_number(value) else None
    row["n"] = sum(int(raw["n-samples"][leaf]["effective"]) for leaf in leaves(name, loaded.tasks))
    return row


def _documents(samples: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """Every document's outcome, so that two models can be compared on the same documents."""
    rows = [
        {
            "task": task,
            "doc_id": int(sample["doc_id"]),
            "doc_hash": sample["doc_hash"],
            "acc": sample.get("acc", math.nan),
            "acc_norm": sample.get("acc_norm", math.nan),
        }
        for task, entries in samples.items()
        for sample in entries
        if sample.get("filter") == entries[0].get("filter")
    ]
    columns = ["task", "doc_id", "doc_hash", "acc", "acc_norm"]
    frame = pd.DataFrame(rows, columns=columns).astype({"acc": "float64", "acc_norm": "float64"})
    return frame.sort_values(["task", "doc_id"], ignore_index=True)


def _check_finite(samples: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse answers of a model whose log-likelihoods are NaN: the largest of NaNs is the first option."""
    for task, entries in samples.items():
        for sample in entries:
            if any(math.isnan(value) for value in _floats(sample.get("resps", []))):
                raise InputError(
                    f"{task}: document {sample['doc_id']} has a log-likelihood that is NaN: "
                    "check the model's weights and its dtype"
                )


def _floats(values: Iterable[Any]) -> Iterable[float]:
    """The floats inside nested lists and tuples."""
    for value in values:
        if isinstance(value, float):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _floats(value)


def _is_finite_number(value: Any) -> bool:
    """Whether a value is a number that JSON has."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _jsonable(raw: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results as JSON types, through its own encoder; a NaN, which JSON lacks, becomes null."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(raw, default=handle_non_serializable, ensure_ascii=False)
    text = re.sub(r" at 0x[0-9a-f]+>", ">", text)  # where a function was: no two processes agree
    return json.loads(text, parse_constant=lambda _: None)
